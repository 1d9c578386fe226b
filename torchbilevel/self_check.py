"""``check_hypergradient``: is an estimator right on this problem, and what is its error made of?"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from torchbilevel.curvature import HessianOperator
from torchbilevel.derivatives import Oracle
from torchbilevel.estimators.base import Estimator
from torchbilevel.estimators.implicit import Implicit, implicit_field
from torchbilevel.estimators.unrolled import Unrolled
from torchbilevel.linear_solve import CG
from torchbilevel.problem import Problem
from torchbilevel.tensors import Tensors, axpy, dot, mix_seed, norm, numel, scale, sub


@dataclass(frozen=True)
class HypergradientReport:
    """How far an estimate of grad Phi is from the truth, relative to |grad Phi|.

    Attributes:
        norm: |grad Phi| of the reference.
        error: |v - grad Phi| / |grad Phi|, v what the estimator returns.
        lower_solve: the part that an exact linear solve and a full unroll would leave: y is not y*(x) yet.
        linear_solve: the part from z (``Implicit``), else 0.
        truncation: the part from unrolling fewer steps than were taken (``Unrolled`` with ``truncate``), else 0.
        finite_differences: largest error of the reference itself against central differences of Phi along random
            directions, relative to |grad Phi|.
    """

    norm: float
    error: float
    lower_solve: float
    linear_solve: float
    truncation: float
    finite_differences: float

    def __str__(self) -> str:
        """The report as a short table."""
        rows = [
            ("|grad Phi|", f"{self.norm:.3e}", "y and z solved to round-off"),
            ("estimator's error", f"{self.error:.1e}", "relative to it, of which"),
            ("  lower solve", f"{self.lower_solve:.1e}", "y is not at y*(x): more steps, or a better lr"),
            ("  linear solve", f"{self.linear_solve:.1e}", "z: more iterations of the linear solver"),
            ("  truncation", f"{self.truncation:.1e}", "steps that are not differentiated"),
            ("finite differences", f"{self.finite_differences:.1e}", "of Phi against the reference"),
        ]
        return "\n".join(f"{name:<20}{number:<12}{note}" for name, number, note in rows)


def check_hypergradient(
    problem: Problem,
    estimator: Estimator,
    batch: Any = None,
    *,
    lower: Any = None,
    upper: Any = None,
    directions: int = 3,
    seed: int = 0,
) -> HypergradientReport:
    """Compare what an estimator returns at the current x and y with the exact gradient of Phi and with finite differences.

    The reference solves for y*(x) and z to round-off. The estimator works as its next ``backward`` would, from the current
    y; nothing is changed. In float32 expect finite differences to agree to about 1e-2.

    Args:
        problem: the problem.
        estimator: ``Implicit``, ``Unrolled`` or ``Danskin``; bound to ``problem`` or not bound yet.
        batch: minimax: a batch.
        lower: bilevel: a batch for the lower loss.
        upper: bilevel: a batch for the upper loss.
        directions: number of random directions for finite differences, at least 1.
        seed: of the directions, and of the random numbers inside the losses.

    Returns:
        The report; ``print`` shows it as a table.

    Raises:
        ValueError: if ``directions`` is not positive, or grad Phi is zero, so that no relative error exists.

    Cost: one ``backward``, a reference of a few Newton steps and one solve, and as much again for every direction, twice.
    """
    if directions < 1:
        raise ValueError(f"directions must be at least 1, got {directions}")
    samples = problem.sample(batch, lower, upper, seed=mix_seed(seed, 0))
    x = problem.x
    reference = HessianOperator(problem, samples, strict=False)
    truth = reference.gradient
    size = float(norm(truth))
    if size == 0:
        raise ValueError("grad Phi is exactly zero at the current x, so there is no relative error; move x")
    trial = copy.copy(estimator)
    trial._problem = None  # a copy of the settings and the memory, with counters of its own
    trial.bind(problem)
    evaluation = trial.evaluate(x, trial.start(), trial.memory, samples)
    v = evaluation.hypergradient

    def distance(a: Tensors, b: Tensors) -> float:
        return float(norm(sub(a, b))) / size

    full, linear, truncation = v, 0.0, 0.0
    if isinstance(trial, Implicit):
        tight = CG(max(100, numel(problem.y)), torch.finfo(evaluation.value.dtype).eps ** 0.77)
        full = implicit_field(Oracle(problem), x, evaluation.y, None, samples, tight, evaluation.lower).hypergradient
        linear = distance(v, full)
    elif isinstance(trial, Unrolled) and trial.truncate is not None:
        trial.truncate = None
        full = trial.evaluate(x, trial.start(), trial.memory, samples).hypergradient
        truncation = distance(v, full)

    step = torch.finfo(evaluation.value.dtype).eps ** (1 / 3) * max(1.0, float(norm(x)))
    generator = torch.Generator().manual_seed(mix_seed(seed, 1))
    worst = 0.0
    for _ in range(directions):
        d = tuple(torch.randn(t.shape, generator=generator).to(t) for t in x)
        d = scale(1.0 / norm(d), d)
        ends = [HessianOperator(problem, samples, x=axpy(h, d, x), strict=False).value for h in (step, -step)]
        worst = max(worst, abs(float((ends[0] - ends[1]) / (2 * step) - dot(truth, d))) / size)
    return HypergradientReport(size, distance(v, truth), distance(full, truth), linear, truncation, worst)
