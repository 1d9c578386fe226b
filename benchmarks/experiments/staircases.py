"""Does a random displacement make all saddles of the octopus wait alike?

Two methods with displacements and three without descend the bilevel and the minimax octopus, in dimension 5, 10 and 20
and for four curvatures, with both levels aligned with the coordinates and with a rotated lower level.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import octopus
from benchmarks.experiments.study import Row, median_range, table, where
from benchmarks.staircase import (
    CURVATURES,
    GAMMA,
    METHODS,
    PERTURBED,
    build,
    calls_per_saddle,
    descend,
    estimated_gap,
    gaps,
    last_ratio,
    line_fit,
    summary,
)
from benchmarks.staircase_figures import draw_calls, draw_staircases, draw_times

SEEDS = 10
DIMENSIONS = (5, 10, 20)
STEPS = {5: 1000, 10: 1000, 20: 1500}

Result = dict[str, Any]


def settings(rows: list[Row], seeds: int, smoke: bool) -> list[dict[str, Any]]:
    """The claim itself first (d = 20), then the other dimensions, the rotated mode, and the other methods.

    Half of the seeds for d = 20 and for AIDBiO, whose times hardly depend on the seed; a fifth for what is only there
    for completeness.
    """
    half, fifth = math.ceil(seeds / 2), math.ceil(seeds / 5)
    stages = (
        ("aligned", ("PerturbedAID", "AIDBiO", "PerturbedGDmax"), (20,), half),
        ("aligned", ("PerturbedAID", "AIDBiO"), (10, 5), fifth),
        ("rotated", ("PerturbedAID", "AIDBiO"), (5, 10), fifth),
        ("aligned", ("PerturbedGDmax", "GDmax", "ITDBiO"), (10, 5), fifth),
        ("aligned", ("PerturbedAID",), (10, 5), seeds),
        ("aligned", ("GDmax", "ITDBiO"), (20,), fifth),
        ("aligned", ("AIDBiO",), (10, 5), half),
        ("aligned", ("PerturbedGDmax",), (10, 5), half),
        ("rotated", ("PerturbedAID", "AIDBiO"), (20,), 1),
    )
    if smoke:
        stages = (("aligned", METHODS, (5,), 1), ("rotated", ("AIDBiO",), (5,), 1))
    jobs = (
        (mode, name, d, L, seed)
        for mode, names, dimensions, n in stages
        for seed in range(n)
        for d in dimensions
        for name in names
        for L in (CURVATURES[:1] if smoke else CURVATURES)
    )
    return [_setting(*job, 60 if smoke else STEPS[job[2]]) for job in dict.fromkeys(jobs)]


def _setting(mode: str, name: str, d: int, L: float, seed: int, steps: int) -> dict[str, Any]:
    return {"mode": mode, "method": name, "d": d, "L": L, "seed": seed, "steps": steps}


def run(setting: dict[str, Any], device: str) -> Result:
    """One descent."""
    rotated, L = setting["mode"] == "rotated", setting["L"]
    method = build(setting["method"], setting["d"], L, setting["seed"], rotated=rotated, device=device)
    return summary(method, descend(method, setting["steps"]), L)


def report(rows: list[Row], folder: Path) -> str:
    """Five tables, three figures."""
    aligned = [row for row in rows if row["setting"]["mode"] == "aligned"]
    cases = [(d, L) for d in DIMENSIONS for L in CURVATURES if where(aligned, d=d, L=L)]
    draw_staircases(aligned, folder / "staircases.png")
    draw_times(aligned, folder / "staircase_times.png")
    draw_calls(aligned, folder / "staircase_calls.png")
    parts = [
        ("Saddles left behind, of d: median (range) over the seeds.", left_table(aligned, cases)),
        (
            "With displacements: *gap*, steps from saddle to saddle, all seeds together; *estimate*, the way in plus "
            "the way out; *longest*, the longest gap over the median one, worst seed; *R2* of the line through "
            "the times, worst seed.",
            line_table(aligned, cases),
        ),
        (
            "Without: *ratio*, the last wait over the one before, median; the *closed form* is of gradient descent "
            "on Phi; *R2* of the straight lines through the times and through their logarithms, AIDBiO, median.",
            ratio_table(aligned, cases),
        ),
        ("Oracle calls per saddle left behind, all kinds together: median (range).", calls_table(aligned, cases)),
        (
            "Answers and claims, all L and seeds together. *Minima*: answers that `certify` finds to be local minima; "
            "*claims*: escape tests passed on the way; *false*: those whose point is none; *first false*: runs that "
            "would have ended at a saddle, had they believed their first test. *Error*: the largest error of a "
            "hypergradient at a displacement, in units of epsilon / 5, median and range over the runs.",
            claims_table(aligned),
        ),
        (
            "Rotated lower level against aligned: saddles left behind, and the step at which the last of them was.",
            modes_table(rows),
        ),
    ]
    return "\n\n".join(f"{text}\n\n{body}" for text, body in parts if body)


def _cell(rows: list[Row], name: str, key: str, form: str = ",.0f", **case: Any) -> str:
    return median_range([r[key] for r in where(rows, method=name, **case)], form)


def left_table(rows: list[Row], cases: list[tuple[int, float]]) -> str:
    """Saddles left behind."""
    return table(
        ["d, L", *METHODS],
        [[f"{d}, {L:g}", *(_cell(rows, name, "left", d=d, L=L) for name in METHODS)] for d, L in cases],
    )


def line_table(rows: list[Row], cases: list[tuple[int, float]]) -> str:
    """Methods with displacements: are the gaps alike?"""
    lines = []
    for d, L in cases:
        own = [[r for r in where(rows, method=name, d=d, L=L) if r["left"] > 2] for name in PERTURBED]
        line = [f"{d}, {L:g}", *(median_range([gap for r in group for gap in gaps(r)]) for group in own)]
        line.append(f"{estimated_gap(L, d):.0f}")
        line += [f"{max(max(gaps(r)) / median(gaps(r)) for r in group):.2f}" if group else "" for group in own]
        line += [f"{min(line_fit(r['times'])[1] for r in group):.4f}" if group else "" for group in own]
        lines.append(line)
    sides = [[f"{name}: {what}" for name in PERTURBED] for what in ("gap", "longest", "R2")]
    return table(["d, L", *sides[0], "estimate", *sides[1], *sides[2]], lines)


def ratio_table(rows: list[Row], cases: list[tuple[int, float]]) -> str:
    """Methods without displacements: does each wait grow by the factor of the closed form?"""
    others = [name for name in METHODS if name not in PERTURBED]
    lines = []
    for d, L in cases:
        line = [f"{d}, {L:g}"]
        for name in others:
            ratios = [ratio for r in where(rows, method=name, d=d, L=L) if (ratio := last_ratio(r)) is not None]
            line.append(f"{median(ratios):.2f}" if ratios else "")
        line.append(f"{octopus.time_ratio(L, GAMMA):.2f}")
        times = [r["times"] for r in where(rows, method="AIDBiO", d=d, L=L) if r["left"] > 2]
        for scale in (float, math.log):
            fits = [line_fit([scale(t) for t in run])[1] for run in times]
            line.append(f"{median(fits):.3f}" if fits else "")
        lines.append(line)
    return table(["d, L", *(f"{name}: ratio" for name in others), "closed form", "R2 of t", "R2 of log t"], lines)


def calls_table(rows: list[Row], cases: list[tuple[int, float]]) -> str:
    """Oracle calls per saddle."""
    return table(
        ["d, L", *METHODS],
        [
            [f"{d}, {L:g}"]
            + [median_range([calls_per_saddle(r) for r in where(rows, method=name, d=d, L=L)]) for name in METHODS]
            for d, L in cases
        ],
    )


def claims_table(rows: list[Row]) -> str:
    """What the methods say of their answers, and what is true."""
    lines = []
    for d in DIMENSIONS:
        for name in METHODS:
            own = where(rows, method=name, d=d)
            if not own:
                continue
            minima = sum(r["verdict"] == "epsilon-local minimum" for r in own)
            line = [f"{d}, {name}", f"{minima} of {len(own)}", f"{max(r['distance'] for r in own):.1g}", "", "", "", ""]
            if name in PERTURBED:
                line[3] = f"{sum(r['claims'] for r in own)}"
                line[4] = f"{sum(r['false_claims'] for r in own)}"
                line[5] = f"{sum(r['first_claim_false'] for r in own)} of {len(own)}"
                line[6] = median_range([r["error"] for r in own], ".2g")
            lines.append(line)
    return table(["d, method", "minima", "largest distance", "claims", "false", "first false", "error"], lines)


def modes_table(rows: list[Row]) -> str:
    """Aligned against rotated."""
    lines = []
    for d in DIMENSIONS:
        for L in CURVATURES:
            if not where(rows, mode="rotated", d=d, L=L):
                continue
            line = [f"{d}, {L:g}"]
            for name in ("AIDBiO", "PerturbedAID"):
                for mode in ("aligned", "rotated"):
                    own = where(rows, mode=mode, method=name, d=d, L=L)
                    left, last = [r["left"] for r in own], [r["times"][-1] for r in own if r["times"]]
                    line.append(f"{median_range(left)}; {median_range(last)}" if own else "")
            lines.append(line)
    pairs = [f"{name}, {mode}" for name in ("AIDBiO", "PerturbedAID") for mode in ("aligned", "rotated")]
    return table(["d, L", *pairs], lines)
