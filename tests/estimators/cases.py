"""Estimators of every kind on problems of both kinds, and what their calls may change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.problems import quadratic_bilevel, quadratic_minimax
from torchbilevel import CG, GD, Adam, Danskin, Direct, Estimator, Implicit, Neumann, SignGD, TorchOptim, Unrolled

RMSPROP, LBFGS = torch.optim.RMSprop, torch.optim.LBFGS
BILEVEL: dict[str, Callable[[], Estimator]] = {
    "CG": lambda: Implicit(GD(0.4, 3, momentum=0.5), CG(2)),
    "CG, exact steps": lambda: Implicit(GD(0.4, 3), CG(2, None)),
    "CG, cold adjoint": lambda: Implicit(GD(0.4, 3), CG(2), warm_start_adjoint=False),
    "CG, cold": lambda: Implicit(GD(0.4, 3, momentum=0.5), CG(2), warm_start=False),
    "CG, y left alone": lambda: Implicit(None, CG(2)),
    "Neumann": lambda: Implicit(Adam(0.1, 3), Neumann(3, 0.3)),
    "Direct": lambda: Implicit(SignGD(0.05, 3), Direct()),
    "RMSprop": lambda: Implicit(TorchOptim(RMSPROP, 3, lr=0.01), CG(2)),
    "LBFGS": lambda: Implicit(TorchOptim(LBFGS, 2, lr=0.3, max_iter=2), CG(2)),
    "Unrolled": lambda: Unrolled(GD(0.4, 3, momentum=0.5)),
    "Unrolled, recompute": lambda: Unrolled(Adam(0.1, 3), recompute=True),
    "Unrolled, truncated": lambda: Unrolled(Adam(0.1, 3), truncate=2),
    "Unrolled, cold": lambda: Unrolled(GD(0.4, 3), warm_start=False),
}
MINIMAX: dict[str, Callable[[], Estimator]] = {
    "Danskin": lambda: Danskin(GD(0.4, 3, momentum=0.5)),
    "Danskin, cold": lambda: Danskin(SignGD(0.05, 3), warm_start=False),
    "Danskin, Adam": lambda: Danskin(TorchOptim(torch.optim.Adam, 3, lr=0.1)),
    "Unrolled minimax": lambda: Unrolled(GD(0.4, 3)),
}
ALL = {**BILEVEL, **MINIMAX}
Data = dict[str, Any]


def case(name: str) -> tuple[Estimator, Data]:
    if name in MINIMAX:
        q = quadratic_minimax()
        return ALL[name]().bind(q.problem), {"batch": q.batch}
    q = quadratic_bilevel(curved=True)
    return ALL[name]().bind(q.problem), {"lower": q.lower_batch, "upper": q.upper_batch}


def gradients(estimator: Estimator) -> tuple[Tensor | None, ...]:
    return tuple(None if p.grad is None else p.grad.clone() for p in estimator.problem.upper_parameters)


def twin_of(estimator: Estimator) -> Estimator:
    """A deep copy, gradients included."""
    twin = copy.deepcopy(estimator)
    for p, gradient in zip(twin.problem.upper_parameters, gradients(estimator), strict=True):
        p.grad = gradient
    return twin


def step(estimator: Estimator, lr: float = 0.05) -> None:
    with torch.no_grad():
        for p in estimator.problem.upper_parameters:
            p -= lr * p.grad
            p.grad = None


def everything(estimator: Estimator) -> str:
    """All that a call could change, down to the last digit; oracle counts aside."""
    state = estimator.state_dict()
    del state["counts"]
    bits = [p.detach().numpy().tobytes() for p in (*estimator.problem.upper_parameters, *estimator.problem.y)]
    torch.set_printoptions(precision=17)
    try:
        return f"{bits} {gradients(estimator)} {state} {torch.get_rng_state().sum()} {estimator.last}"
    finally:
        torch.set_printoptions(profile="default")
