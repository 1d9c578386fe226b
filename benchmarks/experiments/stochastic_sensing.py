"""Symmetric matrix sensing as a stochastic bilevel problem: what does iNEON add to StocBiO?

The problem is that of ``benchmarks.matrix_sensing`` with three columns, g's noise acting on the first column of Y alone
("first"), which keeps zero columns zero on every sample, or on all columns ("all"), which does not. Both methods take
the same steps until iNEON searches; it does where |v| is within its own noise at the first saddle. Oracle calls are
samples of all gradients of f and g and of all products with g_yy and g_xy, those of searches included. A run ends at
|X X' - M|^2 / |M|^2 <= 1e-2, after 600 steps, or after 1.5 million calls.
"""

from __future__ import annotations

import math
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torchbilevel as tb
from benchmarks import escapes
from benchmarks.bands import draw, spread
from benchmarks.experiments.study import Row, median_range, rounded, table, thin, where
from benchmarks.matrix_sensing import Matrix, Sensing, sensing, upper_loss
from examples.common import BLUE, GREY, panels, save

SEEDS = 10
RANK, KAPPA, SIGMA = 3, 5.0, 0.01
TARGET, STEPS, BUDGET = 1e-2, 600, 1_500_000  # a run ends at the first it meets
LR = 0.02
SOLVE = {"lr": 0.5, "steps": 10}  # of y and of z
LOWER_BATCH = 64
NOISE_FACTOR = 1.5  # iNEON searches where |v| is at most this times the deviation of v at the first saddle
CURVATURE_TOL = 0.1
SEARCH: dict[str, Any] = {"radius": 1e-3, "search_steps": 100, "probe_lr": LR, "step_length": 0.3}
METHODS = ("StocBiO", "StocBiOiNEON")
STARTS = {0.0: "zero columns", 1e-4: "columns N(0, 1e-8)"}


def settings(rows: list[Row], seeds: int, smoke: bool) -> list[dict[str, Any]]:
    """Both noises, both starts, both methods, at two batch sizes of f; the most important first."""
    size = {"d": 20, "steps": 20, "budget": 30_000} if smoke else {"d": 50, "steps": STEPS, "budget": BUDGET}
    cells = [(64, "all", 0.0), (512, "first", 0.0), (512, "all", 0.0), (64, "first", 0.0), (512, "first", 1e-4)]
    cells = cells[:2] if smoke else cells
    fewer = [] if smoke else [(64, "all", 1e-4)]
    every = range(1 if smoke else seeds)
    runs = [(*cell, seed) for cell in cells for seed in every[:5]] + [
        (*cell, seed) for cell in fewer for seed in every[:3]
    ]
    runs += [(*cell, seed) for cell in cells[:2] for seed in every[5:]]
    return [
        {"noise": noise, "start": start, "method": method, "batch": batch, **size, "seed": seed}
        for batch, noise, start, seed in runs
        for method in METHODS
    ]


def lower_loss(upper: Matrix, lower: Matrix, batch: Tensor) -> Tensor:
    """The loss g, on Z of shape (n, d, k): noise on the first k columns of Y."""
    gap = lower.value - upper.value
    return 0.5 * (gap * (upper.H @ gap)).sum() + (lower.value[:, : batch.shape[2]] * batch.mean(0)).sum()


def noise_of(data: Sensing, columns: str, seed: int) -> Tensor:
    """Z_j, of mean zero, of shape (n, d, 1) or (n, d, rank)."""
    if columns == "first":
        return data.Z[:, :, None]
    g = torch.Generator().manual_seed(7919 + seed)
    Z = SIGMA * torch.randn(*data.Z.shape, data.start.shape[1], generator=g, dtype=torch.float64)
    return Z - Z.mean(0)


def gradient(data: Sensing, x: Tensor) -> Tensor:
    """grad Phi = 2 mean_i r_i A_i X, r_i = <A_i, X X'> - b_i."""
    residuals = data.A.flatten(1) @ (x @ x.T).flatten() - data.b
    return 2 * (residuals @ data.A.flatten(1) / len(residuals)).view_as(data.M) @ x


def hessian(data: Sensing, x: Tensor) -> Tensor:
    """hess Phi = mean_i [4 vec(A_i X) vec(A_i X)' + 2 r_i A_i for every column], columns stacked."""
    residuals = data.A.flatten(1) @ (x @ x.T).flatten() - data.b
    rows = (data.A @ x).transpose(1, 2).flatten(1)
    mean = (residuals @ data.A.flatten(1) / len(residuals)).view_as(data.M)
    blocks = torch.block_diag(*[mean] * x.shape[1])
    return 4 * rows.T @ rows / len(rows) + 2 * blocks


