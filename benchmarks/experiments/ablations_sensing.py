"""What does robust matrix sensing depend on: displacements, pull-back, noise, batches, anchors, inner steps, columns?

d = 30, data scaled. PRGDA has the parameters of its paper but for steps of the length 0.003, three times as long, which
spares two thirds of the calls. Starts have columns after the first that are zero ("exact") or N(0, 1e-12) ("generic").
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.experiments.study import Row, median_range, table, where
from benchmarks.robust_descent import BUILD, CURVATURE_TOL, OURS, descend
from benchmarks.robust_sensing import robust_sensing

SEEDS = 5
D, STEP, BUDGET = 30, 3e-3, 8e5
EXACT, GENERIC = 0.0, 1e-6
BASE: dict[str, Any] = {"lr": STEP}
RADIUS, WAIT, PERIOD, K = 0.01, 20, 25, 5  # as printed
MOVEMENTS = {"infinity": math.inf, "0.01, as printed": 0.01, "1e-4, the default": 1e-4, "1e-6": 1e-6}
RATES = {"0.1, as printed": 0.1, "eta / epsilon": STEP / 0.1, "1": 1.0}
NOISE = (0.0, 0.01, 0.1, 0.5)
SIZES = (10, 40, 160, 600)
STEPS = {"SGDA": 0.03, "AccMDA": 0.01, "SREDA": STEP}


def settings(rows: list[Row], seeds: int, smoke: bool) -> list[dict[str, Any]]:
    """All parts, those that the claims of the paper hang on first."""

    def cell(part: str, name: str = "PRGDA", spread: float = EXACT, **options: Any) -> list[dict[str, Any]]:
        own = {**BASE, **options} if name == "PRGDA" else options
        base = {"part": part, "name": name, "spread": spread, "options": own, "budget": BUDGET, "target": 1e-2}
        return [{**base, "seed": seed} for seed in range(seeds)]

    wanted = []
    for spread in (EXACT, GENERIC):
        for name in ("PRGDA", OURS):
            for radius in (0.0, RADIUS):
                wanted += cell("A1", name, spread, radius=radius)
    for wait in (5, WAIT, 80):
        for radius in (1e-3, RADIUS, 1e-1):
            wanted += cell("A9", radius=radius, escape_steps=wait)
    for label in MOVEMENTS:
        wanted += [{**s, "movement": label} for s in cell("A2")]
    for rate in RATES.values():
        wanted += cell("A2", escape_lr=rate)
    for period in (5, PERIOD, 100):
        for printed in (False, True):
            wanted += cell("A7", period=period, as_printed=printed)
    wanted += cell("A8", selects="last", K=K)
    for steps in (2, K, 10):
        wanted += cell("A8", selects="argmin", K=steps)
    for name, spread, options in (
        ("PRGDA", EXACT, {}),
        ("PRGDA", GENERIC, {}),
        ("SREDA", EXACT, {"lr": STEP}),
        ("SREDA", GENERIC, {"lr": STEP}),
        (OURS, EXACT, {}),
        (OURS, GENERIC, {}),
    ):
        wanted += [{**s, "columns": 5} for s in cell("A11", name, spread, **options)]
    wanted += [{**s, "noise": noise, "target": None} for noise in NOISE for s in cell("A3")]
    for name, lr in STEPS.items():
        for size in SIZES:
            wanted += [{**s, "target": 0.1} for s in cell("A5", name, GENERIC, lr=lr, batch_size=size)]
    if smoke:
        short = {"d": 8, "budget": 2500}
        wanted = [{**s, **short} for s in wanted if s["seed"] == 0 and s["options"].get("batch_size", 40) >= 40]
    return wanted


def run(setting: dict[str, Any], device: str) -> dict[str, Any]:
    """One descent."""
    seed, d = setting["seed"], setting.get("d", D)
    data = robust_sensing(
        seed,
        d,
        spread=setting["spread"],
        noise=setting.get("noise", 0.0),
        columns=setting.get("columns", 3),
        device=device,
    )
    options = dict(setting["options"])
    if "movement" in setting:
        options["mean_movement"] = MOVEMENTS[setting["movement"]]
    return descend(BUILD[setting["name"]](data, seed, **options), data, seed, setting["budget"], setting["target"])


def report(rows: list[Row], folder: Path) -> str:
    """A table for each part."""
    parts = [
        ("**A1, no displacements.**", start_table(rows)),
        (
            f"**A9, claims** of PRGDA from an exact start: those whose point has lambda_min < -{CURVATURE_TOL:g}, of "
            "20 per run at most, and of the first claims, at which a run would have stopped.",
            claim_table(rows),
        ),
        ("**A2, pull-back** of PRGDA from an exact start.", pull_table(rows)),
        ("**A7, anchors** of PRGDA from an exact start: corrected, or as printed.", anchor_table(rows)),
        (
            "**A8, inner steps** of PRGDA from an exact start. K = 1 never moves y and is refused. The least move of "
            "y is the last one, since f_yy = -c on every sample: the two ways to take y are one.",
            inner_table(rows),
        ),
        ("**A11, five columns** for a matrix of rank three.", column_table(rows)),
        (
            f"**A3, noise of b**, PRGDA from an exact start, after {BUDGET:,.0f} calls; in units of those of A_i, "
            "of which <A_i, M> has a deviation of about 1.7.",
            noise_table(rows),
        ),
        (
            "**A5, batches as perturbations**, from generic starts: calls, and steps, to a ratio of 0.1.",
            batch_table(rows),
        ),
    ]
    return "\n\n".join(f"{title}\n\n{body}" for title, body in parts if body)


def outcome(own: list[dict[str, Any]]) -> list[str]:
    """Calls to a ratio of 0.01, the ratio and the smallest eigenvalue at the end."""
    sound = [r for r in own if not r["diverged"]]
    lost = len(own) - len(sound)
    ratio = median_range([r["ratio"] for r in sound], ".2g") + (f"; {lost} diverged" if lost else "")
    calls = median_range([r["reached"]["0.01"] for r in own])
    return [calls, ratio, median_range([r["lambda_min"] for r in sound], ".2g")]


OUTCOME = ("calls to 0.01", "ratio at the end", "lambda_min at the end")


def false_share(own: list[dict[str, Any]]) -> str:
    """Claims at saddles, of those that were looked at."""
    seen = sum(r.get("examined", 0) for r in own)
    return f"{sum(r.get('saddles', 0) for r in own)} of {seen}"


def false_first(own: list[dict[str, Any]]) -> str:
    """Runs whose first claim is a saddle."""
    first = [r["first_claim"] for r in own if r.get("first_claim") is not None]
    return f"{sum(value < -CURVATURE_TOL for value in first)} of {len(first)}"


def _part(rows: list[Row], part: str, name: str = "PRGDA", **options: Any) -> list[dict[str, Any]]:
    """The results of a part whose options have these values."""
    own = [row for row in rows if row["setting"]["part"] == part and row["setting"]["name"] == name]
    return [r["result"] for r in own if all(r["setting"]["options"].get(key) == v for key, v in options.items())]


def start_table(rows: list[Row]) -> str:
    """A1."""
    lines = []
    for label, spread in (("exact", EXACT), ("generic", GENERIC)):
        for name in ("PRGDA", OURS):
            for radius in (0.0, RADIUS):
                own = [
                    row["result"]
                    for row in rows
                    if row["setting"]["part"] == "A1"
                    and (row["setting"]["name"], row["setting"]["spread"]) == (name, spread)
                    and row["setting"]["options"]["radius"] == radius
                ]
                beyond = max((r.get("beyond", 0.0) for r in own), default=0.0)
                lines.append([f"{label}, {name}, r = {radius:g}", *outcome(own), f"{beyond:.1g}"])
    return table(["start, method, radius", *OUTCOME, "largest entry after the first column"], lines)


def claim_table(rows: list[Row]) -> str:
    """A9."""
    lines = []
    for wait in (5, WAIT, 80):
        for radius in (1e-3, RADIUS, 1e-1):
            own = _part(rows, "A9", radius=radius, escape_steps=wait)
            claims = median_range([r["claims"] for r in own])
            line = [f"{wait}, {radius:g}", claims, false_share(own), false_first(own), outcome(own)[0]]
            lines.append(line)
    return table(["t_thres, r", "claims per run", "false", "first false", "calls to 0.01"], lines)


def pull_table(rows: list[Row]) -> str:
    """A2."""
    groups = {f"D = {label}": where(rows, part="A2", movement=label) for label in MOVEMENTS}
    groups |= {f"eta_H = {label}": _part(rows, "A2", escape_lr=rate) for label, rate in RATES.items()}
    lines = [
        [
            label,
            median_range([r["displacements"] for r in own]),
            median_range([r["escaped"] for r in own]),
            median_range([r["claims"] for r in own]),
            false_first(own),
            *outcome(own)[:2],
        ]
        for label, own in groups.items()
    ]
    return table(["", "displacements", "pulled back", "claims", "first false", *OUTCOME[:2]], lines)


def anchor_table(rows: list[Row]) -> str:
    """A7."""
    lines = [
        [f"{period}, {'as printed' if printed else 'corrected'}", *outcome(own)]
        for period in (5, PERIOD, 100)
        for printed in (False, True)
        if (own := _part(rows, "A7", period=period, as_printed=printed))
    ]
    return table(["q, anchors", *OUTCOME], lines)


def inner_table(rows: list[Row]) -> str:
    """A8."""
    lines = [
        [f"{steps}, {selects}", *outcome(own)]
        for steps in (2, K, 10)
        for selects in ("argmin", "last")
        if (own := _part(rows, "A8", K=steps, selects=selects))
    ]
    return table(["K, y taken", *OUTCOME], lines)


def column_table(rows: list[Row]) -> str:
    """A11."""
    lines = []
    for label, spread in (("exact", EXACT), ("generic", GENERIC)):
        for name in ("PRGDA", "SREDA", OURS):
            if own := where(rows, part="A11", name=name, spread=spread):
                lines.append([f"{label}, {name}", *outcome(own)])
    return table(["start, method", *OUTCOME], lines)


def noise_table(rows: list[Row]) -> str:
    """A3."""
    lines = []
    for noise in NOISE:
        if own := [r for r in where(rows, part="A3", noise=noise) if not r["diverged"]]:
            quantities = (("reached", ",.0f"), ("ratio", ".2g"), ("phi", ".2g"), ("lambda_min", ".2g"))
            cells = [
                median_range([r[key]["0.1"] if key == "reached" else r[key] for r in own], form)
                for key, form in quantities
            ]
            lines.append([f"{noise:g}", *cells, median_range([r["claims"] for r in own])])
    return table(["noise", "calls to 0.1", "ratio", "Phi", "lambda_min", "claims"], lines)


def batch_table(rows: list[Row]) -> str:
    """A5."""
    lines = []
    for name, lr in STEPS.items():
        for size in SIZES:
            if own := _part(rows, "A5", name, batch_size=size):
                steps = [r["steps"] if r["reached"]["0.1"] else None for r in own]
                calls = median_range([r["reached"]["0.1"] for r in own])
                lines.append(
                    [f"{name}, lr {lr:g}, {size}", calls, median_range(steps), f"{sum(r['diverged'] for r in own)}"]
                )
    return table(["method, batch", "calls to 0.1", "steps to 0.1", "diverged"], lines)
