"""Which problem, estimator and rule go together; what does not is refused with the reason."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from torchbilevel.estimators.base import Estimator
from torchbilevel.facade import Facade
from torchbilevel.problem import Problem


def require_pair(problem: Any, estimator: Any, rule: Any) -> None:
    """Refuse parts that cannot work together, before anything has changed.

    Args:
        problem: must be a problem.
        estimator: must be an estimator.
        rule: must be a torch optimizer over upper parameters of the problem.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if the rule holds other parameters, searches for curvature under a constraint on x or where y does
            not move with the trial points, or tests values that the estimator does not give accurately.
    """
    require_problem(problem)
    if not isinstance(estimator, Estimator):
        raise TypeError(
            f"estimator must be Implicit(...), Unrolled(...) or Danskin(...), got {type(estimator).__name__}"
        )
    if not isinstance(rule, torch.optim.Optimizer) or isinstance(rule, Facade):
        raise TypeError(f"rule must be a torch optimizer over problem.upper.parameters(), got {type(rule).__name__}")
    require_upper(problem, (p for group in rule.param_groups for p in group["params"]))
    _require_values(estimator, rule)
    if getattr(rule, "compares_gradients", False) and not estimator.answers:
        raise ValueError(
            f"{type(rule).__name__} compares hypergradients at trial points, and this estimator has one y for all of "
            "them, which shows no curvature of Phi: give it probe_solver=GD(lr=..., steps=...) if it takes one, or use "
            f"NegativeCurvature, whose products are exact, or a Pullback or Perturbed rule; got {estimator}"
        )
    if hasattr(rule, "next_batch_size"):
        raise ValueError(
            f"{type(rule).__name__} estimates the gradient itself, from a closure on a plain loss: here the estimator "
            "does that, with recursion=Storm(...) or Spider(...), and the rule is optim.Pullback or another"
        )
    if problem.constrains_x and getattr(rule, "needs_probe", False):
        raise ValueError(
            f"{type(rule).__name__} searches for negative curvature, which needs a free x: use a Perturbed rule or "
            "leave out upper_projection"
        )


def require_problem(problem: Any) -> Problem:
    """The argument, which must be a problem.

    Args:
        problem: what was given as one.

    Returns:
        The same object.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"problem must be a BilevelProblem or MinimaxProblem, got {type(problem).__name__}")
    return problem


def require_upper(problem: Problem, params: Iterable[Any]) -> None:
    """Refuse parameters that are not trainable ones of ``problem.upper``.

    Args:
        problem: the problem.
        params: what the rule is to move.

    Raises:
        ValueError: names the first one.
    """
    known = {id(p) for p in problem.upper_parameters}
    for i, p in enumerate(params):
        if isinstance(p, Tensor) and id(p) not in known:  # torch refuses what is no tensor
            raise ValueError(
                "the rule must be over trainable parameters of problem.upper, listed by problem.upper_parameters; "
                f"got another one of shape {tuple(p.shape)} at position {i}"
            )


def _require_values(estimator: Estimator, rule: torch.optim.Optimizer) -> None:
    """A rule that compares values of f(x, y) needs a y accurate enough for them."""
    if not getattr(rule, "value_test", False):
        return
    solver, value_tol = estimator.lower_solver, getattr(rule, "value_tol", 0.0)
    tol = None if solver is None else solver.tol
    if tol is None or tol >= value_tol:
        raise ValueError(
            "value_test=True compares values of f(x, y), which are biased by the error of y: give the lower solver "
            f"a tol below value_tol={value_tol}, and steps enough to reach it, got tol={tol}"
        )