def lambda_min(data: Sensing, x: Tensor) -> float:
    """The smallest eigenvalue of hess Phi."""
    return torch.linalg.eigvalsh(hessian(data, x))[0].item()


@lru_cache(maxsize=2)
def instance(seed: int, d: int) -> tuple[Sensing, float]:
    """The data of a seed, and the deviation of v on one sample of f at the saddle with one column."""
    data = sensing(seed, d, RANK, kappa=KAPPA, noise=SIGMA)
    saddle = torch.zeros_like(data.start)
    saddle[:, :1] = escapes.best_column(data)[:, :1]
    return data, escapes.noise(data, saddle) * math.sqrt(escapes.BATCH)


def build(name: str, problem: Any, batch: int, grad_tol: float, seed: int) -> tb.Method:
    """A method at the settings of this experiment."""
    parts: dict[str, Any] = {
        "lower_solver": tb.GD(**SOLVE), "linear_solver": tb.Neumann(**SOLVE), "batch_size": batch,
        "lower_batch_size": LOWER_BATCH, "seed": seed,
    }  # fmt: skip
    if name == "StocBiO":
        return tb.StocBiO(problem, LR, **parts)
    return tb.StocBiOiNEON(problem, LR, grad_tol=grad_tol, curvature_tol=CURVATURE_TOL, **SEARCH, **parts)


def run(setting: dict[str, Any], device: str) -> dict[str, Any]:
    """One run, judged off-line by the closed form of Phi."""
    seed, batch = setting["seed"], setting["batch"]
    data, deviation = instance(seed, setting["d"])
    grad_tol = NOISE_FACTOR * deviation / math.sqrt(batch)
    start = data.start.clone()
    g = torch.Generator().manual_seed(seed)
    start[:, 1:] = setting["start"] * torch.randn(start[:, 1:].shape, generator=g, dtype=torch.float64)
    move = Matrix(start, data.H).to(device), Matrix(start).to(device)
    problem = tb.BilevelProblem(*move, upper_loss=upper_loss, lower_loss=lower_loss)
    Z = noise_of(data, setting["noise"], seed)
    sources = {
        "lower": tb.sample(Z.to(device), seed=2 * seed),
        "upper": tb.sample((data.A.to(device), data.b.to(device)), seed=2 * seed + 1),
    }
    method = build(setting["method"], problem, batch, grad_tol, seed)
    parameter = problem.upper.value
    curve: list[tuple[int, int, float, float]] = []
    claims: list[str] = []
    reached, diverged, begun = None, False, time.perf_counter()
    for step in range(setting["steps"] + 1):
        x = parameter.detach().cpu()
        curve.append((step, spent(method), data.phi(x), data.distance(x)))
        diverged = not curve[-1][-1] < 1e6
        reached = step if curve[-1][-1] <= TARGET else None
        if diverged or reached is not None or step == setting["steps"] or curve[-1][1] >= setting["budget"]:
            break
        events = len(method.events)
        method.zero_grad()
        method.backward(**sources)
        method.step()
        if any(event.kind == "escape test passed" for event in method.events[events:]):
            claims.append(judge(data, x, grad_tol))
    final = parameter.detach().cpu()
    searches = sum(event.kind in ("negative curvature", "escape test passed") for event in method.events)
    return rounded(
        {
            "steps": reached,
            "calls": curve[-1][1] if reached is not None else None,
            "spent": curve[-1][1],
            "phi": curve[-1][2],
            "ratio": curve[-1][3],
            "lambda_min": None if diverged else lambda_min(data, final),
            "columns": final[:, 1:].norm().item(),
            "searches": searches,
            "accepted": searches - len(claims),
            "claims": claims,
            "grad_tol": grad_tol,
            "diverged": diverged,
            "curve": thin(curve, 80),
            "seconds": time.perf_counter() - begun,
        }
    )


def judge(data: Sensing, x: Tensor, grad_tol: float) -> str:
    """What x is, by the closed form, to the tolerances of the method that claims it to be a minimum."""
    if gradient(data, x).norm() > grad_tol:
        return "not stationary"
    return "strict saddle" if lambda_min(data, x) < -CURVATURE_TOL else "epsilon-local minimum"


def spent(method: tb.Method) -> int:
    """Oracle calls so far."""
    counts = method.estimator.counts.state_dict()
    return sum(n for kind, n in counts.items() if kind.endswith("_samples"))


# --- report -----------------------------------------------------------------------------------------------------------

