"""Hyper-representation learning in matrix sensing (bilevel): who leaves the saddle, and what does it cost?

The last column of U is the lower variable, the others are the upper ones (``benchmarks.representation``). Oracle calls
are samples of all gradients of f and g and of all products with g_yy and g_xy. A run ends at a distance ratio |U U' -
M|^2 / |M|^2 of 1e-2, at its budget, or where it diverges. Step sizes of the baselines are chosen on other seeds: a grid
of ``lr`` that goes on upwards while the best value is its last, then that value and 3 times it, at two depths.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import torchbilevel as tb
from benchmarks.bands import draw, spread
from benchmarks.experiments.study import Row, median_range, rounded, table, thin, where
from benchmarks.representation import Representation, representation
from examples.common import BLUE, GREEN, GREY, ORANGE, RED, panels, save
from torchbilevel.decay import Decay
from torchbilevel.draws import BatchSizes
from torchbilevel.estimators.soba import Soba
from torchbilevel.tensors import Tensors

SEEDS = 10
TARGET = 1e-2
GRID = (1e-4, 3e-4, 1e-3, 3e-3)  # goes on with 3e-2, 3e-1, ... while its last value is the best
DEPTHS = (2, 5)  # Q, and K of StocBiO and VRBO
SCAN_SEEDS, CHOICE_SEEDS = (1000, 1001), (1000, 1001, 1002)
BUDGET = 150_000  # of most runs
BATCH = 40  # S2 and all other small batches of the paper's method and the baselines
RATE = 4.0  # lambda and alpha of all but the printed parameters: 1 / L of g_yy on 40 samples, with data scaled
GRAD_TOL = 0.03  # of PRGDA, which its paper leaves open
CURVATURE_TOL = 0.01  # of certificates: a tenth of what the saddles have
MRBO_DECAY = Decay(power=1 / 3, offset=100)

Build = Callable[[Any, float, int, float], tb.Method]


def stocbio(problem: Any, lr: float, depth: int, unit: float) -> tb.Method:
    """K = Q = depth."""
    return tb.StocBiO(
        problem, unit * lr, lower_solver=tb.GD(unit * RATE, depth), linear_solver=tb.Neumann(depth, unit * RATE),
        batch_size=BATCH, lower_batch_size=BATCH,
    )  # fmt: skip


def ineon(problem: Any, lr: float, depth: int, unit: float) -> tb.Method:
    """As StocBiO; |v| has a deviation of about 0.08 at the first saddle, and one that falls with the loss later."""
    return tb.StocBiOiNEON(
        problem, unit * lr, grad_tol=0.02 / unit, curvature_tol=0.02 / unit, radius=1e-2, probe_lr=unit,
        search_steps=50, step_length=0.1, lower_solver=tb.GD(unit * RATE, depth),
        linear_solver=tb.Neumann(depth, unit * RATE), batch_size=BATCH, lower_batch_size=BATCH,
    )  # fmt: skip


def mrbo(problem: Any, lr: float, depth: int, unit: float) -> tb.Method:
    """Q = depth."""
    return tb.MRBO(
        problem, unit * lr, weight=0.5, decay=MRBO_DECAY, lower_solver=tb.GD(unit * RATE, 1),
        linear_solver=tb.Neumann(depth, unit * RATE), batch_size=BATCH, lower_batch_size=BATCH,
    )  # fmt: skip


def vrbo(problem: Any, lr: float, depth: int, unit: float) -> tb.Method:
    """K = Q = depth, anchors on all data."""
    return tb.VRBO(
        problem, unit * lr, period=25, lower_solver=tb.GD(unit * RATE, depth),
        linear_solver=tb.Neumann(depth, unit * RATE), batch_size=BATCH, lower_batch_size=BATCH,
    )  # fmt: skip


def prgda(kind: str) -> Build:
    """The paper's method: as printed, as printed but for a lower level that can follow, and with steps of our own."""

    def build(problem: Any, lr: float, depth: int, unit: float) -> tb.Method:
        common: dict[str, Any] = {"radius": 1e-2, "selects": "argmin" if kind == "printed" else "last"}
        if kind == "tuned":  # eta = eta_H epsilon and D = eta^2, as in theory
            return tb.PRGDA(
                problem, 0.2, escape_lr=3 * unit, grad_tol=0.2 / (3 * unit), escape_steps=50, mean_movement=0.04,
                period=10, lower_solver=tb.GD(unit * RATE, 2), linear_solver=tb.Neumann(2, unit * RATE), batch_size=30,
                lower_batch_size=30, **common,
            )  # fmt: skip
        steps, rate = (20, 0.1) if kind == "printed" else (5, unit * RATE)
        return tb.PRGDA(
            problem, 1e-3, escape_lr=0.1, grad_tol=GRAD_TOL / unit, escape_steps=20, mean_movement=1e-2, period=25,
            lower_solver=tb.GD(0.01 if kind == "printed" else rate, 5), linear_solver=tb.Neumann(steps, rate),
            batch_size=BATCH, lower_batch_size=BATCH, **common,
        )  # fmt: skip

    return build


