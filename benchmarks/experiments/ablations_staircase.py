"""What does leaving the saddles of the octopus depend on: the displacement, errors, kappa, warm starts?

All on d = 5, L = 1. A1: displacements of length 0, from saddles and from generic points. A6: errors of the
hypergradient as perturbations. A10: oracle calls to the minimum against the condition number of y. A12: y and z that
begin anew in each iteration.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any

import torchbilevel as tb
from benchmarks import octopus
from benchmarks.experiments.study import Row, median_range, table, where
from benchmarks.staircase import KAPPA, RADIUS, build, calls_per_saddle, descend, line_fit, summary, value_tol
from examples.common import BLUE, GREY, ORANGE, RED, panels, save

SEEDS = 3
D, L = 5, 1.0
MODES = ("aligned", "rotated")
THEORY = math.ceil(KAPPA * math.log(1e3))
SOLVERS = {"3 and 3": 3, "20 and 20": 20, f"{THEORY} and {THEORY}": THEORY, "20 and CG(10)": 20}
STARTS = ("generic", "saddle 0", "saddle 2")
KAPPAS = (1.0, 10.0, 100.0, 1000.0)
WARM = {"y and z": {}, "y only": {"warm_start_adjoint": False}, "neither": {"warm_start": False}}
INNER = (20, 40, 80)
ORACLES = {
    # name: (key of a result, exponent of kappa in the bound)
    "gradients of f": ("upper_gradients", 3.0),
    "gradients of g": ("lower_gradients", 4.0),
    "products with g_yy": ("hessian_products", 3.5),
    "products with g_xy": ("jacobian_products", 3.0),
}


def settings(rows: list[Row], seeds: int, smoke: bool) -> list[dict[str, Any]]:
    """All parts, the longest runs last; one seed where a run has no random part."""
    wanted = [
        {"part": "A6", "mode": mode, "method": name, "solvers": solvers, "seed": seed}
        for mode in MODES
        for solvers in SOLVERS
        for name in ("AIDBiO", "PerturbedAID")
        for seed in range(seeds)
    ]
    kappas = [{"part": "A10", "kappa": kappa, "seed": seed} for kappa in KAPPAS for seed in range(seeds)]
    wanted += [setting for setting in kappas if setting["kappa"] < KAPPAS[-1]]
    wanted += [
        {"part": "A1", "mode": mode, "method": name, "start": start, "radius": radius, "seed": seed}
        for mode in MODES
        for name in ("PerturbedAID", "PerturbedGDmax")
        for start in STARTS
        for radius in (0.0, RADIUS)
        for seed in range(1 if (mode, radius) == ("aligned", 0.0) and start != "generic" else seeds)
    ]
    wanted += [
        {"part": "A12", "warm": warm, "inner": inner, "seed": seed}
        for inner in INNER
        for warm in WARM
        for seed in range(seeds)
    ]
    wanted += [setting for setting in kappas if setting["kappa"] == KAPPAS[-1]]  # minutes each
    if smoke:
        first = [s for s in wanted if s["seed"] == 0 and s.get("kappa", 0) < 100 and s.get("inner", 20) == 20]
        wanted = [s for s in first if s.get("solvers") != f"{THEORY} and {THEORY}"]
    return [{**setting, "steps": 12 if smoke else 700} for setting in wanted]


def run(setting: dict[str, Any], device: str) -> dict[str, Any]:
    """One descent."""
    name, seed, options = setting.get("method", "PerturbedAID"), setting["seed"], {"device": device}
    if "mode" in setting:
        options["rotated"] = setting["mode"] == "rotated"
    if setting["part"] == "A1":
        options["radius"] = setting["radius"]
        if setting["start"] != "generic":
            options["start"] = octopus.saddle(int(setting["start"].split()[1]), D)
    elif setting["part"] == "A6":
        options["steps"] = SOLVERS[setting["solvers"]]
        options["linear"] = tb.CG(max_iter=10) if "CG" in setting["solvers"] else None
    elif setting["part"] == "A10":
        # |y - y*| <= kappa |g_y| is then half of f_thres, and |g_yy z - f_y| <= epsilon / 10 where f_y is epsilon.
        kappa = setting["kappa"]
        options |= {"kappa": kappa, "steps": 10**6, "lower_tol": value_tol(L) / (2 * kappa)}
        options["linear"] = tb.CG(max_iter=10**4, tol=0.1)
    else:
        options |= {"steps": setting["inner"], **WARM[setting["warm"]]}
    method = build(name, D, L, seed, **options)
    return summary(method, descend(method, setting["steps"]), L)


def report(rows: list[Row], folder: Path) -> str:
    """A table for each part, and the figure of A10."""
    draw_kappa(where_settings(rows, part="A10"), folder / "kappa.png")
    parts = [
        (
            "**A1, no displacements.** Saddles left behind after the start, the step at which the last of them was, "
            "and how many answers `certify` finds to be minima. Radius 0 against e/100.",
            start_table(where_settings(rows, part="A1")),
        ),
        (
            "**A6, error as a perturbation.** K steps on y and N on z. *Step*: at which the last saddle was left; "
            "*closest*: how close to 0 the waiting coordinates came (median over saddles 3 to 5 and the seeds); "
            "*error* of the hypergradient at displacements, in units of epsilon / 5 (AIDBiO: at its last step).",
            error_table(where_settings(rows, part="A6")),
        ),
        (
            "**A10, condition number of y.** Oracle calls to the minimum, and the slope of their logarithm.",
            kappa_table(where_settings(rows, part="A10")),
        ),
        (
            "**A12, warm starts.** PerturbedAID, aligned. *Error* as in A6; *distance* of the last point from the "
            "minimum.",
            warm_table(where_settings(rows, part="A12")),
        ),
    ]
    return "\n\n".join(f"{text}\n\n{body}" for text, body in parts)


def where_settings(rows: list[Row], **setting: Any) -> list[Row]:
    """The rows whose settings have these values."""
    return [row for row in rows if all(row["setting"].get(key) == value for key, value in setting.items())]


def minima(own: list[dict[str, Any]]) -> str:
    """How many answers are certified minima."""
    return f"{sum(r['verdict'] == 'epsilon-local minimum' for r in own)} of {len(own)}"


def last_step(own: list[dict[str, Any]]) -> str:
    """The step at which the last saddle was left, if all were."""
    return median_range([r["times"][-1] if r["left"] == D else None for r in own])


def start_table(rows: list[Row]) -> str:
    """A1."""
    lines = []
    for mode in MODES:
        for start in STARTS:
            for name in ("PerturbedAID", "PerturbedGDmax"):
                line = [f"{mode}, {start}, {name}"]
                for radius in (0.0, RADIUS):
                    own = where(rows, mode=mode, start=start, method=name, radius=radius)
                    first = int(start.split()[1]) if start != "generic" else 0
                    line += [median_range([r["left"] - first for r in own]), last_step(own), minima(own)]
                lines.append(line)
    sides = ("left, 0", "step, 0", "minima, 0", "left, e/100", "step, e/100", "minima, e/100")
    return table(["levels, start, method", *sides], lines)


def error_table(rows: list[Row]) -> str:
    """A6."""
    lines = []
    for mode in MODES:
        for solvers in SOLVERS:
            line = [f"{mode}, {solvers}"]
            for name in ("AIDBiO", "PerturbedAID"):
                own = where(rows, mode=mode, solvers=solvers, method=name)
                closest = [value for r in own for value in r["closest"][2:]]
                line += [
                    median_range([r["left"] for r in own]),
                    last_step(own),
                    f"{median(closest):.0e}" if closest else "",
                    median_range([r["error"] for r in own], ".1g") if own else "",
                ]
            if own:
                lines.append(line)
    names = [f"{name}: {what}" for name in ("AID", "perturbed") for what in ("left", "step", "closest", "error")]
    return table(["levels, K and N", *names], lines)


def slope(rows: list[Row], key: str) -> float | None:
    """Slope of log calls against log kappa, by least squares through the medians, which are evenly spaced."""
    medians = [median([r[key] for r in where(rows, kappa=kappa)]) for kappa in KAPPAS if where(rows, kappa=kappa)]
    return line_fit([math.log10(m) for m in medians])[0] if len(medians) > 1 else None


def kappa_table(rows: list[Row]) -> str:
    """A10."""
    lines = []
    for name, (key, bound) in ORACLES.items():
        cells = [median_range([r[key] for r in where(rows, kappa=kappa)]) for kappa in KAPPAS]
        fitted = slope(rows, key)
        lines.append([name, *cells, "" if fitted is None else f"{fitted:.2f}", f"{bound:g}"])
    own = [where(rows, kappa=kappa) for kappa in KAPPAS]
    lines.append(["certified minima", *(minima(group) if group else "" for group in own), "", ""])
    lines.append(["displacements", *(median_range([r["displacements"] for r in group]) for group in own), "", ""])
    return table(["", *(f"kappa = {kappa:,.0f}" for kappa in KAPPAS), "slope", "bound"], lines)


def warm_table(rows: list[Row]) -> str:
    """A12."""
    lines = []
    for warm in WARM:
        for inner in INNER:
            own = where(rows, warm=warm, inner=inner)
            if not own:
                continue
            line = [f"{warm}, K = N = {inner}", median_range([r["left"] for r in own]), last_step(own)]
            line += [median_range([r["error"] for r in own], ".2g"), median_range([r["distance"] for r in own], ".1g")]
            line += [median_range([calls_per_saddle(r) for r in own]), minima(own)]
            line.append(f"{sum(r['false_claims'] for r in own)} of {sum(r['claims'] for r in own)}")
            lines.append(line)
    header = ["warm start of", "left", "step", "error", "distance", "calls per saddle", "minima", "false claims"]
    return table(header, lines)


def draw_kappa(rows: list[Row], path: Path) -> None:
    """Oracle calls against kappa, each seed and the medians, with the slopes of the bounds."""
    figure, axes = panels([["calls"]], (7.5, 5))
    ax = axes["calls"]
    known = [kappa for kappa in KAPPAS if where(rows, kappa=kappa)]
    for (name, (key, bound)), color in zip(ORACLES.items(), (BLUE, ORANGE, RED, GREY), strict=True):
        if key == "jacobian_products":  # one for each gradient of f
            continue
        calls = [[r[key] for r in where(rows, kappa=kappa)] for kappa in known]
        fitted = slope(rows, key)
        label = name if fitted is None else f"{name}: slope {fitted:.2f}, bound {bound:g}"
        ax.plot(known, [median(group) for group in calls], "o-", color=color, lw=2, label=label)
        for kappa, group in zip(known, calls, strict=True):
            ax.plot([kappa] * len(group), group, "_", color=color, alpha=0.6)
        ax.plot(known, [median(calls[0]) * (kappa / known[0]) ** bound for kappa in known], "--", color=color, lw=0.9)
    ax.set(xscale="log", yscale="log", ylim=(50, 1e7), xlabel="condition number kappa of y")
    ax.set_ylabel("oracle calls until the minimum")
    ax.legend(loc="upper right")
    ax.set_title(f"PerturbedAID, d = {D}, L = {L:g}. Marks: medians; bars: each seed; dashed: slope of the bound")
    save(figure, path)