COLOURS = {"StocBiO": GREY, "StocBiOiNEON": BLUE}
NAMES = {"StocBiO": "StocBiO", "StocBiOiNEON": "StocBiO + iNEON"}


def report(rows: list[Row], folder: Path) -> str:
    """The figure and two tables."""
    cases = list(dict.fromkeys(_case(row["setting"]) for row in rows))
    draw_panels(rows, cases, folder / "stochastic_sensing.png")
    parts = [
        ("Steps and oracle calls to a ratio of 1e-2, median (range)", calls_table(rows, cases)),
        ("How runs end, and what iNEON did", end_table(rows, cases)),
    ]
    return "\n\n".join(f"**{title}**\n\n{text}" for title, text in parts)


def _case(setting: dict[str, Any]) -> tuple[int, str, float]:
    return setting["batch"], setting["noise"], setting["start"]


def _results(rows: list[Row], case: tuple[int, str, float], method: str) -> list[dict[str, Any]]:
    batch, noise, start = case
    return where(rows, batch=batch, noise=noise, start=start, method=method)


def _described(case: tuple[int, str, float]) -> list[str]:
    return [STARTS[case[2]], f"{case[1]} columns" if case[1] == "all" else "first column", f"{case[0]}"]


def draw_panels(rows: list[Row], cases: list[tuple[int, str, float]], path: Path) -> None:
    """Ratio against steps and against oracle calls, for runs from zero columns."""
    shown = [case for case in ((64, "all", 0.0), (64, "first", 0.0), (512, "first", 0.0)) if case in cases]
    figure, axes = panels([[f"{i} {x}" for i in range(len(shown))] for x in ("step", "call")], (4.1 * len(shown), 6.2))
    for i, case in enumerate(shown):
        for row, (key, label) in enumerate((("step", "outer steps"), ("call", "oracle calls (samples)"))):
            axis = axes[f"{i} {key}"]
            for name, colour in COLOURS.items():
                results = [r for r in _results(rows, case, name) if not r["diverged"]]
                draw(axis, [[(p[row], p[3]) for p in r["curve"]] for r in results], colour, NAMES[name])
            axis.axhline(TARGET, color=GREY, lw=0.8, ls=":")
            axis.set(yscale="log", xscale="log" if row else "linear", xlabel=label)
            noise = "all columns of y" if case[1] == "all" else "the first column of y alone"
            axis.set_title(f"batch {case[0]}, noise on {noise}" if not row else "")
    for key in ("step", "call"):
        axes[f"0 {key}"].set_ylabel("|XX' - M|\u00b2 / |M|\u00b2")
    figure.suptitle("Runs from two zero columns: medians and 10-90 % bands", fontsize=11)
    axes["0 step"].legend(fontsize=9, loc="lower left")
    save(figure, path)


def calls_table(rows: list[Row], cases: list[tuple[int, str, float]]) -> str:
    """Steps and calls of both methods, by case."""
    lines = []
    for case in cases:
        own = {name: _results(rows, case, name) for name in METHODS}
        cells = [median_range([r[key] for r in own[name]]) for key in ("steps", "calls") for name in METHODS]
        lines.append([*_described(case), f"{len(own['StocBiO'])}", *cells])
    names = [f"{key}, {NAMES[name]}" for key in ("steps", "calls") for name in METHODS]
    return table(["start", "noise of g on", "batch of f", "seeds", *names], lines)


def end_table(rows: list[Row], cases: list[tuple[int, str, float]]) -> str:
    """Last values, searches, and the claims of iNEON's test."""
    lines = []
    for case in cases:
        for name in METHODS:
            own = _results(rows, case, name)
            claims = [claim for r in own for claim in r["claims"]]
            false = sum(claim != "epsilon-local minimum" for claim in claims)
            saddles = claims.count("strict saddle")
            values = [r["lambda_min"] for r in own if r["lambda_min"] is not None]
            lines.append(
                [" / ".join((*_described(case), NAMES[name])), median_range([r["ratio"] for r in own], ".2g"),
                 median_range([r["phi"] for r in own], ".2g"), spread(values, "+.2f"),
                 median_range([r["columns"] for r in own], ".2g"),
                 *([median_range([r[key] for r in own]) for key in ("searches", "accepted")]),
                 f"{len(claims)}, {false} ({saddles} at a saddle)" if name != "StocBiO" else "-"]
            )  # fmt: skip
    header = [
        "start / noise on / batch / method",
        "last ratio",
        "last Phi",
        "last lambda_min",
        "last norm of columns 2, 3",
    ]
    return table([*header, "searches", "directions taken", "claims, of which false"], lines)
