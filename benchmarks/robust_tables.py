"""Tables and figures of the study of robust matrix sensing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np

from benchmarks.experiments.study import Row, median_range, table, where
from benchmarks.robust_descent import BASELINES, CURVATURE_TOL, DETERMINISTIC, METHODS, OURS
from examples.common import BLUE, GREEN, GREY, ORANGE, RED, panels, save

COLORS = dict(zip(METHODS, (BLUE, GREY, GREEN, RED, ORANGE), strict=True))
STATED = (1e-4, 3e-4, 1e-3, 3e-3)  # the grid that all baselines share
CLOSE, CLOSER = "0.01", "0.001"  # ratios


def score(rows: list[Row], name: str, options: dict[str, Any]) -> tuple[float, float]:
    """Calls to a ratio of 0.01, then Phi at the end, of the worst seed."""
    own = where(rows, part="tuning", name=name, options=options)
    calls = [r["reached"][CLOSE] or math.inf for r in own]
    values = [math.inf if r["diverged"] else r["phi"] for r in own]
    return (max(calls), max(values)) if own else (math.inf, math.inf)


def tuned(rows: list[Row], name: str, grid: Sequence[float] | None = None) -> dict[str, Any] | None:
    """The best options of the tuning runs, by ``score``; with a grid, of those whose lr is in it."""
    known = [row["setting"]["options"] for row in rows if _is(row, part="tuning", name=name)]
    known = [options for options in known if grid is None or options["lr"] in grid]
    return min(known, key=lambda options: score(rows, name, options), default=None)


def _is(row: Row, **setting: Any) -> bool:
    return all(row["setting"].get(key) == value for key, value in setting.items())


def _sound(own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in own if not r["diverged"]]


def _names(rows: list[Row], part: str) -> list[str]:
    known = {row["setting"]["name"] for row in rows if _is(row, part=part)}
    return [name for name in (*METHODS, *DETERMINISTIC) if name in known]


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{fmean(values):.4f} +- {stdev(values) if len(values) > 1 else 0:.4f} ({len(values)})"


def eigenvalue_table(rows: list[Row]) -> str:
    """Table 3 of the paper."""
    ds = sorted({row["setting"]["d"] for row in rows if _is(row, part="exact")})
    lines = [
        [name, *(_spread([r["lambda_min"] for r in _sound(where(rows, part="exact", name=name, d=d))]) for d in ds)]
        for name in _names(rows, "exact")
    ]
    return table(["", *(f"d = {d}" for d in ds)], lines) if lines else ""


def exact_table(rows: list[Row]) -> str:
    """How close they come."""
    lines = []
    for d in sorted({row["setting"]["d"] for row in rows if _is(row, part="exact")}):
        for name in _names(rows, "exact"):
            if own := where(rows, part="exact", name=name, d=d):
                calls, beyond = (
                    [r["reached"][CLOSER] for r in own],
                    max((r["beyond"] for r in _sound(own)), default=0.0),
                )
                ratios = median_range([r["ratio"] for r in _sound(own)], ".2g")
                total = median_range([r["calls"] for r in own])
                lines.append([f"{d}, {name}", ratios, median_range(calls), f"{beyond:.2g}", total])
    return table(["d, method", "ratio", "calls to 0.001", "beyond", "calls in all"], lines) if lines else ""


def generic_table(rows: list[Row]) -> str:
    """Calls from generic starts."""
    known = {(row["setting"]["d"], row["setting"]["spread"]) for row in rows if _is(row, part="generic")}
    cases = sorted(known, key=lambda case: (-case[1], case[0]))
    lines = []
    for d, s in cases:
        own = {name: where(rows, part="generic", name=name, d=d, spread=s) for name in METHODS}
        calls = {name: [r["reached"][CLOSE] for r in group] for name, group in own.items()}
        middle = {name: median([c or math.inf for c in group]) for name, group in calls.items() if group}
        share = middle["PRGDA"] / middle[OURS] if {"PRGDA", OURS} <= middle.keys() else math.nan
        seeds = f"{max(map(len, calls.values()))}"
        cells = [median_range(calls[name]) for name in METHODS]
        lines.append([f"{d}, {s:g}", seeds, *cells, f"{share:.0f}" if math.isfinite(share) else "-"])
    return table(["d, s", "seeds", *METHODS, "PRGDA over the last"], lines) if lines else ""


def paired_table(rows: list[Row]) -> str:
    """Calls as multiples of those of our pair on the same seed."""
    calls: dict[tuple[int, float], dict[str, dict[int, float]]] = {}
    for row in rows:
        if _is(row, part="generic"):
            own = row["setting"]
            case = calls.setdefault((own["d"], own["spread"]), {name: {} for name in METHODS})
            case[own["name"]][own["seed"]] = row["result"]["reached"][CLOSE] or math.inf
    lines = []
    for (d, s), case in sorted(calls.items(), key=lambda item: (-item[0][1], item[0][0])):
        cells = []
        for name in METHODS[:-1]:
            pairs = [(case[name][seed], least) for seed, least in case[OURS].items() if seed in case[name]]
            multiples = [a / b if math.isfinite(a) else None for a, b in pairs if math.isfinite(b)]
            fewer = sum(b < a for a, b in pairs)
            cells.append(f"{median_range(multiples, '.1f')}; {fewer} of {len(pairs)}")
        lines.append([f"{d}, {s:g}", *cells])
    return table(["d, s", *METHODS[:-1]], lines) if lines else ""


def unscaled_table(rows: list[Row]) -> str:
    """Our pair with the lr of d = 50 in larger problems."""
    lines = []
    for d, s in sorted({(row["setting"]["d"], row["setting"]["spread"]) for row in rows if _is(row, part="unscaled")}):
        own = where(rows, part="unscaled", d=d, spread=s)
        calls = [r["reached"][CLOSER if s == 0 else CLOSE] for r in own]
        failed = f"{sum(c is None for c in calls)} of {len(own)}"
        lines.append([f"{d}, {s:g}", CLOSER if s == 0 else CLOSE, median_range(calls), failed])
    return table(["d, s", "ratio", "calls", "runs that do not get there"], lines) if lines else ""


def tried_table(rows: list[Row]) -> str:
    """Other pairs."""
    lines = []
    for label in dict.fromkeys(row["setting"]["label"] for row in rows if _is(row, part="tried")):
        if own := where(rows, part="tried", label=label):
            lines.append(
                [
                    label,
                    median_range([r["reached"][CLOSE] for r in own]),
                    median_range([r["ratio"] for r in _sound(own)], ".2g"),
                    f"{sum(r['diverged'] for r in own)} of {len(own)}",
                ]
            )
    return table(["", "calls to 0.01", "ratio at the end", "diverged"], lines) if lines else ""


def claims_table(rows: list[Row]) -> str:
    """What the methods' own tests are worth."""
    lines = []
    for part in ("exact", "generic"):
        for name in _names(rows, part):
            for d in sorted({row["setting"]["d"] for row in rows if _is(row, part=part)}):
                own = [r for r in _sound(where(rows, part=part, name=name, d=d)) if r["claims"]]
                if not own:
                    continue
                seen = sum(r["examined"] for r in own)
                line = [f"{part}, {d}, {name}", f"{sum(r['claims'] for r in own)}", f"{seen}"]
                line += [f"{sum(r[key] for r in own) / seen:.0%}" for key in ("saddles", "steep")]
                first = [r["first_claim"] for r in own]
                line.append(f"{sum(value < -CURVATURE_TOL for value in first)} of {len(own)}")
                lines.append([*line, median_range(first, ".2g")])
    header = ["start, d, method", "claims", "looked at", "saddles", "|grad Phi| > tol", "first", "its lambda_min"]
    return table(header, lines) if lines else ""


