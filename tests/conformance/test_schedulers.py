"""Schedulers drive `lr`, and whatever else they are told to, as they drive it in torch's own optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from tests.conformance.entries import ENTRIES, Entry, over

every = over(ENTRIES)
STEPS = 3
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 1, 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: min(1.0, (t + 1) / 4)),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=1.0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, 1.5 * o.param_groups[0]["lr"], total_steps=STEPS + 1, cycle_momentum=False
    ),
}
schedulers = pytest.mark.parametrize("name", SCHEDULERS)


def follow(scheduler: Any, loss: float) -> None:
    scheduler.step(*([loss] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))


@every
@schedulers
def test_each_step_is_taken_with_the_lr_that_sgd_would_have(entry: Entry, name: str) -> None:
    run, twin = entry.run(), entry.run()
    sgd = torch.optim.SGD([torch.zeros(1)], lr=run.optimizer.param_groups[0]["lr"])
    mine, theirs = SCHEDULERS[name](run.optimizer), SCHEDULERS[name](sgd)
    rates = []
    for step in range(STEPS):
        rates.append(sgd.param_groups[0]["lr"])
        assert run.optimizer.param_groups[0]["lr"] == rates[-1] and mine.get_last_lr() == theirs.get_last_lr()
        run.advance()
        if name == "OneCycleLR":  # which keeps keys of its own in the groups
            twin.optimizer.param_groups[0]["lr"] = rates[-1]
            twin.advance()
            assert all(torch.equal(p, q) for p, q in zip(run.points, twin.points, strict=True))
        sgd.step()
        for scheduler in (mine, theirs):
            follow(scheduler, float(step))
    assert len(set(rates)) > 2


@over({name: ENTRIES[name] for name in ("Perturbed(Adam)", "Pullback", "PullbackSTORM", "PRGDA", "SUSTAIN")})
@schedulers
def test_a_run_with_a_scheduler_is_resumed_bitwise(entry: Entry, name: str) -> None:
    run = entry.run()
    scheduler = SCHEDULERS[name](run.optimizer)
    for _ in range(2):
        follow(scheduler, run.advance()[0])
    saved = run.saved(), scheduler.state_dict()
    again = entry.run()
    other = SCHEDULERS[name](again.optimizer)
    again.load(saved[0])
    other.load_state_dict(saved[1])
    for _ in range(2):
        for each, its in ((run, scheduler), (again, other)):
            follow(its, each.advance()[0])
    assert again.standing() == run.standing()


@every
def test_plateaus_have_a_floor_for_each_group(entry: Entry) -> None:
    run = entry.run()
    run.split()
    lr = run.optimizer.param_groups[0]["lr"]
    scheduler = lr_scheduler.ReduceLROnPlateau(
        run.optimizer, patience=0, threshold=1.0, factor=0.1, min_lr=[0.5 * lr, 0.05 * lr]
    )
    for _ in range(3):
        run.advance()
        scheduler.step(1.0)
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.5 * lr, 0.05 * lr]


@over({name: entry for name, entry in ENTRIES.items() if "escape_lr" in entry.options})
def test_warm_up_of_lr_leaves_escape_lr_alone_and_both_can_be_scheduled(entry: Entry) -> None:
    run = entry.run()
    scheduler = lr_scheduler.LambdaLR(run.optimizer, lambda t: min(1.0, (t + 1) / 3))
    for _ in range(3):
        assert run.optimizer.param_groups[0]["escape_lr"] == entry.options["escape_lr"]
        run.advance()
        scheduler.step()
    assert run.optimizer.param_groups[0]["lr"] == entry.options["lr"]
    # What moves in an escape phase is that rate's: with it twice as large the first step of the phase is.
    moves = []
    for factor in (1.0, 2.0):
        run = entry.run(mean_movement=1e3)
        run.advance()
        assert run.optimizer.phase == "escape"
        run.optimizer.param_groups[0]["escape_lr"] *= factor
        before = [p.detach().clone() for p in run.params]
        run.advance()
        moves.append(torch.cat([(p - x).reshape(-1) for p, x in zip(run.params, before, strict=True)]))
    torch.testing.assert_close(moves[1], 2 * moves[0])


@every
def test_a_scheduler_finds_that_a_step_was_forgotten(entry: Entry) -> None:
    scheduler = lr_scheduler.StepLR(entry.run().optimizer, 1, 0.5)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_a_scheduler_on_the_rule_of_a_method_drives_the_method() -> None:
    run, twin = ENTRIES["PerturbedAID"].run(), ENTRIES["PerturbedAID"].run()
    for each, optimizer in ((run, run.optimizer.rule), (twin, twin.optimizer)):
        scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
        for _ in range(3):
            each.advance()
            scheduler.step()
    assert run.standing() == twin.standing()
