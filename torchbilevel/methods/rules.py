"""The rules that methods are made of, with their arguments checked in the words of the methods."""

from __future__ import annotations

import math
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from torchbilevel.estimators.recursion import require_weight
from torchbilevel.optim import AveragedGD, NormalizedGD, PerturbedGD
from torchbilevel.pairing import require_problem
from torchbilevel.problem import Problem
from torchbilevel.verify import Verify

# The hypergradient may be wrong by grad_tol / 5, so a displacement asks for a norm within the other four fifths.
_SHARE = 0.8


def gradient_descent(problem: Problem, lr: float) -> torch.optim.SGD:
    """The rule x <- x - lr v, on all upper parameters in one group."""
    _require_number("lr", lr)
    return torch.optim.SGD(require_problem(problem).upper_parameters, lr)


def normalized_descent(problem: Problem, lr: float, max_rate: float | None) -> NormalizedGD:
    """The rule x <- x - min(lr / |v|, max_rate) v."""
    _require_number("lr", lr)
    return NormalizedGD(require_problem(problem).upper_parameters, lr, max_rate)


def averaged_descent(problem: Problem, lr: float, averaging: float = 1.0) -> AveragedGD:
    """The rule x <- x + s averaging (P(x - lr v) - x), P the projection of x and s the factor of a decay."""
    _require_number("lr", lr)
    require_weight("averaging", averaging)
    return AveragedGD(require_problem(problem).upper_parameters, lr, averaging, problem.upper_projections)


def perturbed_descent(problem: Problem, lr: float, *, grad_tol: float, **options: Any) -> PerturbedGD:
    """The same, with displacements where |v| <= 4/5 grad_tol; ``options`` as in ``PerturbedGD``."""
    _require_number("lr", lr)
    _require_number("grad_tol", grad_tol)
    return PerturbedGD(require_problem(problem).upper_parameters, lr, grad_tol=_SHARE * grad_tol, **options)


def within_curvature(verify: Verify | None, curvature_tol: float | None) -> Verify | None:
    """The same, with the tolerance of the method where it has none of its own."""
    if not isinstance(verify, Verify) or verify.curvature_tol is not None:
        return verify
    return replace(verify, curvature_tol=curvature_tol)


def _require_number(name: str, value: Any) -> None:
    if not isinstance(value, Real | Tensor) or not 0 <= float(value) < math.inf:
        raise ValueError(f"{name} must be a non-negative, finite number, got {value!r}")
