"""What a step owes to torch: what it moves, what it returns, what it refuses, whom it tells."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import torchbilevel as tb
from tests.conformance.entries import ENTRIES, METHODS, RULES, Entry, Run, over, well
from tests.problems import Split, flat

every = over(ENTRIES)
every_rule = over(RULES)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


# --- what moves ------------------------------------------------------------------------------------------------------


@every_rule
def test_without_any_gradient_nothing_moves(entry: Entry) -> None:
    run = entry.run()
    before = run.standing()
    assert run.optimizer.step(lambda: 0.0) == 0.0
    assert run.standing() == before and run.optimizer.steps == 0


@over(RULES, "zero gradient")
def test_at_a_gradient_of_zero_a_rule_that_does_not_escape_stays(entry: Entry) -> None:
    run = entry.run(**entry.descent)
    before = run.points

    def closure() -> float:
        for p in run.params:
            p.grad = torch.zeros_like(p)
        return 0.0

    for _ in range(3):
        run.optimizer.step(closure)
    assert same(run.points, before)


@every
def test_a_parameter_that_asks_for_no_gradient_rests(entry: Entry) -> None:
    run = entry.run(frozen=1)
    before = run.points
    run.advance(3)
    still, moved = run.points[0], run.points[1]
    assert torch.equal(still, before[0]) and not torch.equal(moved, before[1])
    assert next(run.upper.parameters()).grad is None


@every
def test_with_lr_zero_nothing_moves_and_no_step_is_counted(entry: Entry) -> None:
    run = entry.run()
    run.optimizer.param_groups[0]["lr"] = 0.0
    x = [p.detach().clone() for p in run.params]
    run.advance(3)
    assert same([p.detach() for p in run.params], x) and run.optimizer.events == []
    assert run.optimizer.steps == (0 if isinstance(getattr(run.optimizer, "rule", run.optimizer), tb.optim.Rule) else 3)


@every
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(entry: Entry, set_to_none: bool) -> None:
    run = entry.run()
    run.gradients()
    assert all(p.grad is not None for p in run.params)
    run.optimizer.zero_grad(set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in run.params)


# --- closures --------------------------------------------------------------------------------------------------------


@every
def test_a_closure_is_enabled_to_differentiate_and_its_loss_returned(entry: Entry) -> None:
    run, twin = entry.run(), entry.run()
    returned: list[Any] = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        returned.append(inner())
        return returned[-1]

    losses = []
    for _ in range(3):
        inner = run.closure()
        returned.clear()
        with torch.no_grad():
            losses.append(run.optimizer.step(closure))
            assert not torch.is_grad_enabled()
        assert losses[-1] is returned[0]
    assert [loss.item() for loss in losses] == twin.advance(3) and run.standing() == twin.standing()


@every
def test_data_that_are_not_finite_are_refused_and_nothing_changes(entry: Entry) -> None:
    run = entry.run()
    run.advance(3)
    before = run.standing()
    good = run.data
    run.data = {name: lambda n=None, s=s: tuple(t * torch.nan for t in s.take()) for name, s in good.items()}
    if entry.kind is tb.SABA:
        run.data = {name: tb.sample(tuple(t * torch.nan for t in s.take()), seed=0) for name, s in good.items()}
    with pytest.raises(FloatingPointError, match="finite"):
        run.advance()
    assert run.standing() == before
    run.data = good
    run.advance()


# --- gradients that torch's own optimizers take or refuse ------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_sparse_and_complex_gradients_are_refused_by_name(entry: Entry, kind: str) -> None:
    p = torch.zeros(3, dtype=torch.complex64 if kind == "complex" else torch.float32, requires_grad=True)
    rule = entry.build([p])

    def closure() -> float:
        p.grad = torch.ones_like(p) if kind == "complex" else torch.ones(3).to_sparse()
        return 0.0

    with pytest.raises(ValueError, match=f"got a {kind} one for parameter 0 of group 0"):
        rule.step(closure)
    assert not p.any()


class Table(nn.Module):
    """A vector whose gradient is sparse."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.table = nn.Embedding(n, 1, sparse=True, dtype=torch.float64)

    def flat(self) -> Tensor:
        return self.table(torch.arange(self.table.num_embeddings)).squeeze(1)


def pull(upper: Any, lower: Any, batch: Any) -> Tensor:
    return (lower.flat()[:3] - upper.flat()[:3]).square().sum() + lower.flat().square().sum() + batch[0].sum()


def push(upper: Any, lower: Any, batch: Any) -> Tensor:
    return -pull(upper, lower, batch)


