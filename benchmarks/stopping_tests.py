"""How often do the papers' own stopping tests pass a saddle, and how often does verify= let one through?

    python -m benchmarks.stopping_tests [--smoke] [--seeds N] [--workers N] [--output DIR]

The best rank-one approximation of a symmetric matrix M, as a bilevel problem whose Phi is known in closed form:

    f(x, y) = |x|^2 |y|^2 / 4 - x'M y / 2,   g(x, y) = (y - x)'H (y - x) / 2,   y*(x) = x,
    Phi(x) = |x|^4 / 4 - x'M x / 2 = |x x' - M|^2 / 4 - const,   hess Phi(x) = |x|^2 I + 2 x x' - M.

With mu_1 > mu_2 > ... and u_i the eigenpairs of M, the critical points are 0 and +-sqrt(mu_i) u_i. The first pair are
the minima; at the second the smallest eigenvalue of hess Phi is -(mu_1 - mu_2), so the gap makes a saddle flat or
sharp. Every run starts next to that saddle and goes on until its test passes a point. A point counts as a saddle by
the formula for hess Phi alone, in float64; the package's curvature code has no say.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import torchbilevel as tb

SIZE = 10  # of x and y
GAPS = (0.12, 1.0)  # mu_1 - mu_2 is log-uniform between them, mu_1 = 1, the other mu_i are uniform in [-1, mu_2]
KAPPA = 1.25  # of H, whose largest eigenvalue is 1
OFFSET = 1e-4  # of the start from the saddle, in a random direction
GRAD_TOL, CURVATURE_TOL = 5e-3, 0.1
LR = 0.25  # eta, eta_H and eta_w; the largest eigenvalue of hess Phi is 2 at all critical points, 4 at most on the way
LENGTH = LR * GRAD_TOL  # step length of normalised descent, and radius of all displacements
STEP_LENGTH = 0.1  # of steps along negative curvature
VALUE_TOL = 1e-4
THEORY = math.ceil(math.log(SIZE / LENGTH) / (LR * CURVATURE_TOL))  # log(n / r) / (eta epsilon_H)
STEPS = (20, 100, THEORY)
TESTS = ("value test", "iNEON", "escape counter")
CAP = 5000


@dataclass(frozen=True)
class Run:
    """One run, and what became of it.

    ``outcome``: what the point that passed is, "saddle" or "minimum"; "none" if the run was cut off. ``refuted``:
    claims that ``verify=`` took back on the way. ``gradients`` and ``products`` are totals, with those of certificates;
    values of f count as gradients.
    """

    test: str
    steps: int
    verify: bool
    seed: int
    gap: float
    outcome: str
    lambda_min: float
    grad_norm: float
    refuted: int
    outer_steps: int
    gradients: int
    products: int


class Point(nn.Module):
    """x or y."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.clone())


def hessian(x: Tensor, M: Tensor) -> Tensor:
    """The Hessian of Phi in closed form."""
    return x.dot(x) * torch.eye(len(x), dtype=x.dtype) + 2 * torch.outer(x, x) - M


