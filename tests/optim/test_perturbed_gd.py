"""Perturbed gradient descent: reductions, a reference loop, the timer, the value test, the draw."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchbilevel.optim import Event, PerturbedGD
from torchbilevel.tensors import ball, mix_seed

LEAST = math.sqrt(2.0)  # |x2| at the two minima of the saddle function, where its value is -1


def saddle(x: Tensor) -> Tensor:
    return x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4


def gradient(x: Tensor) -> Tensor:
    return torch.stack((2 * x[0], x[1] ** 3 - 2 * x[1]))


def at(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64, requires_grad=True)


def closure_of(optimizer: torch.optim.Optimizer, x: Tensor, sign: float = 1.0) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sign * saddle(x)
        loss.backward()
        return loss

    return closure


def scripted(optimizer: PerturbedGD, x: Tensor, slope: float, loss: float) -> None:
    """One step with a gradient and a loss as told."""
    x.grad = torch.full_like(x, slope)
    optimizer.step(lambda: loss)


# Reductions


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_radius_zero_is_sgd_bitwise_at_every_step(foreach: bool, maximize: bool) -> None:
    def build() -> tuple[list[Tensor], list[dict[str, Any]]]:
        torch.manual_seed(0)
        params = [torch.randn(4, 3), torch.randn(()), torch.randn(2), torch.zeros(3), torch.ones(2)]
        params = [p.double().requires_grad_() for p in params]
        groups = [{"params": params[:2]}, {"params": params[2:4], "lr": 0.03}, {"params": params[4:], "lr": 0.0}]
        return params, groups

    mine, groups = build()
    rule = PerturbedGD(groups, 0.01, radius=0.0, grad_tol=math.inf, escape_steps=1, maximize=maximize)
    theirs, groups = build()
    sgd = torch.optim.SGD(groups, 0.01, maximize=maximize, foreach=foreach)
    for _ in range(50):
        for optimizer, params in ((rule, mine), (sgd, theirs)):
            optimizer.zero_grad()
            a, b, c, _, e = params  # the fourth never has a gradient
            (torch.sin(a).sum() * b + torch.cos(c).prod() + e.sum() * b).backward()
            optimizer.step()
        assert all(torch.equal(s, t) for s, t in zip(mine, theirs, strict=True))
    assert rule.events == [] and rule.steps == 50


def test_reference_loop_step_for_step() -> None:
    lr, r, eps, t_thres, seed = 0.1, 0.05, 0.02, 7, 11
    x = at(0.3, 1e-3)
    optimizer = PerturbedGD([x], lr, radius=r, grad_tol=eps, escape_steps=t_thres, seed=seed)
    z, t_noise, perturbed = x.detach().clone(), -t_thres - 1, []
    for t in range(200):
        closure_of(optimizer, x)()
        optimizer.step()
        v = gradient(z)
        if v.norm() <= eps and t - t_noise > t_thres:
            z, t_noise = z + ball((z,), r, mix_seed(seed, t, 0))[0], t
            perturbed.append(t)
        else:
            z = z - lr * v
        torch.testing.assert_close(x.detach(), z, rtol=0, atol=1e-13)
    assert [e.step for e in optimizer.events] == perturbed and len(perturbed) >= 3
    assert {e.kind for e in optimizer.events} == {"perturbation"}


def test_noise_is_one_ball_over_all_parameters_together() -> None:
    x, y = at(0.0, 0.0), torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = PerturbedGD([{"params": [x]}, {"params": [y], "lr": 7.0}], 0.1, radius=0.5, grad_tol=0.0, seed=2)
    x.grad, y.grad = torch.zeros_like(x), torch.zeros_like(y)
    optimizer.step()
    draw = ball((x, y), 0.5, mix_seed(2, 0, 0))
    assert torch.equal(x.detach(), draw[0]) and torch.equal(y.detach(), draw[1])


# Escape


@pytest.mark.parametrize("seed", range(10))
def test_leaves_the_saddle_where_gradient_descent_stays(seed: int) -> None:
    x, y = at(0.0, 0.0), at(0.0, 0.0)
    perturbed, plain = PerturbedGD([x], 0.1, radius=1e-2, grad_tol=1e-3, seed=seed), torch.optim.SGD([y], 0.1)
    for _ in range(150):
        perturbed.step(closure_of(perturbed, x))
        plain.step(closure_of(plain, y))
    assert torch.equal(y.detach(), torch.zeros(2, dtype=torch.float64))
    assert abs(abs(float(x[1].detach())) - LEAST) < 2e-2 and abs(float(x[0].detach())) < 2e-2


# Timer and threshold


@pytest.mark.parametrize("escape_steps", [1, 2, 7])
def test_timer_first_noise_at_step_zero_then_strictly_more_than_escape_steps_apart(escape_steps: int) -> None:
    x = at(1.0, 1.0)
    optimizer = PerturbedGD([x], 0.1, radius=0.1, grad_tol=math.inf, escape_steps=escape_steps)
    for _ in range(30):
        scripted(optimizer, x, slope=1.0, loss=0.0)
    assert [e.step for e in optimizer.events] == list(range(0, 30, escape_steps + 1))
    assert all(e == Event(e.step, "perturbation", math.sqrt(2.0)) for e in optimizer.events)


@pytest.mark.parametrize(("grad_tol", "fires"), [(5.0, True), (math.nextafter(5.0, 0.0), False), (6.0, True)])
def test_threshold_is_the_norm_over_all_parameters_with_equality(grad_tol: float, fires: bool) -> None:
    x, y = at(0.0), at(0.0)
    optimizer = PerturbedGD([{"params": [x]}, {"params": [y], "lr": 0.5}], 0.1, radius=0.1, grad_tol=grad_tol)
    x.grad, y.grad = torch.full_like(x, 3.0), torch.full_like(y, 4.0)
    optimizer.step()
    assert bool(optimizer.events) is fires
    if not fires:
        assert (float(x.detach()), float(y.detach())) == (-0.1 * 3.0, -0.5 * 4.0)


def test_without_value_test_the_claim_is_stationary_in_the_window_and_none_after_it() -> None:
    x = at(1.0, 1.0)
    optimizer = PerturbedGD([x], 0.1, radius=0.1, grad_tol=1e-3, escape_steps=3)
    claims, phases = [], []
    for slope in [1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]:
        scripted(optimizer, x, slope, loss=0.0)
        claims.append((optimizer.result().claim, optimizer.result().step))
        phases.append(optimizer.phase)
    window = [("stationary", 1)] * 4
    assert claims == [("running", 1), *window, ("running", 6), ("running", 7), ("stationary", 7)]
    assert phases == ["descent", *["escape"] * 4, "descent", "descent", "escape"]


# Value test


def test_value_test_escapes_the_saddle_and_ends_at_the_minimum() -> None:
    options: dict[str, Any] = {"radius": 1e-2, "grad_tol": 1e-3, "value_test": True, "value_tol": 1e-3}
    x = at(0.0, 0.0)
    optimizer = PerturbedGD([x], 0.1, **options, stop=True)
    points = {}
    while not optimizer.done and optimizer.steps < 1000:
        points[optimizer.steps] = x.detach().clone()
        optimizer.step(closure_of(optimizer, x))
    kinds = [e.kind for e in optimizer.events]
    assert kinds == ["perturbation", "escaped", "perturbation", "escape test passed"]
    (_, escaped, last, passed), result = optimizer.events, optimizer.result()
    assert escaped.step == 50 and escaped.value < -0.9
    assert passed.step == last.step + 50 and abs(passed.value) < 1e-3
    assert (result.claim, result.step) == ("escape test passed", last.step)
    assert torch.equal(result.x[0], points[last.step]) and torch.equal(x.detach(), points[last.step])
    assert abs(abs(float(x[1].detach())) - LEAST) < 1e-3
    with pytest.raises(RuntimeError, match="has stopped with the claim 'escape test passed'"):
        optimizer.step(closure_of(optimizer, x))
    assert torch.equal(x.detach(), points[last.step])

    y = at(0.0, 0.0)
    going = PerturbedGD([y], 0.1, **options)
    for step in range(passed.step + 52):
        points[step] = y.detach().clone()
        going.step(closure_of(going, y))
    assert going.events[:4] == optimizer.events and len(going.events) == 6 and not going.done
    assert torch.equal(going.result().x[0], points[going.events[4].step])  # the second test passed as well


@pytest.mark.parametrize(
    ("drop", "kind"),
    [(0.25, "escaped"), (math.nextafter(0.25, 0.0), "escape test passed"), (-1.0, "escape test passed")],
)
@pytest.mark.parametrize("maximize", [False, True])
def test_value_test_compares_after_exactly_escape_steps(drop: float, kind: str, maximize: bool) -> None:
    x = at(0.0, 0.0)
    optimizer = PerturbedGD(
        [x], 0.1, radius=0.1, grad_tol=1.0, escape_steps=4, value_test=True, value_tol=0.25, maximize=maximize
    )
    sign = -1.0 if maximize else 1.0
    scripted(optimizer, x, slope=0.0, loss=0.0)
    for _ in range(3):
        scripted(optimizer, x, slope=2.0, loss=sign * -9.0)  # too early to count
    before = x.detach().clone()
    assert len(optimizer.events) == 1 and optimizer.result().claim == "stationary"
    scripted(optimizer, x, slope=0.5, loss=sign * -drop)
    assert optimizer.events[1:] == [Event(4, kind, -drop)] and optimizer.phase == "descent"
    assert optimizer.result().claim == ("running" if kind == "escaped" else kind)
    assert torch.equal(x.detach(), before + sign * -0.1 * 0.5)  # the step of the test is a gradient step
    scripted(optimizer, x, slope=0.5, loss=0.0)
    assert optimizer.events[2].step == 5  # and the next displacement may follow at once


def test_claim_of_a_passed_test_stands_until_a_later_attempt_succeeds() -> None:
    x = at(0.0, 0.0)
    optimizer = PerturbedGD([x], 0.1, radius=0.1, grad_tol=1.0, escape_steps=2, value_test=True, value_tol=0.5)
    claims = []
    for loss in [0.0, 0.0, 0.0, 0.0, 0.0, -1.0, -1.0]:  # displaced at 0 (fails at 2), 3 (succeeds at 5), 6
        scripted(optimizer, x, 0.0, loss)
        claims.append((optimizer.result().claim, optimizer.result().step))
    passed = [("escape test passed", 0)] * 3
    assert claims == [("stationary", 0), ("stationary", 0), *passed, ("running", 6), ("stationary", 6)]


def test_stop_goes_back_in_all_groups_and_leaves_later_ones() -> None:
    x, y, z = at(1.0, 2.0), at(3.0), at(4.0)
    optimizer = PerturbedGD(
        [{"params": [x]}, {"params": [y]}], 0.1,
        radius=0.1, grad_tol=1.0, escape_steps=2, value_test=True, value_tol=0.5, stop=True,
    )  # fmt: skip
    for step in range(3):
        if step == 1:
            optimizer.add_param_group({"params": [z]})
        for p in (x, y, z):
            p.grad = torch.zeros_like(p)
        optimizer.step(lambda: 0.0)
    assert optimizer.done and [p.tolist() for p in (x, y, z)] == [[1.0, 2.0], [3.0], [4.0]]


# Closure


def test_closure_runs_once_at_the_start_with_gradients_enabled() -> None:
    x, calls = at(0.5, 0.5), []
    optimizer = PerturbedGD([x], 0.1, radius=0.1, grad_tol=1e-9)
    loss = torch.zeros(())

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        calls.append(x.detach().clone())
        x.grad = torch.ones_like(x)
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is loss
    assert len(calls) == 1 and torch.equal(calls[0], torch.full_like(x, 0.5))
    assert torch.equal(x.detach(), calls[0] - 0.1)


@pytest.mark.parametrize("closure", [None, lambda: None])
def test_value_test_without_a_loss_is_refused_and_nothing_moves(closure: Callable[[], None] | None) -> None:
    x = at(0.0, 0.0)
    optimizer = PerturbedGD([x], 0.1, radius=0.1, grad_tol=1.0, value_test=True, value_tol=0.5)
    x.grad = torch.zeros_like(x)
    with pytest.raises(ValueError, match=r"pass step\(\) a closure"):
        optimizer.step(closure)
    assert x.tolist() == [0.0, 0.0] and optimizer.events == []


# The draw


def test_displacement_is_uniform_in_the_ball() -> None:
    draws, n, radius = 1000, 3, 0.2
    found = []
    for seed in range(draws):
        x, y = at(0.0, 0.0), at(0.0)
        optimizer = PerturbedGD([x, y], 0.1, radius=radius, grad_tol=1.0, seed=seed)
        x.grad, y.grad = torch.zeros_like(x), torch.zeros_like(y)
        optimizer.step()
        found.append(torch.cat((x.detach(), y.detach())) / radius)
    xi = torch.stack(found)
    u = xi.norm(dim=1) ** n  # uniform on [0, 1]
    assert float(u.max()) <= 1.0
    assert abs(float(u.mean()) - 0.5) < 3 / math.sqrt(12 * draws)
    assert abs(float((u**2).mean()) - 1 / 3) < 3 * math.sqrt(4 / 45 / draws)
    # Per coordinate: mean 0, variance 1 / (n + 2).
    assert bool((xi.mean(dim=0).abs() < 3 / math.sqrt((n + 2) * draws)).all())
    assert bool(((xi**2).mean(dim=0) - 1 / (n + 2)).abs().max() < 0.03)


# Arguments

GOOD: dict[str, Any] = {"lr": 0.1, "radius": 0.1, "grad_tol": 0.1}
TESTED: dict[str, Any] = {**GOOD, "value_test": True, "value_tol": 0.1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**GOOD, "lr": -0.1}, "lr must be non-negative and finite, got -0.1"),
        ({**GOOD, "lr": math.nan}, "lr must be non-negative and finite, got nan"),
        ({**GOOD, "lr": math.inf}, "lr must be non-negative and finite, got inf"),
        ({**GOOD, "radius": -1.0}, "radius must be non-negative and finite, got -1.0"),
        ({**GOOD, "radius": math.nan}, "radius must be non-negative and finite, got nan"),
        ({**GOOD, "radius": math.inf}, "radius must be non-negative and finite, got inf"),
        ({**GOOD, "grad_tol": -1e-3}, "grad_tol must be non-negative, got -0.001"),
        ({**GOOD, "grad_tol": math.nan}, "grad_tol must be non-negative, got nan"),
        ({**GOOD, "escape_steps": 0}, "escape_steps must be a positive integer, got 0"),
        ({**GOOD, "escape_steps": 2.5}, "escape_steps must be a positive integer, got 2.5"),
        ({**GOOD, "escape_steps": True}, "escape_steps must be a positive integer, got True"),
        ({**TESTED, "escape_steps": 1}, "escape_steps must be at least 2 with value_test=True, got 1"),
        ({**TESTED, "value_tol": None}, "value_tol must be positive and finite with value_test=True, got None"),
        ({**TESTED, "value_tol": 0.0}, "value_tol must be positive and finite with value_test=True, got 0.0"),
        ({**TESTED, "value_tol": math.nan}, "value_tol must be positive and finite with value_test=True, got nan"),
        ({**GOOD, "value_tol": 0.1}, "value_tol must be None without value_test=True, got 0.1"),
        ({**GOOD, "stop": True}, "stop must be False without value_test=True, got True"),
    ],
)
def test_bad_argument_is_named_with_its_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        PerturbedGD([at(0.0)], **options)
    assert str(error.value) == message


@pytest.mark.parametrize("options", [{}, {"radius": 0.0}, {"grad_tol": 0.0}, {"grad_tol": math.inf}, {"lr": 0.0}])
def test_ends_of_the_ranges_are_allowed(options: dict[str, Any]) -> None:
    PerturbedGD([at(0.0)], **{**GOOD, "escape_steps": 1, **options})


def test_bad_lr_of_a_group_is_refused() -> None:
    with pytest.raises(ValueError, match="lr must be non-negative and finite, got -1.0"):
        PerturbedGD([{"params": [at(0.0)], "lr": -1.0}], **GOOD)
    optimizer = PerturbedGD([at(0.0)], **GOOD)
    with pytest.raises(ValueError, match="lr must be non-negative and finite, got -2.0"):
        optimizer.add_param_group({"params": [at(0.0)], "lr": -2.0})
    assert len(optimizer.param_groups) == 1


def test_groups_that_disagree_on_maximize_are_refused_with_value_test() -> None:
    groups = [{"params": [at(0.0)]}, {"params": [at(0.0)], "maximize": True}]
    PerturbedGD(groups, **GOOD)
    groups = [{"params": [at(0.0)]}, {"params": [at(0.0)], "maximize": True}]
    with pytest.raises(ValueError, match="maximize must be the same in all groups"):
        PerturbedGD(groups, **TESTED)