def tuning_table(rows: list[Row]) -> str:
    """The grids."""
    lines = []
    for name in (*BASELINES, OURS):
        seen: list[Any] = []
        for row in rows:
            options = row["setting"].get("options")
            if not _is(row, part="tuning", name=name) or options in seen:
                continue
            seen.append(options)
            calls, value = score(rows, name, options)
            inside = name == OURS or options["lr"] in STATED
            text = ", ".join(f"{key} {number:g}" for key, number in options.items())
            mark = " *" if options == tuned(rows, name) else ""
            mark += " (best of the stated grid)" if options == tuned(rows, name, STATED) and inside and not mark else ""
            lines.append(
                [
                    f"{name}, {text}{mark}",
                    f"{calls:,.0f}" if math.isfinite(calls) else "never",
                    f"{value:.2g}" if math.isfinite(value) else "diverged",
                ]
            )
    return table(["method (* chosen)", "calls to 0.01", "Phi at the end"], lines) if lines else ""


def other_table(rows: list[Row], part: str) -> str:
    """Other data, other reading."""
    lines = []
    for kind in (part, f"{part}, adapted"):
        for name in _names(rows, kind):
            own = where(rows, part=kind, name=name)
            label = name if kind == part else f"{name}, epsilon d, eta_H / d"
            sound = _sound(own)
            line = [
                label,
                median_range([r["ratio"] for r in sound], ".2g"),
                median_range([r["phi"] for r in sound], ".2g"),
            ]
            line += [median_range([r["lambda_min"] for r in sound], ".2g"), median_range([r["calls"] for r in own])]
            lines.append([*line, f"{sum(r['displacements'] for r in own)}", f"{sum(r['diverged'] for r in own)}"])
    header = ["", "ratio", "Phi", "lambda_min", "calls", "displacements", "diverged"]
    return table(header, lines) if lines else ""