def soba(rule: str) -> Build:
    """Single-loop directions, without decay, under a rule that SOBA's paper does not have."""

    def build(problem: Any, lr: float, depth: int, unit: float) -> tb.Method:
        x = problem.upper_parameters
        size, rate, moves = {
            "perturbed": (30, 3.0, lambda: tb.optim.PerturbedGD(x, 1.5 * unit, radius=1e-2, grad_tol=0.05 / unit)),
            "normalised": (40, 6.0, lambda: tb.optim.NormalizedGD(x, 0.1, max_rate=4.0 * unit)),
            "pull-back": (30, 4.0, lambda: pull_back(x, 0.2, 3.0 * unit)),
        }[rule]
        sizes = BatchSizes(size, size, reuse_batch=True)
        return tb.Method(problem, Soba(tb.GD(rate * unit, 1), batch_sizes=sizes), moves())

    return build


def pull_back(x: Tensors, lr: float, escape_lr: float) -> tb.optim.Pullback:
    """With eta = eta_H epsilon and D = eta^2, as in theory: gradient descent whose steps are cut at eta, displaced."""
    return tb.optim.Pullback(
        x, lr, escape_lr, radius=1e-2, grad_tol=lr / escape_lr, escape_steps=50, mean_movement=lr**2
    )


def saba(problem: Any, lr: float, depth: int, unit: float) -> tb.Method:
    """On blocks of 40."""
    return tb.SABA(problem, 2.0 * unit, lower_solver=tb.GD(4.0 * unit, 1), batch_size=40, lower_batch_size=40)


def aid(problem: Any, lr: float, depth: int, unit: float) -> tb.Method:
    """On all data in every step."""
    return tb.PerturbedAID(
        problem, 4.0 * unit, radius=1e-2, grad_tol=0.01 / unit, lower_solver=tb.GD(8.0 * unit, 2),
        linear_solver=tb.CG(max_iter=3),
    )  # fmt: skip


def cubic(problem: Any, lr: float, depth: int, unit: float) -> tb.Method:
    """On all data in every step."""
    estimator = tb.Implicit(tb.GD(RATE * unit, 20), tb.CG(max_iter=20, tol=1e-4))
    rule = tb.optim.CubicNewton(
        problem.upper_parameters, cubic=0.3 / unit, grad_tol=1e-3 / unit, curvature_tol=CURVATURE_TOL / unit,
        max_basis=20,
    )  # fmt: skip
    return tb.Method(problem, estimator, rule)


BASELINES: dict[str, Build] = {"StocBiO": stocbio, "MRBO": mrbo, "VRBO": vrbo, "StocBiOiNEON": ineon}
PRINTED, FOLLOWS, TUNED = "PRGDA, printed", "PRGDA, y follows", "PRGDA, tuned"
OURS, CUBIC = "SOBA + Pullback", "AID + CubicNewton"
OTHERS: dict[str, Build] = {
    PRINTED: prgda("printed"),
    FOLLOWS: prgda("follows"),
    TUNED: prgda("tuned"),
    OURS: soba("pull-back"),
    "SOBA + PerturbedGD": soba("perturbed"),
    "SOBA + NormalizedGD": soba("normalised"),
    "SABA": saba,
    "PerturbedAID": aid,
    CUBIC: cubic,
}
METHODS = {**BASELINES, **OTHERS}
CANDIDATES = ("SOBA + PerturbedGD", "SOBA + NormalizedGD", "SABA", "PerturbedAID")