def instance(seed: int) -> tuple[tb.BilevelProblem, Tensor, float]:
    """A problem that starts next to its flattest saddle, M, and mu_1 - mu_2."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, uniform: bool = False) -> Tensor:
        sampler = torch.rand if uniform else torch.randn
        return sampler(shape, generator=generator, dtype=torch.float64)

    low, high = GAPS
    gap = low * (high / low) ** float(draw(uniform=True))
    mu = -1 + (2 - gap) * draw(SIZE, uniform=True)
    mu[:2] = torch.tensor([1.0, 1.0 - gap])
    u = torch.linalg.qr(draw(SIZE, SIZE))[0]
    M = (u * mu) @ u.T
    w = torch.linalg.qr(draw(SIZE, SIZE))[0]
    H = (w * torch.linspace(1 / KAPPA, 1, SIZE, dtype=torch.float64)) @ w.T
    offset = draw(SIZE)
    start = math.sqrt(1 - gap) * u[:, 1] + OFFSET * offset / offset.norm()

    def upper_loss(upper: Point, lower: Point, batch: Any) -> Tensor:
        x, y = upper.value, lower.value
        return x.dot(x) * y.dot(y) / 4 - x.dot(M @ y) / 2

    def lower_loss(upper: Point, lower: Point, batch: Any) -> Tensor:
        r = lower.value - upper.value
        return r.dot(H @ r) / 2

    problem = tb.BilevelProblem(Point(start), Point(start), upper_loss=upper_loss, lower_loss=lower_loss)
    return problem, M, gap


def build(problem: tb.BilevelProblem, test: str, steps: int, verify: bool, seed: int) -> tb.Method:
    """A method that stops when its test passes a point; ``steps`` is the length of the test."""
    estimator = tb.Implicit(tb.GD(lr=1.0, steps=20, tol=1e-5), tb.CG(max_iter=20, tol=1e-3))
    x = problem.upper_parameters
    common: dict[str, Any] = {"radius": LENGTH, "stop": True, "seed": seed}
    rule: tb.optim.Rule
    if test == "value test":
        rule = tb.optim.PerturbedGD(
            x, LR, grad_tol=GRAD_TOL, escape_steps=steps, value_test=True, value_tol=VALUE_TOL, **common
        )
    elif test == "iNEON":
        rule = tb.optim.NEON(
            x, LR, grad_tol=GRAD_TOL, curvature_tol=CURVATURE_TOL, probe_lr=LR, search_steps=steps,
            step_length=STEP_LENGTH, **common,
        )  # fmt: skip
    else:
        rule = tb.optim.Pullback(
            x, LENGTH, LR, grad_tol=GRAD_TOL, escape_steps=steps, mean_movement=LENGTH**2, **common
        )
    check = tb.Verify(step_length=STEP_LENGTH, curvature_tol=CURVATURE_TOL, grad_tol=GRAD_TOL) if verify else None
    return tb.Method(problem, estimator, rule, verify=check)


def play(task: tuple[str, int, bool, int], cap: int) -> Run:
    """Run until the test passes a point, at most ``cap`` steps, and judge that point."""
    test, steps, verify, seed = task
    problem, M, gap = instance(seed)
    method = build(problem, test, steps, verify, seed)
    outer_steps = 0
    while not method.done and outer_steps < cap:
        method.zero_grad()
        method.backward()
        method.step()
        outer_steps += 1
    (x,) = method.result().x
    H = hessian(x, M)
    lambda_min = float(torch.linalg.eigvalsh(H)[0])
    outcome = "none" if not method.done else "saddle" if lambda_min < -CURVATURE_TOL else "minimum"
    counts = method.estimator.counts
    return Run(
        test, steps, verify, seed, gap, outcome, lambda_min,
        grad_norm=float((x.dot(x) * x - M @ x).norm()),
        refuted=sum(event.kind in ("saddle left", "claim withdrawn") for event in method.events),
        outer_steps=outer_steps,
        gradients=counts.upper_gradients + counts.lower_gradients + counts.upper_values,
        products=counts.hessian_products + counts.jacobian_products + counts.lagrangian_products,
    )  # fmt: skip


def wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of Wilson for a share.

    >>> [round(t, 4) for t in wilson(0, 50)], [round(t, 4) for t in wilson(15, 50)]
    ([0.0, 0.0713], [0.191, 0.4375])
    """
    p, shrink = hits / n, 1 / (1 + z * z / n)
    middle = shrink * (p + z * z / (2 * n))
    half = shrink * z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def summarise(runs: list[Run]) -> dict[str, Any]:
    """The runs of one cell of the table, in the order of their seeds, in numbers."""

    def each(name: str) -> list[float]:
        return [float(f"{getattr(run, name):.4g}") for run in runs]

    n = len(runs)
    saddles = sum(run.outcome == "saddle" for run in runs)
    return {
        "test": runs[0].test,
        "steps": runs[0].steps,
        "verify": runs[0].verify,
        "runs": n,
        "saddles": saddles,
        "interval": wilson(saddles, n),
        "none": sum(run.outcome == "none" for run in runs),
        "sharpest_passed": max((run.gap for run in runs if run.outcome == "saddle"), default=None),
        "refuted": sum(run.refuted for run in runs) / n,
        "gradients": sum(run.gradients for run in runs) / n,
        "products": sum(run.products for run in runs) / n,
        "outcomes": [run.outcome for run in runs],
        **{f"each_{name}": each(name) for name in ("gap", "lambda_min", "grad_norm", "outer_steps")},
    }


