"""A step under a constraint on x."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from torchbilevel.problem import Problem


@contextmanager
def constrained(problem: Problem, rule: torch.optim.Optimizer) -> Iterator[None]:
    """Where x is constrained, project what the block has moved.

    A rule that tests stationarity is shown the gradient mapping (x - P(x - lr v)) / lr in the place of v: a
    gradient step along it is the projected step, and its norm is the right measure of stationarity.
    """
    if not problem.constrains_x:
        yield
        return
    rates = {id(p): _rate(group) for group in rule.param_groups for p in group["params"]}
    moving = [
        (i, p, p.grad, rates[id(p)])
        for i, p in enumerate(problem.upper_parameters)
        if p.grad is not None and rates.get(id(p))
    ]
    if hasattr(rule, "grad_tol"):
        ahead = list(problem.x)
        for i, p, v, rate in moving:
            ahead[i] = p.detach() - rate * v
        trial = problem.project_x(tuple(ahead))
        for i, p, _, rate in moving:
            p.grad = (p.detach() - trial[i]) / rate
    try:
        yield
    finally:
        for _, p, v, _ in moving:
            p.grad = v
    if not getattr(rule, "done", False):
        projected = problem.project_x(problem.x)
        with torch.no_grad():
            for i, p, _, _ in moving:
                p.copy_(projected[i])


def _rate(group: dict[str, Any]) -> float:
    lr = float(group.get("lr", 1.0))
    return -lr if group.get("maximize") else lr