# --- runs -------------------------------------------------------------------------------------------------------------


def settings(rows: list[Row], seeds: int, smoke: bool) -> list[dict[str, Any]]:
    """The scan of ``lr``, the choice among neighbours, and the runs that are compared, the most important first."""
    base = {"d": 30 if smoke else 50, "noise": 1e-3, "scaled": True, "swap": False, "length": 1e-2}
    base |= {"budget": 6000 if smoke else BUDGET}
    if smoke:
        chosen = dict.fromkeys(BASELINES, (3.0, 5))
        return [
            run
            for noise in (1e-3, 0.0)
            for name in METHODS
            for run in _runs({**base, "noise": noise}, "main", name, [chosen.get(name, (0.0, 0))], [0])
        ]
    wanted: list[dict[str, Any]] = []
    best: dict[str, tuple[float, int]] = {}
    for name in BASELINES:
        grid, top = list(GRID), None
        while top is None or (top[0] == grid[-1] and top[0] < 20):
            grid += [] if top is None else [float(f"{10 * grid[-1]:.3g}")]
            scan = [(lr, 5) for lr in grid]
            top = _best(rows, "scan", name, scan, len(SCAN_SEEDS))
            if top is None:
                break
        low, high = scan[: len(GRID)], scan[len(GRID) :]
        wanted += _runs({**base, "budget": 300_000}, "scan", name, low, SCAN_SEEDS)
        wanted += _runs({**base, "budget": 100_000}, "scan", name, high, SCAN_SEEDS)
        if top is None:
            continue
        pairs = [(float(f"{top[0] * factor:.1g}"), depth) for factor in (1, 3) for depth in DEPTHS]
        wanted += _runs(base, "choice", name, pairs, CHOICE_SEEDS)
        chosen_pair = _best(rows, "choice", name, pairs, len(CHOICE_SEEDS))
        if chosen_pair is not None:
            best[name] = chosen_pair
    return wanted + (compared(base, best, seeds) if len(best) == len(BASELINES) else [])


def compared(base: dict[str, Any], best: dict[str, tuple[float, int]], seeds: int) -> list[dict[str, Any]]:
    """The runs at the values chosen."""
    few, least = range(min(seeds, 5)), range(min(seeds, 2))

    def runs(names: Iterable[str], over: Iterable[int], **change: Any) -> list[dict[str, Any]]:
        setting = {**base, **change}
        return [r for name in names for r in _runs(setting, "main", name, [best.get(name, (0.0, 0))], over)]

    names = (*BASELINES, TUNED, OURS)
    slow, some = {"budget": 600_000}, range(min(seeds, 3))
    wanted = runs(names, some) + runs(names, least, noise=0.0) + runs([PRINTED], [0], **slow)
    wanted += runs([OURS, TUNED, "StocBiO"], range(3, seeds)) + runs(names, some, noise=1e-6)
    wanted += runs([PRINTED], [0], noise=0.0, **slow)
    wanted += runs([*names, PRINTED], [0], length=0.0, budget=10_000) + runs(CANDIDATES, few)
    for d, budget in ((100, 400_000), (75, 300_000)):
        wanted += runs([OURS], few, d=d, noise=0.0, budget=budget) + runs([OURS, "StocBiO"], few, d=d, budget=budget)
        wanted += runs(names, some, d=d, budget=budget) + runs(names, [0], d=d, noise=0.0) + runs([PRINTED], [0], d=d)
    wanted += runs(names, range(3, seeds)) + runs(names, range(2, len(few)), noise=0.0)
    wanted += runs(names, range(3, seeds), noise=1e-6) + runs(CANDIDATES, few, noise=0.0)
    wanted += runs([FOLLOWS], least, budget=3_000_000) + runs([PRINTED], least, scaled=False, **slow)
    for d, budget in ((100, 400_000), (75, 300_000)):
        wanted += runs(names, few, d=d, budget=budget) + runs([PRINTED], [0], d=d, noise=0.0)
    wanted += runs(names, few, swap=True) + runs([CUBIC], least, budget=2_000_000)
    wanted += runs([PRINTED], few, **slow) + runs([PRINTED], least, noise=0.0, **slow)
    return list({str(setting): setting for setting in wanted}.values())