def table(cells: list[dict[str, Any]]) -> str:
    """The cells as a table in Markdown, one line for each test and length."""
    lines = [
        "| test | length | saddles passed | 95 % interval | no claim | gradients + products per run | with `verify=` | "
        "95 % interval | no claim | gradients + products per run | claims refuted per run |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for alone, checked in zip(cells[::2], cells[1::2], strict=True):
        entries = [alone["test"], str(alone["steps"])]
        for cell in (alone, checked):
            low, high = cell["interval"]
            entries += [
                f"{cell['saddles']} of {cell['runs']}",
                f"{100 * low:.0f} to {100 * high:.0f} %",
                str(cell["none"]),
                f"{cell['gradients']:.0f} + {cell['products']:.0f}",
            ]
        lines.append(f"| {' | '.join(entries)} | {checked['refuted']:.2f} |")
    return "\n".join(lines)


def study(seeds: int, steps: tuple[int, ...], cap: int, workers: int) -> list[list[Run]]:
    """The runs of all cells, without and with ``verify=`` in turn."""
    cells = [(test, n, verify) for test in TESTS for n in steps for verify in (False, True)]
    # The longest first, so that no worker is left alone with them at the end.
    tasks = sorted(((*cell, seed) for cell in cells for seed in range(seeds)), key=lambda task: (-task[1], task[3]))
    bar = {"total": len(tasks), "unit": "run"}
    if workers == 1:
        runs = [play(task, cap) for task in tqdm(tasks, **bar)]
    else:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        with context.Pool(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            runs = list(tqdm(pool.imap_unordered(partial(play, cap=cap), tasks), **bar))
    found = {(run.test, run.steps, run.verify, run.seed): run for run in runs}
    return [[found[(*cell, seed)] for seed in range(seeds)] for cell in cells]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stopping_tests", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one seed, short runs: does it run at all")
    parser.add_argument("--seeds", type=int, default=50, help="runs per test, length, and with or without verify=")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, one thread each")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of stopping_tests.json")
    options = parser.parse_args()
    seeds, steps, cap, workers = (1, (5,), 80, 1) if options.smoke else (options.seeds, STEPS, CAP, options.workers)
    torch.set_num_threads(1)
    cells = study(seeds, steps, cap, workers)
    summary = [summarise(runs) for runs in cells]
    print(table(summary))
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "stopping_tests.json"
    setting = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "workers": workers,
        "seeds": seeds,
        "size": SIZE, "gaps": GAPS, "kappa": KAPPA, "offset": OFFSET, "grad_tol": GRAD_TOL,
        "curvature_tol": CURVATURE_TOL, "lr": LR, "length": LENGTH, "step_length": STEP_LENGTH,
        "value_tol": VALUE_TOL, "cap": cap,
    }  # fmt: skip
    lines = ",\n  ".join(json.dumps(cell) for cell in summary)
    path.write_text(f'{{\n "setting": {json.dumps(setting)},\n "cells": [\n  {lines}\n ]\n}}\n')
    print(f"written to {path}")


if __name__ == "__main__":
    main()
