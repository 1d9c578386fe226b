"""The wrapper around any torch optimizer: it is that optimizer, except where it displaces."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop, lr_scheduler

from torchbilevel.optim import Perturbed, PerturbedGD

INNER: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "SGD": lambda p: SGD(p, 0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: Adam(p, 0.05, amsgrad=True),
    "AdamW": lambda p: AdamW(p, 0.05, foreach=True),
    "RMSprop": lambda p: RMSprop(p, 0.01, centered=True),
}
every_inner = pytest.mark.parametrize("inner", INNER.values(), ids=INNER.keys())


def start() -> list[Tensor]:
    return [torch.zeros(2, dtype=torch.float64, requires_grad=True)]


def walk(optimizer: Optimizer, params: list[Tensor], steps: int) -> None:
    (x,) = params
    for _ in range(steps):
        optimizer.zero_grad()
        (x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4).backward()
        optimizer.step()


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@every_inner
@pytest.mark.parametrize(("radius", "grad_tol"), [(0.1, 1e-300), (0.0, math.inf)])
def test_is_the_inner_optimizer_bitwise_while_it_never_displaces(
    inner: Callable[[list[Tensor]], Optimizer], radius: float, grad_tol: float
) -> None:
    mine, theirs = start(), start()
    for params in (mine, theirs):
        params[0].data += torch.tensor([1.0, 0.1])
    wrapped, plain = Perturbed(inner(mine), radius=radius, grad_tol=grad_tol), inner(theirs)
    for _ in range(30):
        walk(wrapped, mine, 1)
        walk(plain, theirs, 1)
        assert equal(mine, theirs)
    assert wrapped.events == [] and str(wrapped.state_dict()["state"]) == str(plain.state_dict()["state"])


@every_inner
@pytest.mark.parametrize("seed", range(3))
def test_leaves_the_saddle_where_the_inner_optimizer_stays(
    inner: Callable[[list[Tensor]], Optimizer], seed: int
) -> None:
    mine, theirs = start(), start()
    walk(Perturbed(inner(mine), radius=1e-2, grad_tol=1e-3, seed=seed), mine, 400)
    walk(inner(theirs), theirs, 400)
    assert equal(theirs, start())
    assert abs(abs(float(mine[0][1].detach())) - math.sqrt(2.0)) < 5e-2


@every_inner
def test_displacement_leaves_the_state_of_the_inner_optimizer(
    inner: Callable[[list[Tensor]], Optimizer],
) -> None:
    params, calls = start(), []
    params[0].data += 0.5
    optimizer = inner(params)
    wrapped = Perturbed(optimizer, radius=0.1, grad_tol=1e-3, escape_steps=2)
    optimizer.register_step_pre_hook(lambda *_: calls.append(wrapped.steps))
    walk(wrapped, params, 3)
    state, before = copy.deepcopy(optimizer.state_dict()), params[0].detach().clone()
    params[0].grad = torch.zeros_like(params[0])
    wrapped.step()
    assert [e.step for e in wrapped.events] == [3] and calls == [0, 1, 2]
    assert str(optimizer.state_dict()) == str(state) and 0 < float((params[0] - before).detach().norm()) <= 0.1
    walk(wrapped, params, 2)
    assert calls == [0, 1, 2, 4, 5]


def test_groups_state_and_defaults_are_live() -> None:
    params, extra = start(), start()
    optimizer = Adam(params, 0.1)
    walk(optimizer, params, 1)
    groups, state = optimizer.param_groups, optimizer.state
    held = state[params[0]]["exp_avg"]
    wrapped = Perturbed(optimizer, radius=0.1, grad_tol=0.0)

    def is_live() -> bool:
        return (
            wrapped.param_groups is optimizer.param_groups
            and wrapped.state is optimizer.state
            and wrapped.defaults is optimizer.defaults
        )

    assert is_live() and optimizer.param_groups is groups and optimizer.state is state
    assert state[params[0]]["exp_avg"] is held and len(groups) == 1
    wrapped.add_param_group({"params": extra, "lr": 0.3})
    assert is_live() and [g["lr"] for g in optimizer.param_groups] == [0.1, 0.3]
    assert wrapped.parameters() == (*params, *extra)
    saved = wrapped.state_dict()
    wrapped.param_groups[1]["lr"] = 0.9
    wrapped.load_state_dict(saved)
    assert is_live() and [g["lr"] for g in optimizer.param_groups] == [0.1, 0.3]
    twin = copy.deepcopy(wrapped)
    assert twin.param_groups is twin.optimizer.param_groups is not optimizer.param_groups
    replacement = [dict(g) for g in groups]
    wrapped.param_groups = replacement
    assert is_live() and optimizer.param_groups is replacement


def test_scheduler_of_the_inner_optimizer_drives_both() -> None:
    params = start()
    optimizer = SGD(params, 1.0)
    schedule = lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    wrapped = Perturbed(optimizer, radius=0.1, grad_tol=0.0)
    twin = copy.deepcopy(wrapped)
    for expected in (-1.0, -1.5, -1.75):
        params[0].grad = torch.ones_like(params[0])
        wrapped.step()
        schedule.step()
        assert params[0].tolist() == [expected] * 2
    twin.parameters()[0].grad = torch.ones_like(params[0])
    twin.step()
    assert params[0].tolist() == [-1.75] * 2 and twin.parameters()[0].tolist() == [-1.0] * 2


def test_checkpoint_holds_that_of_the_inner_optimizer_and_goes_through_it() -> None:
    class Own(SGD):
        loaded: Any = None

        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "own": 7}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.loaded = state_dict["own"]
            assert "rule" not in state_dict
            super().load_state_dict(state_dict)

    optimizer = Own(start(), 0.1)
    wrapped = Perturbed(optimizer, radius=0.1, grad_tol=0.0)
    calls: list[str] = []
    wrapped.register_state_dict_pre_hook(lambda *_: calls.append("save pre"))
    wrapped.register_state_dict_post_hook(lambda *_: calls.append("save post"))
    wrapped.register_load_state_dict_pre_hook(lambda *_: calls.append("load pre"))
    wrapped.register_load_state_dict_post_hook(lambda *_: calls.append("load post"))
    wrapped.load_state_dict(wrapped.state_dict())
    assert optimizer.loaded == 7 and calls == ["save pre", "save post", "load pre", "load post"]


def test_checkpoint_of_another_inner_optimizer_is_refused() -> None:
    saved = Perturbed(Adam(start()), radius=0.1, grad_tol=0.0).state_dict()
    wrapped = Perturbed(SGD(start(), 0.1), radius=0.1, grad_tol=0.0)
    with pytest.raises(ValueError, match=r"must come from Perturbed\(SGD\), got one of Perturbed\(Adam\)"):
        wrapped.load_state_dict(saved)


def test_value_test_stops_at_the_point_before_the_displacement() -> None:
    params = start()
    wrapped = Perturbed(
        Adam(params, 0.01), radius=0.1, grad_tol=1.0, escape_steps=3, value_test=True, value_tol=0.1, stop=True
    )
    for _ in range(4):
        params[0].grad = torch.zeros_like(params[0])
        wrapped.step(lambda: 0.0)
    assert wrapped.done and equal(params, start()) and wrapped.result().claim == "escape test passed"


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda p: torch.optim.LBFGS(p), ValueError, "step without a closure, got LBFGS"),
        (lambda p: PerturbedGD(p, 0.1, radius=0.1, grad_tol=0.1), ValueError, "got PerturbedGD, which is itself"),
        (lambda p: p, TypeError, "must be a torch.optim.Optimizer, got list"),
    ],
)
def test_what_cannot_be_wrapped_is_refused(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Perturbed(build(start()), radius=0.1, grad_tol=0.1)


@pytest.mark.parametrize("options", [{"radius": -1.0}, {"grad_tol": -1.0}, {"seed": 0.5}, {"escape_steps": 0}])
def test_refused_arguments_leave_the_inner_optimizer_as_it_was(options: dict[str, Any]) -> None:
    params = start()
    optimizer = Adam(params, 0.1)
    walk(optimizer, params, 2)
    groups, state, before = optimizer.param_groups, optimizer.state, str(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        Perturbed(optimizer, **{"radius": 0.1, "grad_tol": 0.1, **options})
    assert optimizer.param_groups is groups and optimizer.state is state
    assert str(optimizer.state_dict()) == before