def _runs(
    base: dict[str, Any], stage: str, name: str, pairs: Iterable[tuple[float, int]], seeds: Iterable[int]
) -> list[dict[str, Any]]:
    return [
        {"stage": stage, "method": name, "lr": lr, "depth": depth, **base, "seed": seed}
        for lr, depth in pairs
        for seed in seeds
    ]


def _best(
    rows: list[Row], stage: str, name: str, pairs: list[tuple[float, int]], seeds: int
) -> tuple[float, int] | None:
    """The pair with the fewest failures, then the least median of calls, then of the last ratio; None if not run."""
    scores = []
    for lr, depth in pairs:
        results = where(rows, stage=stage, method=name, lr=lr, depth=depth)
        if len(results) < seeds:
            return None
        calls = [float("inf") if r["calls"] is None else r["calls"] for r in results]
        ratios = [float("inf") if r["ratio"] is None else r["ratio"] for r in results]
        scores.append((calls.count(float("inf")), median(calls), median(ratios), (lr, depth)))
    return min(scores)[-1]


@lru_cache(maxsize=4)
def _data(seed: int, d: int, scaled: bool, swap: bool, device: str) -> Representation:
    return representation(seed, d, scaled=scaled, swap=swap, device=device)


def run(setting: dict[str, Any], device: str) -> dict[str, Any]:
    """One run, judged off-line."""
    seed, d = setting["seed"], setting["d"]
    data = _data(seed, d, setting["scaled"], setting["swap"], device)
    problem = data.problem(seed, setting["noise"], setting["length"])
    method = METHODS[setting["method"]](problem, setting["lr"], setting["depth"], data.unit)
    x, y = problem.upper.value, problem.lower.value
    sources = data.sources(seed)
    curve = [(0, data.distance(x.detach(), y.detach()))]
    verdicts: list[str] = []
    claims, steps, reached, gradients, diverged, begun = 0, 0, None, 0, False, time.perf_counter()
    main = setting["stage"] == "main" and d <= 50  # certificates of larger problems take long
    while curve[-1][0] < setting["budget"] and reached is None and not diverged:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", tb.LinearSolveWarning)  # early on g_yy is indefinite at y
                method.zero_grad()
                method.backward(**sources)
                events = len(method.events)
                method.step()
        except (FloatingPointError, ValueError):  # not finite; or a product with hess Phi where y has left its branch
            diverged = True
            break
        steps += 1
        ratio = data.distance(x.detach(), y.detach())
        calls, gradients = spent(method)
        curve.append((calls, ratio))
        diverged = not ratio < 1e3
        reached = calls if ratio <= TARGET else None
        if any(event.kind == "escape test passed" for event in method.events[events:]):
            claims += 1
            if main and claims in (1, 4, 16):
                answer = method.result()
                verdicts.append(certificate(data, answer.x, answer.y, method.rule.grad_tol).verdict)
    lambda_min = None
    if setting["noise"] == 0 and main and not diverged:
        lambda_min = certificate(data, (x.detach(),), (y.detach(),), 1.0).lambda_min
    return rounded(
        {
            "calls": reached,
            "gradients": gradients if reached is not None else None,
            "ratio": curve[-1][1] if not diverged else None,
            "spent": curve[-1][0],
            "steps": steps,
            "diverged": diverged,
            "y": y.norm().item(),
            "column": x[:, 1].norm().item(),
            "claims": claims,
            "verdicts": verdicts,
            "lambda_min": lambda_min,
            "curve": [] if setting["stage"] != "main" else thin(curve, 60),
            "seconds": time.perf_counter() - begun,
        }
    )