@over(METHODS, "sparse")
@pytest.mark.parametrize("side", ["upper", "lower"])
def test_sparse_derivatives_are_refused_by_name(entry: Entry, side: str) -> None:
    modules = [Table(4) if name == side else Split(torch.ones(4).double(), ((4,),)) for name in ("upper", "lower")]
    rows = tb.sample((torch.zeros(8, 2).double(),), seed=0)
    if entry.problem == "minimax":
        problem: Any = tb.MinimaxProblem(*modules, loss=push)
        data = {"batch": rows}
    else:
        problem = tb.BilevelProblem(*modules, upper_loss=pull, lower_loss=pull)
        data = {"lower": rows, "upper": rows}
    before = flat(problem.x), flat(problem.y)
    with pytest.raises(
        ValueError, match=r"must be dense, got a sparse one .* \(4, 1\): give nn.Embedding sparse=False"
    ):
        entry.build(problem).backward(**data)
    assert torch.equal(flat(problem.x), before[0]) and torch.equal(flat(problem.y), before[1])


@over(RULES, "maximize")
def test_maximize_is_to_minimize_the_negative(entry: Entry) -> None:
    run, twin = entry.run(maximize=True), entry.run()
    for _ in range(12):
        for each, sign in ((run, -1.0), (twin, 1.0)):
            batch = each.draw()

            def closure(each: Run = each, sign: float = sign, batch: Any = batch) -> Tensor:
                each.optimizer.zero_grad()
                loss = sign * well(each.upper, batch)
                loss.backward()
                return loss

            each.optimizer.step(closure)
    assert same(run.points, twin.points) and run.optimizer.events == twin.optimizer.events != []


def test_what_does_not_maximize_has_no_such_argument() -> None:
    for entry in ENTRIES.values():
        accepts = "maximize" in inspect.signature(entry.kind).parameters or entry.inner is not None
        assert accepts == ("maximize" not in entry.cannot)


# --- precision -------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_in_every_precision(entry: Entry, dtype: torch.dtype) -> None:
    run, exact = entry.run(dtype, **entry.descent), entry.run(**entry.descent)
    before = run.points
    losses = run.advance(2)
    near = 1e-4 if dtype == torch.float32 else 0.1
    assert losses == pytest.approx(exact.advance(2), rel=near, abs=near)
    assert all(p.dtype == dtype for p in run.points) and not same(run.points, before)
    for p, q in zip(run.points, exact.points, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=near, atol=near)


@every_rule
def test_groups_may_differ_in_precision(entry: Entry) -> None:
    run = entry.run()
    run.upper.p1.data = run.upper.p1.data.float()
    run.advance(6)
    assert [p.dtype for p in run.points] == [torch.float64, torch.float32]
    assert all(bool(p.isfinite().all()) for p in run.points)


# --- between gradient and step ---------------------------------------------------------------------------------------


@over(ENTRIES, "clip")
def test_gradients_clipped_before_the_step_are_those_of_the_step(entry: Entry) -> None:
    """A user clips the parameters of the groups; the step is that by a gradient of the length left."""
    run = entry.run(**entry.descent)
    twin = entry.run(**entry.descent)
    found = [each.gradients() for each in (run, twin)]
    assert torch.equal(*found)
    size = torch.nn.utils.clip_grad_norm_(run.optimizer.param_groups[0]["params"], 1e-2)
    assert size > 1e-2
    for p in twin.params:
        p.grad.mul_(1e-2 / (size + 1e-6))
    for each in (run, twin):
        each.optimizer.step(*([lambda: 0.0] if "value_test" in entry.options else []))
    assert same(run.points, twin.points)


# --- hooks -----------------------------------------------------------------------------------------------------------


@contextmanager
def watched(note: Any) -> Iterator[None]:
    """Hooks on the steps of all optimizers."""
    handles = [
        register_optimizer_step_pre_hook(lambda optimizer, *_: note("before any", optimizer)),
        register_optimizer_step_post_hook(lambda optimizer, *_: note("after any", optimizer)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@every
def test_hooks_on_steps_are_called_once(entry: Entry) -> None:
    run = entry.run()
    calls: list[tuple[str, Any]] = []
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: calls.append(("before", optimizer)))
    run.optimizer.register_step_post_hook(lambda optimizer, *_: calls.append(("after", optimizer)))
    with watched(lambda when, optimizer: calls.append((when, optimizer))):
        run.advance(3)
    assert [when for when, _ in calls] == ["before any", "before", "after", "after any"] * 3
    assert all(optimizer is run.optimizer for _, optimizer in calls)
    run.advance()
    assert len(calls) == 14


@every
def test_a_hook_may_change_the_arguments_of_a_step(entry: Entry) -> None:
    run, twin = entry.run(), entry.run()
    run.optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: ((args[0], run.closure()), {}))
    for _ in range(2):
        run.optimizer.step()
        twin.optimizer.step(twin.closure())
    assert run.standing() == twin.standing()


@pytest.mark.parametrize("name", ["Perturbed(Adam)", "NEON", "AIDBiO", "StocBiOiNEON"])
def test_a_profile_shows_each_step_once(name: str) -> None:
    run = ENTRIES[name].run()
    run.advance()
    closure = run.closure()
    if run.lower is not None:
        closure, _ = None, run.gradients()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run.optimizer.step(closure)
    names = [event.name for event in profile.events() if event.name.startswith("Optimizer.step#")]
    assert names.count(f"Optimizer.step#{ENTRIES[name].kind.__name__}.step") == 1
