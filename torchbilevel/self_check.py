"""``check_hypergradient``: is an estimator right on this problem, and what is its error made of?"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from torchbilevel.curvature import HessianOperator
from torchbilevel.estimators.base import Estimator
from torchbilevel.estimators.implicit import Implicit, implicit_field
from torchbilevel.estimators.unrolled import Unrolled
from torchbilevel.linear_solve import CG
from torchbilevel.oracle import Oracle
from torchbilevel.problem import Problem
from torchbilevel.problem.base import require_problem
from torchbilevel.response import best_response
from torchbilevel.shards import whole
from torchbilevel.tensors import Tensors, axpy, dot, mix_seed, norm, numel, scale, sub


@dataclass(frozen=True)
class HypergradientReport:
    """How far an estimate of grad Phi is from the truth, relative to |grad Phi|.

    Attributes:
        norm: |grad Phi| of the reference.
        error: |v - grad Phi| / |grad Phi|, v what the estimator returns.
        lower_solve: the part that an exact linear solve and a full unroll would leave: y is not y*(x) yet.
        linear_solve: the part from z (``Implicit``), else 0.
        truncation: the part from differentiating fewer steps than were taken (``Unrolled`` with ``truncate``), else 0.
        finite_differences: largest error of the reference itself against central differences of Phi, along grad Phi
            and along random directions.
        trouble: why the reference is not to be trusted, in words; empty if it is.
    """

    norm: float
    error: float
    lower_solve: float
    linear_solve: float
    truncation: float
    finite_differences: float
    trouble: str

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
        lines = [f"{name:<20}{number:<12}{note}" for name, number, note in rows]
        return "\n".join([*lines, f"not to be trusted: {self.trouble}"] if self.trouble else lines)


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
    """Compare what an estimator returns at the current x and y with the exact gradient of Phi and finite differences.

    The reference solves for y*(x) and z to round-off. The estimator works as its next ``backward`` would, from the
    current y; nothing is changed. Finite differences agree to about 1e-7 in float64 and 1e-2 in float32.

    Args:
        problem: the problem.
        estimator: bound to ``problem``, as that of a method is, or not bound yet.
        batch: minimax: a batch.
        lower: bilevel: a batch for the lower loss.
        upper: bilevel: a batch for the upper loss.
        directions: number of directions for finite differences, at least 1; the first is that of grad Phi.
        seed: of the directions, and of the random numbers inside the losses.

    Returns:
        The report; ``print`` shows it as a table.

    Raises:
        TypeError: if ``problem`` is no problem or ``estimator`` no estimator: of a method they are ``method.problem``
            and ``method.estimator``.
        ValueError: if ``directions`` is not positive, or grad Phi is zero, so that no relative error exists.

    Cost: one ``backward``, a reference of a few Newton steps and two solves, and twice a few Newton steps for every
    direction.
    """
    require_problem(problem)
    if not isinstance(estimator, Estimator):
        got = f"the class {estimator.__name__}" if isinstance(estimator, type) else type(estimator).__name__
        raise TypeError(
            f"estimator must be an estimator such as Implicit(GD(lr=0.1, steps=10)), got {got}; of a method it is "
            f"method.estimator"
        )
    if directions < 1:
        raise ValueError(f"directions must be at least 1, got {directions}")
    problem.ranks.require_same("seed", seed, problem.x[0].device)
    trial = copy.copy(estimator).bind(problem)
    trial.oracle = oracle = Oracle(problem)  # what is spent here is not the estimator's
    draws = problem.draws(batch, lower, upper, mix_seed(seed, 0), trial.batch_sizes)
    samples = draws.pair
    x, eps = problem.x, max(torch.finfo(t.dtype).eps for t in (*problem.x, *problem.y))
    reference = HessianOperator(problem, samples, tol=eps**0.75, oracle=oracle, strict=False)
    truth, y = reference.gradient, reference.response.y
    size = float(norm(truth))
    if size == 0:
        why = "at the current x" if not reference.trouble else f"here ({reference.trouble})"
        raise ValueError(f"grad Phi is exactly zero {why}, so there is no relative error; move x")
    evaluation = trial.evaluate(x, trial.start(draws.seed), trial.memory, draws)
    full = evaluation.hypergradient
    tight = CG(max(100, numel(y)), eps**0.77)
    if isinstance(trial, Implicit):
        full = implicit_field(oracle, x, evaluation.y, None, draws.at(0), tight, evaluation.lower).hypergradient
    elif isinstance(trial, Unrolled):
        trial.truncate = None
        full = trial.evaluate(x, trial.start(draws.seed), trial.memory, draws).hypergradient

    x, v, full = whole(x), whole(evaluation.hypergradient), whole(full)

    def phi(point: Tensors) -> torch.Tensor:
        there = best_response(problem, oracle, point, y, samples.lower, reference.tol, tight)
        return oracle.upper_value(point, there.y, samples.upper)

    step = eps**0.25 * max(1.0, float(norm(x)))
    generator = torch.Generator().manual_seed(mix_seed(seed, 1))
    worst, d = 0.0, truth
    for _ in range(directions):
        d = scale(1.0 / norm(d), d)
        slope = (phi(axpy(step, d, x)) - phi(axpy(-step, d, x))) / (2 * step)
        worst = max(worst, abs(float(slope - dot(truth, d))) / size)
        d = tuple(torch.randn(t.shape, generator=generator).to(t) for t in x)
    beside = float(norm(sub(v, full))) / size
    return HypergradientReport(
        norm=size,
        error=float(norm(sub(v, truth))) / size,
        lower_solve=float(norm(sub(full, truth))) / size,
        linear_solve=beside if isinstance(trial, Implicit) else 0.0,
        truncation=beside if isinstance(trial, Unrolled) else 0.0,
        finite_differences=worst,
        trouble=reference.trouble,
    )