def spent(method: tb.Method) -> tuple[int, int]:
    """Oracle calls so far, and those of them that are gradients."""
    counts = method.estimator.counts
    gradients = counts.upper_gradient_samples + counts.lower_gradient_samples
    return gradients + counts.hessian_product_samples + counts.jacobian_product_samples, gradients


def certificate(data: Representation, x: Tensors, y: Tensors, grad_tol: float) -> tb.Certificate:
    """What ``certify`` finds on all data, from y on."""
    return tb.certify(
        data.at(x[0], y[0]), lower=data.lower, upper=data.upper, grad_tol=grad_tol,
        curvature_tol=CURVATURE_TOL / data.unit,
    )  # fmt: skip


# --- report -----------------------------------------------------------------------------------------------------------

COLOURS = {"StocBiO": GREY, "MRBO": ORANGE, "VRBO": "#8e6bbf", "StocBiOiNEON": RED, TUNED: GREEN, PRINTED: "#000000"}
SHOWN = {PRINTED: "PRGDA, printed parameters", TUNED: "PRGDA, our parameters", "StocBiOiNEON": "StocBiO + iNEON"}


def report(rows: list[Row], folder: Path) -> str:
    """The figure and five tables."""
    main = [row for row in rows if row["setting"]["stage"] == "main"]
    plain = [r for r in main if r["setting"]["scaled"] and not r["setting"]["swap"] and r["setting"]["length"] > 0]
    draw_panels(plain, folder / "representation.png")
    parts = [
        ("Baselines: values chosen on seeds 1000 to 1002", tuning_table(rows, main)),
        ("Oracle calls to a ratio of 1e-2 from generic starts, median (range)", calls_table(plain)),
        ("Zero second column", zero_table(plain)),
        ("Other pairs of the library, calls to 1e-2 at d = 50", pairs_table(plain)),
        ("Degenerate and other data, d = 50", other_table(main)),
    ]
    return "\n\n".join(f"**{title}**\n\n{text}" for title, text in parts if text)


def draw_panels(rows: list[Row], path: Path) -> None:
    """Ratio against oracle calls: a column for each d, a row for each start."""
    sizes = sorted({row["setting"]["d"] for row in rows})
    starts = {0.0: "second column of x zero", 1e-3: "second column of x N(0, 1e-6)"}
    figure, axes = panels([[f"{noise} {d}" for d in sizes] for noise in starts], (3.7 * len(sizes) + 0.5, 6.6))
    for noise, start in starts.items():
        for d in sizes:
            axis = axes[f"{noise} {d}"]
            for name, colour in {**COLOURS, OURS: BLUE}.items():
                results = where(rows, method=name, d=d, noise=noise)
                curves = [r["curve"] for r in results if not r["diverged"]]
                draw(axis, curves, colour, SHOWN.get(name, name), "--" if name == PRINTED else "-")
            axis.axhline(TARGET, color=GREY, lw=0.8, ls=":")
            axis.set(xscale="log", yscale="log", title=f"d = {d}, {start}", xlabel="oracle calls (samples)")
        axes[f"{noise} {sizes[0]}"].set_ylabel("|UU' - M|\u00b2 / |M|\u00b2")
    figure.suptitle(
        "Medians and 10-90 % bands of runs that did not diverge; broken line: printed parameters", fontsize=11
    )
    axes[f"0.0 {sizes[0]}"].legend(fontsize=8, loc="lower left")
    save(figure, path)


