"""Robust low-rank matrix sensing: who leaves the rank-1 saddles, and at what cost, from where?

A minimax problem (``benchmarks.robust_sensing``) with U of shape (d, 3), whose columns after the first are zero at the
start ("exact"), which every gradient keeps, or N(0, s^2). PRGDA with the parameters of its paper, baselines tuned on
two seeds of their own at d = 50, and the fastest pair of estimator and rule that was found. All values of Phi, ratios
and eigenvalues are exact, off-line and not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks import robust_tables as tables
from benchmarks.experiments.study import Row, where
from benchmarks.robust_by_hand import speed
from benchmarks.robust_descent import BASELINES, BUILD, CURVATURE_TOL, GRAD_TOL, OURS, descend
from benchmarks.robust_sensing import RobustSensing, robust_sensing
from benchmarks.robust_tables import STATED, draw, tuned

SEEDS = 10
DIMENSIONS = (50, 75, 100)
GENERIC = (1e-3, 1e-6)
WIDER = {"SGDA": (1e-2, 3e-2, 1e-1, 3e-1), "AccMDA": (1e-2, 3e-2, 1e-1), "SREDA": (1e-2, 3e-2)}
OWN = [{"lr": lr, "lower_lr": lower} for lr in (0.01, 0.02, 0.03) for lower in (0.005, 0.01, 0.02)]
TUNING_SEEDS = (100, 101)
OWN_SEEDS = (*TUNING_SEEDS, 102, 103)  # of the fastest pair, whose runs are short
TRIED: dict[str, tuple[str, dict[str, Any]]] = {
    # name: (key of BUILD, options)
    "PRGDA, lr 0.003": ("PRGDA", {"lr": 3e-3}),
    "PRGDA, lr 0.005, eta_H 0.5": ("PRGDA", {"lr": 5e-3, "escape_lr": 0.5}),
    "PRGDA, lr 0.005, eta_H 0.5, K 3, S_2 20, t_thres 40": (
        "PRGDA",
        {"lr": 5e-3, "escape_lr": 0.5, "K": 3, "batch_size": 20, "escape_steps": 40},
    ),
    "full batch, perturbed momentum": ("full batch", {"optimizer": "SGD", "lr": 0.05}),
    "full batch, perturbed Adam": ("full batch", {"optimizer": "Adam", "lr": 0.03}),
    "PerturbedGDmax": ("PerturbedGDmax", {}),
    "CubicGDA": ("CubicGDA", {}),
}


def settings(rows: list[Row], seeds: int, smoke: bool) -> list[dict[str, Any]]:
    """Tuning first, then the runs at the tuned values, the most telling ones first; as many seeds as each needs."""
    known = _tuning_runs()
    few, some = range(min(seeds, 3)), range(min(seeds, 5))
    if smoke:
        known = [s for s in known if s["seed"] == 100 and s["options"].get("lr") in (3e-3, 0.02)]
    wanted = [_small(s) for s in known] if smoke else known
    best = {name: tuned(rows, name) for name in (*BASELINES, OURS)}
    if any(options is None for options in best.values()):
        return wanted
    options: dict[str, dict[str, Any]] = {"PRGDA": {}, **{name: own or {} for name, own in best.items()}}
    # Baselines from an exact start end where they are: fewer calls show it.
    exact = {"PRGDA": 2.4e6, OURS: 4e5, **dict.fromkeys(BASELINES, 4e5)}
    generic = {"PRGDA": 2.4e6, OURS: 4e5, **dict.fromkeys(BASELINES, 1e6)}

    def block(part: str, d: int, own: Sequence[int], budgets: dict[str, float], **more: Any) -> list[dict[str, Any]]:
        base = {"part": part, "d": d, "spread": 0.0, "target": 1e-3, **more}
        at = options if part == "unscaled" else {**options, OURS: scaled(options[OURS], d)}
        return [
            {**base, "name": name, "seed": seed, "budget": budget * d / 50, "options": at.get(name, {})}
            for seed in own
            for name, budget in budgets.items()
        ]

    later = block("exact", 50, some, exact)
    later += block("generic", 50, range(seeds), generic, spread=GENERIC[0], target=1e-2)
    later += [s for d in DIMENSIONS[1:] for s in block("exact", d, few, exact)]
    later += block("exact", 50, some, {"PerturbedGDmax": 3e6, "CubicGDA": 4e6})
    later += [
        {**s, "name": key, "label": label, "options": own}
        for label, (key, own) in TRIED.items()
        for s in block("tried", 50, few, {"": 1.6e6}, spread=GENERIC[0], target=1e-2)
    ]
    later += block("generic", 50, range(seeds), generic, spread=GENERIC[1], target=1e-2)
    later += [s for d in DIMENSIONS[1:] for s in block("exact", d, some[3:], exact)]
    for own in (few, range(3, seeds)):
        later += [s for d in DIMENSIONS[1:] for s in block("generic", d, own, generic, spread=GENERIC[0], target=1e-2)]
    for d in DIMENSIONS[1:]:
        later += block("unscaled", d, some, {OURS: 4e5})
        later += block("unscaled", d, few, {OURS: 4e5}, spread=GENERIC[0], target=1e-2)
        later += block("generic", d, range(seeds), generic, spread=GENERIC[1], target=1e-2)
    later += block("exact", 50, few, {"MCN": 2e7})
    for s in block("printed", 50, few, {"PRGDA": 8e5, **dict.fromkeys(BASELINES, 4e5), OURS: 4e5}, scale="printed"):
        later.append({**s, "options": in_units(s["name"], s["options"], s["d"])})
    adapted = in_units("PRGDA", {"grad_tol": GRAD_TOL, "escape_lr": 0.1}, 50)
    later += [{**s, "options": adapted} for s in block("printed, adapted", 50, few, {"PRGDA": 1.6e6}, scale="printed")]
    later += block("reading B", 50, few, {"PRGDA": 2.4e6, "SREDA": 4e5, OURS: 4e5}, reading="B")
    later += [{"part": "speed", "name": name, "d": 100, "seed": 0} for name in ("PRGDA", "SREDA")]
    if smoke:
        later = [_small(s) for s in later if s["seed"] == 0 and s["d"] == 50 or s["part"] == "speed"]
    return wanted + later


def _small(setting: dict[str, Any]) -> dict[str, Any]:
    return {**setting, "d": 10, "budget": min(setting.get("budget", 0), 4000)}


def _tuning_runs() -> list[dict[str, Any]]:
    base = {"part": "tuning", "d": 50, "spread": GENERIC[0], "target": 1e-3}
    grids = {name: [{"lr": lr} for lr in (*STATED, *WIDER[name])] for name in BASELINES}
    return [
        {**base, "name": name, "options": own, "seed": seed, "budget": 1e5 if name == OURS else 3e5}
        for name, grid in {OURS: OWN, **grids}.items()
        for own in grid
        for seed in (OWN_SEEDS if name == OURS else TUNING_SEEDS)
    ]


def scaled(options: dict[str, Any], d: int) -> dict[str, Any]:
    """Options for Adam on d rows, tuned for 50: the entries of U are of the size d^-1/2, and so are the steps."""
    return options if d == 50 else {**options, "lr": round(options["lr"] * (50 / d) ** 0.5, 4)}


def in_units(name: str, options: dict[str, Any], d: int) -> dict[str, Any]:
    """Options for A_i with entries N(0, 1), where f is about d times what it is for N(0, 1/d)."""
    if name == OURS:
        return {**options, "grad_tol": 0.2 * d}
    if name == "PRGDA" and options:
        return {"grad_tol": options["grad_tol"] * d, "escape_lr": options["escape_lr"] / d}
    return {"lr": options["lr"] / d} if name in ("SGDA", "AccMDA") else options


@lru_cache(maxsize=1)
def _data(seed: int, d: int, spread: float, scale: str, reading: str, device: str) -> RobustSensing:
    return robust_sensing(seed, d, spread=spread, scale=scale, reading=reading, device=device)


def run(setting: dict[str, Any], device: str) -> dict[str, Any]:
    """One descent, or the speed of one method."""
    if setting["part"] == "speed":
        return speed(setting["name"], setting["d"], 2 if "budget" in setting else 12, device)
    where_from = (setting["seed"], setting["d"], setting["spread"])
    data = _data(*where_from, setting.get("scale", "scaled"), setting.get("reading", "A"), device)
    method = BUILD[setting["name"]](data, setting["seed"], **setting["options"])
    return descend(method, data, setting["seed"], setting["budget"], setting["target"])


def report(rows: list[Row], folder: Path) -> str:
    """Tables of all parts, and six panels for either kind of start."""
    draw(rows, "exact", 0.0, folder / "robust_sensing_exact.png")
    draw(rows, "generic", GENERIC[0], folder / "robust_sensing_generic.png")
    cost = sum(r["calls"] for r in where(rows, part="tuning"))
    gamma = f"|grad Phi| <= {GRAD_TOL:g}, lambda_min >= -{CURVATURE_TOL:g}"
    parts = [
        (
            "**Smallest eigenvalue of hess Phi at the end**, from zero columns: mean +- standard deviation over the "
            "seeds (their number).",
            tables.eigenvalue_table(rows),
        ),
        (
            "**From zero columns**: ratio at the end and calls to a ratio of 0.001; median (range). *Beyond*: the "
            "largest entry, over the seeds, in the columns that started at zero.",
            tables.exact_table(rows),
        ),
        (
            "**From generic columns** N(0, s^2): calls to a ratio of 0.01, median (range).",
            tables.generic_table(rows),
        ),
        (
            "**Seed by seed** from generic columns: calls of a method over those of the last one on the same seed, and "
            "on how many seeds the last one needs fewer.",
            tables.paired_table(rows),
        ),
        (
            "**The same lr for all d**, in place of lr (50 / d)^(1/2), for the last of these methods.",
            tables.unscaled_table(rows),
        ),
        ("**What else was tried**, d = 50, s = 0.001: calls to a ratio of 0.01.", tables.tried_table(rows)),
        (
            f"**Claims**: tests passed, and what is true of the points (20 per run at most): {gamma}. *First*: runs "
            "whose first claim was a saddle, where the method would have stopped.",
            tables.claims_table(rows),
        ),
        (
            f"**Tuning**, d = 50, s = 0.001, seeds 100 and 101 (102, 103 too for the last), {cost:.2g} calls in all: "
            "calls to a ratio of 0.01, and Phi at the end, after 300,000 calls (100,000) or at a ratio of 0.001; of "
            "the worst seed.",
            tables.tuning_table(rows),
        ),
        (
            "**Data as printed** (entries of A_i N(0, 1)), d = 50, from zero columns.",
            tables.other_table(rows, "printed"),
        ),
        ("**Reading B** of the formula, d = 50, from zero columns.", tables.other_table(rows, "reading B")),
        (
            "**Milliseconds of processor time per step**, d = 100, batches of 40, one thread: ours, the same step by "
            "hand on gradients (1) by formula and (2) by autograd, and one such gradient (a step takes about ten).",
            tables.speed_table(rows),
        ),
    ]
    runs = [r for r in (row["result"] for row in rows) if "degenerate" in r]
    text = (
        f"Runs that end where a bound of y* has a multiplier within 1e-6 / n of zero, so that hess Phi jumps: "
        f"{sum(r['degenerate'] for r in runs)} of {len(runs)}. Runs that diverged: "
        f"{sum(row['result'].get('diverged', False) for row in rows)} of {len(rows)}."
    )
    return "\n\n".join([*(f"{title}\n\n{body}" for title, body in parts if body), text])
