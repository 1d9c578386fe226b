"""What every outer rule does alike beyond what torch asks of it: refusals, resting groups, noise, checkpoints."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchbilevel.optim import Perturbed, PerturbedGD, Pullback, Rule

SETTINGS: dict[str, Any] = {"radius": 0.1, "grad_tol": 0.5, "escape_steps": 5, "seed": 3}
TESTED = {**SETTINGS, "value_test": True, "value_tol": 1e-3}

Build = Callable[..., Rule]
RULES: dict[str, Build] = {
    "PerturbedGD": lambda params, lr=0.1, **kw: PerturbedGD(params, lr, **{**SETTINGS, **kw}),
    "PerturbedGD, value test": lambda params, lr=0.1, **kw: PerturbedGD(params, lr, **{**TESTED, **kw}),
    "Perturbed(SGD)": lambda params, lr=0.1, **kw: Perturbed(
        torch.optim.SGD(params, lr, momentum=0.5), **{**SETTINGS, **kw}
    ),
    "Perturbed(Adam)": lambda params, lr=0.1, **kw: Perturbed(torch.optim.Adam(params, lr), **{**SETTINGS, **kw}),
    "Pullback": lambda params, lr=0.1, value_test=False, value_tol=None, **kw: Pullback(
        params, lr, 0.1, **{**SETTINGS, "mean_movement": 1e-3, **kw}
    ),
}
every_rule = pytest.mark.parametrize("build", RULES.values(), ids=RULES.keys())


def start() -> list[Tensor]:
    """Exactly a saddle, in two tensors, one of them 0-d."""
    return [torch.zeros(3, dtype=torch.float64), torch.zeros((), dtype=torch.float64)]


def loss_of(params: list[Tensor]) -> Tensor:
    a, b = params
    return (a**2).sum() / 2 - b**2 + b**4 / 4


def walk(rule: torch.optim.Optimizer, params: list[Tensor], steps: int) -> list[Tensor]:
    """Run, and return all iterates in one list."""
    for p in params:
        p.requires_grad_()

    def closure() -> Tensor:
        rule.zero_grad()
        loss = loss_of(params)
        loss.backward()
        return loss

    path = []
    for _ in range(steps):
        rule.step(closure)
        path += [p.detach().clone() for p in params]
    return path


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def story(rule: Rule) -> tuple[Any, ...]:
    """Everything that a rule remembers, in comparable form."""
    result = rule.result()
    return rule.steps, rule.phase, rule.events, rule.done, result.claim, result.step, [t.tolist() for t in result.x]


def set_gradients(params: list[Tensor], *gradients: Any) -> None:
    for p, g in zip(params, gradients, strict=True):
        p.grad = None if g is None else torch.as_tensor(g, dtype=p.dtype)


# Refusals


@every_rule
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("lr", [0.1, 0.0])
def test_gradient_that_is_not_finite_is_refused_and_nothing_moves(build: Build, bad: float, lr: float) -> None:
    params = start()
    rule = build([{"params": params[:1]}, {"params": params[1:], "lr": lr}])
    walk(rule, params, 8)
    before = [p.detach().clone() for p in params], copy.deepcopy(rule.state_dict()["state"]), story(rule)
    set_gradients(params, [1.0, 2.0, 3.0], bad)
    with pytest.raises(FloatingPointError, match=r"parameter 0 of group 1, of shape \(\)"):
        rule.step(lambda: 0.0)
    assert equal(params, before[0]) and story(rule) == before[2]
    assert str(rule.state_dict()["state"]) == str(before[1])


@every_rule
def test_finite_gradient_whose_square_overflows_is_large_and_no_error(build: Build) -> None:
    params = start()
    rule = build(params)
    set_gradients(params, [1e200, 0.0, 0.0], 0.0)
    rule.step(lambda: 0.0)
    assert rule.events == [] and rule.steps == 1


@every_rule
def test_loss_that_is_not_finite_is_refused_and_nothing_moves(build: Build) -> None:
    params = start()
    rule = build(params)
    set_gradients(params, [1.0, 2.0, 3.0], 1.0)
    with pytest.raises(FloatingPointError, match="loss must be finite, got nan"):
        rule.step(lambda: torch.tensor(float("nan")))
    assert equal(params, start()) and rule.steps == 0


# What moves


@every_rule
def test_group_with_lr_zero_rests_and_does_not_count_in_the_norm(build: Build) -> None:
    params = start()
    rule = build([{"params": params[:1], "lr": 0.0}, {"params": params[1:]}])
    set_gradients(params, [9.0, 9.0, 9.0], 0.0)
    rule.step(lambda: 0.0)
    assert [e.kind for e in rule.events] == ["perturbation"] and rule.events[0].value == 0.0
    assert torch.equal(params[0], start()[0]) and float(params[1]) != 0.0


@every_rule
def test_parameter_without_gradient_rests(build: Build) -> None:
    params = start()
    rule = build(params)
    set_gradients(params, None, 0.0)
    rule.step(lambda: 0.0)
    assert torch.equal(params[0], start()[0]) and float(params[1]) != 0.0


# Noise


@every_rule
def test_noise_has_its_own_seed_and_leaves_the_global_random_state(build: Build) -> None:
    paths = []
    for global_seed, seed in [(0, 3), (1, 3), (0, 4)]:
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        params = start()
        paths.append(walk(build(params, seed=seed), params, 20))
        assert torch.equal(torch.get_rng_state(), state)
    assert equal(paths[0], paths[1]) and not equal(paths[0], paths[2])


@every_rule
def test_each_step_draws_anew(build: Build) -> None:
    params = start()
    rule = build(params, escape_steps=2)
    moves = []
    for _ in range(7):
        set_gradients(params, [0.0, 0.0, 0.0], 0.0)
        before = params[0].clone()
        rule.step(lambda: 0.0)
        moves.append(params[0] - before)
    drawn = [moves[e.step] for e in rule.events if e.kind == "perturbation"]
    assert len(drawn) == 3 and all(not torch.equal(drawn[0], d) for d in drawn[1:])


# Checkpoints


def through_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_rule
@pytest.mark.parametrize("steps", [0, 1, 3, 5, 6, 7, 40])
def test_resumed_run_equals_the_uninterrupted_one_bitwise(build: Build, steps: int) -> None:
    params = start()
    rule = build(params)
    walk(rule, params, steps)
    saved, point = through_file(rule.state_dict()), [p.detach().clone() for p in params]
    path = walk(rule, params, 40)
    others = {"seed": 9, "radius": 0.3, "grad_tol": 0.1, "escape_steps": 9}
    tests = {"value_test": True, "value_tol": 9.0, "stop": True}
    again = build(point, lr=0.7, **others, **tests)  # all replaced by what is loaded
    again.load_state_dict(saved)
    if steps == 3:
        assert again.phase == "escape"
    assert equal(walk(again, point, 40), path) and story(again) == story(rule)


@every_rule
def test_loading_leaves_the_checkpoint_alone(build: Build) -> None:
    params = start()
    rule = build(params)
    walk(rule, params, 3)
    saved = through_file(rule.state_dict())
    before = str(saved)
    again = build(params)
    again.load_state_dict(saved)
    assert again.answer is not None
    for t in again.answer.x:
        t.add_(1.0)
    walk(again, params, 30)
    assert again.events != rule.events and str(saved) == before


@every_rule
def test_foreign_checkpoint_is_refused_and_nothing_changes(build: Build) -> None:
    params = start()
    rule = build(params)
    walk(rule, params, 3)
    own, told = str(rule.state_dict()), story(rule)
    good = build(start(), lr=0.7).state_dict()
    plain = {k: v for k, v in good.items() if k != "rule"}
    incomplete = {k: v for k, v in good["rule"].items() if k != "steps"}
    fewer = build(start()[:1]).state_dict()
    kind = type(rule).__name__
    for bad, message in [
        (plain, rf"must have the entry 'rule' of {kind}.*got \['param_groups', 'state'\]"),
        ({**good, "rule": {**good["rule"], "name": "NEON"}}, f"must come from {kind}.*got one of NEON"),
        ({**good, "rule": 3}, f"must come from {kind}.*got one of 3"),
        ({**good, "rule": incomplete}, "; steps missing"),
        (fewer, "doesn't match the size"),
    ]:
        with pytest.raises(ValueError, match=message):
            rule.load_state_dict(bad)
        assert str(rule.state_dict()) == own and story(rule) == told


@every_rule
def test_result_is_a_copy(build: Build) -> None:
    params = start()
    rule = build(params)
    for _ in range(2):
        told = story(rule)
        for t in rule.result().x:
            t.add_(1.0)
        assert story(rule) == told
        walk(rule, params, 1)
    assert rule.result().claim == "stationary"


class Heavy(Rule):
    """A rule with a memory of its own: heavy ball, one buffer per parameter, and torch state besides."""

    _saved = (*Rule._saved, "buffer")

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {"lr": 0.1}, seed=5)
        self.buffer = tuple(torch.zeros_like(p) for p in self.parameters())

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:
        loss, value = self._evaluate(closure)
        points, gradients, size = self._gradients()
        for p, g, b, xi in zip(points, gradients, self.buffer, self._noise(points, 0.01, draw=1), strict=True):
            b.mul_(0.9).add_(g)
            self.state[p]["seen"] = self.state[p].get("seen", torch.zeros_like(g)).add_(g.abs())
            p.add_(b / (1 + self.state[p]["seen"]), alpha=-0.1).add_(xi)
        self._record("moved", size)
        self.steps += 1
        return loss


def test_subclass_is_saved_loaded_and_copied_by_the_base_class() -> None:
    params = start()
    rule = Heavy(params)
    walk(rule, params, 4)
    saved, point = through_file(rule.state_dict()), [p.detach().clone() for p in params]
    before = str(saved)
    twin, twin_params = copy.deepcopy((rule, params))
    again = Heavy(point)
    again.load_state_dict(saved)
    path = walk(rule, params, 4)
    assert equal(walk(twin, twin_params, 4), path) and story(twin) == story(rule)
    assert equal(walk(again, point, 4), path) and story(again) == story(rule)
    assert str(saved) == before
    with pytest.raises(ValueError, match="must have the entry 'rule' of Heavy"):
        rule.load_state_dict(torch.optim.SGD(start(), 0.1).state_dict())


def test_draws_of_one_step_differ() -> None:
    rule = Heavy(start())
    like = rule.parameters()
    assert not torch.equal(rule._noise(like, 1.0, draw=0)[0], rule._noise(like, 1.0, draw=1)[0])
