"""The whole grid: every estimator with every rule either runs through its phases and resumes, or is refused at once."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.problems import flat, generator, quadratic_bilevel, quadratic_minimax
from torchbilevel import (
    CG,
    GD,
    Adam,
    BatchSizes,
    Danskin,
    Decay,
    Direct,
    Estimator,
    Hybrid,
    Implicit,
    Method,
    Neumann,
    NonconvexLinearProblem,
    Penalty,
    Plain,
    PullbackSTORM,
    RandomTruncation,
    SGDSolve,
    SharedInverse,
    SignGD,
    Spider,
    Storm,
    TorchOptim,
    Unrolled,
    optim,
    sample,
)
from torchbilevel.estimators.hybrid_map import HybridMap
from torchbilevel.estimators.matrices import MatrixBounds
from torchbilevel.estimators.rsvrb import Rsvrb
from torchbilevel.estimators.saba import Saba
from torchbilevel.estimators.soba import Soba
from torchbilevel.estimators.stable import Stable

SIZES = BatchSizes(upper=4, lower=4)
Make = Callable[[], Estimator]
Rule = Callable[[Any], torch.optim.Optimizer]

BILEVEL: dict[str, Make] = {
    "CG": lambda: Implicit(GD(0.4, 3, momentum=0.5), CG(2)),
    "CG to a tolerance": lambda: Implicit(GD(0.5, 80, tol=5e-5), CG(9)),
    "Direct": lambda: Implicit(SignGD(0.05, 3), Direct()),
    "torch.optim": lambda: Implicit(TorchOptim(torch.optim.RMSprop, 3, lr=0.01), CG(2)),
    "shared inverse": lambda: SharedInverse(GD(0.4, 3)),
    "unrolled": lambda: Unrolled(Adam(0.1, 3)),
    "unrolled, samples": lambda: Unrolled(GD(0.4, 3), batch_sizes=SIZES),
    "Neumann, samples": lambda: Implicit(GD(0.4, 3), Neumann(3, 0.3), batch_sizes=SIZES, decay=Decay()),
    "SGD on z": lambda: Implicit(GD(0.4, 3), SGDSolve(3, 0.3), batch_sizes=SIZES),
    "random term, with x": lambda: Implicit(
        GD(0.4, 1), RandomTruncation(3, 0.3), recursion=Plain(simultaneous=True), batch_sizes=SIZES
    ),
    "Storm": lambda: Implicit(GD(0.4, 1), Neumann(3, 0.3), recursion=Storm(0.3), batch_sizes=SIZES, decay=Decay()),
    "Spider": lambda: Implicit(
        GD(0.4, 3), Neumann(3, 0.3), recursion=Spider(2, "hypergradient", anchors="after"), batch_sizes=SIZES
    ),
    "Spider, gradients": lambda: Implicit(GD(0.4, 3), Neumann(3, 0.3), recursion=Spider(2), batch_sizes=SIZES),
    "Hybrid": lambda: Implicit(GD(0.4, 1), Neumann(3, 0.3), recursion=Hybrid(0.3), batch_sizes=SIZES),
    "Soba": lambda: Soba(GD(0.3, 1), batch_sizes=SIZES, decay=Decay()),
    "Saba": lambda: Saba(GD(0.1, 1), batch_sizes=SIZES),
    "Saba, shuffled": lambda: Saba(GD(0.1, 1), batch_sizes=SIZES, shuffle=True),
    "Penalty": lambda: Penalty(GD(0.2, 3), multiplier=5.0, batch_sizes=SIZES),
    "Stable": lambda: Stable(GD(0.3, 1), weight=0.3, bounds=MatrixBounds(0.1), batch_sizes=SIZES),
    "Rsvrb": lambda: Rsvrb(GD(0.3, 1), weight=0.3, bounds=MatrixBounds(0.1), batch_sizes=SIZES, decay=Decay()),
}
MINIMAX: dict[str, Make] = {
    "Danskin": lambda: Danskin(GD(0.4, 3)),
    "Danskin to a tolerance": lambda: Danskin(GD(0.5, 80, tol=5e-5)),
    "Danskin, samples": lambda: Danskin(GD(0.4, 3), batch_sizes=SIZES),
    "with x": lambda: Danskin(GD(0.4, 1), recursion=Plain(simultaneous=True), batch_sizes=SIZES),
    "minimax Storm": lambda: Danskin(GD(0.4, 1), recursion=Storm(0.3), batch_sizes=SIZES),
    "minimax Spider": lambda: Danskin(GD(0.4, 3), recursion=Spider(2), batch_sizes=SIZES),
    "minimax Hybrid": lambda: Danskin(GD(0.4, 1), recursion=Hybrid(0.3), batch_sizes=SIZES),
}
LINEAR: dict[str, Make] = {"map": lambda: HybridMap(weight=0.3, batch_sizes=BatchSizes(upper=4, jvp=4))}
# grad_tol = 9 makes every rule escape from the first step on.
SEARCH = {"grad_tol": 9.0, "curvature_tol": 0.1, "step_length": 0.1}
PROBES = {**SEARCH, "radius": 1e-3, "probe_lr": 0.2, "search_steps": 3}
RULES: dict[str, Rule] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.02, momentum=0.5),
    "Adam": lambda p: torch.optim.Adam(p, 0.02),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=2),
    "NormalizedGD": lambda p: optim.NormalizedGD(p, 0.02),
    "AveragedGD": lambda p: optim.AveragedGD(p, 0.02, weight=0.5),
    "PerturbedGD": lambda p: optim.PerturbedGD(p, 0.02, radius=0.1, grad_tol=9.0, escape_steps=2),
    "value test": lambda p: optim.PerturbedGD(
        p, 0.02, radius=0.1, grad_tol=9.0, escape_steps=2, value_test=True, value_tol=1e-3
    ),
    "Perturbed": lambda p: optim.Perturbed(torch.optim.Adam(p, 0.02), radius=0.1, grad_tol=9.0, escape_steps=2),
    "Pullback": lambda p: optim.Pullback(p, 0.02, 0.1, radius=0.1, grad_tol=9.0, escape_steps=2, mean_movement=1e-3),
    "NEON": lambda p: optim.NEON(p, 0.02, **PROBES),
    "NEON, values": lambda p: optim.NEON(p, 0.02, **PROBES, test="value", value_tol=1e-4),
    "NEON2": lambda p: optim.NEON2(p, 0.02, **PROBES),
    "NegativeCurvature": lambda p: optim.NegativeCurvature(p, 0.02, **SEARCH),
    "CubicNewton": lambda p: optim.CubicNewton(p, cubic=100.0, grad_tol=1e-3),
}
# What is refused, and why.
NO_TOL = "give the lower solver a tol below value_tol"
ONE_Y = "has one y for all of"
WITH_X = ("random term, with x", "Storm", "Hybrid", "with x", "minimax Storm", "minimax Hybrid")
WITH_X += ("Soba", "Saba", "Saba, shuffled", "Stable", "Rsvrb")
ACCURATE = ("CG to a tolerance", "Danskin to a tolerance")


def reason(estimator: str, rule: str) -> str | None:
    if rule in ("value test", "NEON, values") and estimator not in ACCURATE:
        return NO_TOL
    if rule in ("NEON", "NEON2") and estimator in WITH_X:
        return ONE_Y
    return None


def mapping(upper: Any, batch: Any) -> torch.Tensor:
    return upper.flat().tanh() + batch[0].mean(0) * upper.flat()[0].sin()


def build(estimator: str, rule: str) -> tuple[Method, dict[str, Any]]:
    if estimator in MINIMAX:
        m = quadratic_minimax()
        parts = m.problem, MINIMAX[estimator]()
        data: dict[str, Any] = {"batch": m.batch}
    elif estimator in LINEAR:
        upper, center = quadratic_minimax().modules()[0], torch.zeros(4, dtype=torch.float64)
        parts = NonconvexLinearProblem(upper, mapping, center=center), LINEAR[estimator]()
        data = {"batch": (generator(1)(8, 4),)}
    else:
        b = quadratic_bilevel(curved=True)
        parts = b.problem, BILEVEL[estimator]()
        data = {"lower": b.lower_batch, "upper": b.upper_batch}
    if parts[1].batch_sizes is not None:
        data = {name: sample(batch, seed=3) for name, batch in data.items()}
    return Method(*parts, RULES[rule](parts[0].upper_parameters)), data


def advance(method: Method, data: dict[str, Any], n: int) -> None:
    for _ in range(n):
        method.zero_grad()
        method.backward(**data)
        method.step()


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("estimator", [*BILEVEL, *MINIMAX, *LINEAR])
def test_every_pair_runs_and_resumes_or_is_refused(estimator: str, rule: str) -> None:
    why = reason(estimator, rule)
    if why is not None:
        with pytest.raises(ValueError, match=why):
            build(estimator, rule)
        return
    method, data = build(estimator, rule)
    start = flat(method.problem.x).clone()
    advance(method, data, 2)
    file = io.BytesIO()
    sources = {name: s.state_dict() for name, s in data.items() if callable(s)}
    torch.save((method.state_dict(), method.problem.upper.state_dict(), sources), file)
    advance(method, data, 2)
    x = flat(method.problem.x)
    assert bool(torch.isfinite(x).all()) and not torch.equal(x, start)
    assert len(method.result().x) == len(method.problem.x)
    other, others = build(estimator, rule)
    file.seek(0)
    state, upper, sources = torch.load(file, weights_only=True)
    other.problem.upper.load_state_dict(upper)
    other.load_state_dict(state)
    for name, s in sources.items():
        others[name].load_state_dict(s)
    advance(other, others, 2)
    assert torch.equal(flat(other.problem.x), x)
    assert torch.equal(flat(other.problem.y), flat(method.problem.y))
    assert other.events == method.events


def test_a_rule_with_an_estimate_of_its_own_is_refused() -> None:
    problem = quadratic_minimax().problem
    options: dict[str, Any] = {"radius": 0.1, "grad_tol": 0.1, "escape_steps": 5, "mean_movement": 0.1}
    sizes = {"anchor_size": 8, "batch_size": 2}
    rule = PullbackSTORM(problem.upper_parameters, 0.1, 0.1, **options, **sizes, weight=0.5)
    with pytest.raises(ValueError, match="PullbackSTORM estimates the gradient itself, .*recursion=Storm"):
        Method(problem, Danskin(GD(0.4, 3)), rule)