def speed_table(rows: list[Row]) -> str:
    """Ours against by hand."""
    lines = []
    for row in rows:
        if _is(row, part="speed"):
            for storage, own in row["result"].items():
                keys = (
                    "ours",
                    "by hand",
                    "ratio",
                    "by hand, autograd",
                    "ratio to autograd",
                    "gradient by hand",
                    "gradient",
                )
                lines.append([f"{row['setting']['name']}, {storage}", *(f"{own[key]:.3g}" for key in keys)])
    header = [
        "method, A_i stored as",
        "ours",
        "(1) bare",
        "ratio",
        "(2) autograd",
        "ratio",
        "gradient (1)",
        "gradient (2)",
    ]
    return table(header, lines) if lines else ""


def draw(rows: list[Row], part: str, spread: float, path: Path) -> None:
    """Phi and ratio against calls, a column for each d: medians and 10-90 % bands."""
    ds = sorted({row["setting"]["d"] for row in rows if _is(row, part=part, spread=spread)})
    if not ds:
        return
    quantities = {"Phi(U)": 1, "ratio": 2}
    figure, axes = panels([[f"{name}, {d}" for d in ds] for name in quantities], (4.6 * len(ds), 7.2))
    for name, column in quantities.items():
        for d in ds:
            ax = axes[f"{name}, {d}"]
            for method in METHODS:
                own = [r for r in where(rows, part=part, name=method, d=d, spread=spread) if len(r["curve"]) == 3]
                if not own:
                    continue
                grid, values = curves(own, column)
                low, middle, high = np.quantile(values, (0.1, 0.5, 0.9), axis=0)
                ax.plot(grid, middle, color=COLORS[method], lw=1.8, label=method)
                ax.fill_between(grid, low, high, color=COLORS[method], alpha=0.15, lw=0)
            ax.set(xscale="log", yscale="log", title=f"d = {d}")
            ax.set_ylim(top=10)  # runs that diverge leave the picture
            if d == ds[0]:
                ax.set_ylabel("Phi(U)" if column == 1 else "|U U' - M|^2 / |M|^2")
            if column == 2:
                ax.axhline(1e-3 if part == "exact" else 1e-2, color=GREY, lw=0.8, ls=":")
                ax.set_xlabel("oracle calls (gradients on one sample)")
    axes[f"ratio, {ds[0]}"].legend(loc="lower left", fontsize=8.5)
    start = "zero columns" if part == "exact" else f"columns N(0, {spread:g}^2)"
    message = (
        "only methods with displacements leave the rank-1 matrices"
        if part == "exact"
        else "no column is a trap, and prices differ widely"
    )
    figure.suptitle(f"Start with {start}: {message} (medians, 10-90 % bands)", x=0.01, ha="left", weight="bold")
    save(figure, path)


def curves(own: list[dict[str, Any]], column: int) -> tuple[Any, Any]:
    """The curves of several runs on one grid of calls; a run that has ended stays where it was."""
    ends = [r["curve"][0][-1] for r in own]
    grid = np.geomspace(max(r["curve"][0][0] for r in own), max(ends), 200)
    values = [np.exp(np.interp(np.log(grid), np.log(r["curve"][0]), np.log(r["curve"][column]))) for r in own]
    return grid, np.array(values)