def tuning_table(rows: list[Row], main: list[Row]) -> str:
    """What was chosen, how it did on the seeds of the choice, and what choosing cost."""
    lines = []
    for name in BASELINES:
        pairs = {(r["setting"]["lr"], r["setting"]["depth"]) for r in main if r["setting"]["method"] == name}
        tried = [r for r in rows if r["setting"]["method"] == name and r["setting"]["stage"] in ("scan", "choice")]
        scanned = sorted({r["setting"]["lr"] for r in tried if r["setting"]["stage"] == "scan"})
        if not tried or len(pairs) != 1:
            continue
        ((lr, depth),) = pairs
        chosen = where(tried, stage="choice", lr=lr, depth=depth)
        best = min((r["ratio"] for r in where(tried, stage="scan", lr=GRID[-1]) if r["ratio"] is not None), default=0)
        cost = sum(r["result"]["spent"] for r in tried)
        lines.append(
            [name, " ".join(f"{v:g}" for v in scanned), f"{best:.2f}", f"{lr:g}", f"{depth}",
             median_range([r["calls"] for r in chosen]), f"{cost:,}"]
        )  # fmt: skip
    header = ["method", "lr scanned", "best ratio at lr 3e-3", "lr", "Q (and K)", "calls to 1e-2", "calls spent"]
    return table(header, lines) if lines else ""


def calls_table(rows: list[Row]) -> str:
    """Calls of the methods compared, for every start that is not zero."""
    cases = [(50, 1e-6), (50, 1e-3), (75, 1e-3), (100, 1e-3)]
    if not where(rows, d=50):
        cases = [(30, 1e-3)]
    lines = []
    for name in (*BASELINES, PRINTED, FOLLOWS, TUNED, OURS):
        cells = [median_range([r["calls"] for r in where(rows, method=name, d=d, noise=noise)]) for d, noise in cases]
        own = where(rows, method=name, d=cases[0][0], noise=1e-3)
        lines.append([name, *cells, median_range([r["gradients"] for r in own])])
    header = [f"d = {d}, deviation {noise:g}" for d, noise in cases]
    return table(["method", *header, "gradients alone, first d, 1e-3"], lines)


def zero_table(rows: list[Row]) -> str:
    """How runs from the zero column end, and what their tests claimed, there and from the other starts."""
    lines = []
    d = min(row["setting"]["d"] for row in rows)
    for name in METHODS:
        own, every = where(rows, method=name, d=d, noise=0.0), where(rows, method=name, d=d)
        if not own:
            continue
        values = [r["lambda_min"] for r in own if r["lambda_min"] is not None]
        verdicts = [verdict for r in every for verdict in r["verdicts"]]
        false = sum(verdict != "epsilon-local minimum" for verdict in verdicts)
        ratios = [r["ratio"] for r in own]
        lines.append(
            [name, f"{sum(r['calls'] is not None for r in own)} of {len(own)}", median_range([r["calls"] for r in own]),
             median_range(ratios, ".2g"), median_range([r["column"] for r in own], ".2g"),
             spread(values, "+.3f"), f"{sum(r['claims'] for r in every)}",
             f"{false} of {len(verdicts)}" if verdicts else "-"]
        )  # fmt: skip
    header = ["method", "reach 1e-2", "calls to 1e-2", "last ratio", "last norm of column 2", "last lambda_min"]
    return table([*header, "claims, all starts", "false of those judged"], lines)


def pairs_table(rows: list[Row]) -> str:
    """The pairs that are ours, at the smallest d."""
    lines, d = [], min(row["setting"]["d"] for row in rows)
    for name in (OURS, *CANDIDATES, TUNED, CUBIC):
        cells = [[r["calls"] for r in where(rows, method=name, d=d, noise=noise)] for noise in (1e-3, 0.0)]
        if cells[0]:
            lines.append([name, *(median_range(cell) if cell else "-" for cell in cells)])
    return table(["pair", "deviation 1e-3", "zero column"], lines)


def other_table(rows: list[Row]) -> str:
    """y_0 = 0, the larger part of the data below, and data that are not scaled."""
    lines = []
    for name in METHODS:
        still = [r["y"] for r in where(rows, method=name, length=0.0)]
        swapped = [r["calls"] for r in where(rows, method=name, swap=True)]
        raw = where(rows, method=name, scaled=False)
        if still or swapped or raw:
            cells = [f"{max(still):g}" if still else "-", median_range(swapped) if swapped else "-"]
            lines.append([name, *cells, median_range([r["ratio"] for r in raw], ".2g") if raw else "-"])
    header = [
        "method",
        "largest norm of y from y_0 = 0",
        "calls to 1e-2, 70 % of the data below",
        "last ratio, a_std = 1",
    ]
    return table(header, lines)
