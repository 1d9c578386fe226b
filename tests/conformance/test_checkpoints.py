"""Checkpoints, copies and pickles of every optimizer."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

from tests.conformance.entries import ENTRIES, RULES, Entry, Run, over, plain

every = over(ENTRIES)
every_rule = over(RULES)


def through_a_file(tree: Any) -> Any:
    file = io.BytesIO()
    torch.save(tree, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def storages(tree: Any) -> set[int]:
    if isinstance(tree, Tensor):
        return {tree.untyped_storage().data_ptr()} - {0}
    if isinstance(tree, dict):
        tree = list(tree.values())
    return set().union(*map(storages, tree)) if isinstance(tree, list | tuple) else set()


@every
@pytest.mark.parametrize("steps", [0, 4])
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(entry: Entry, steps: int) -> None:
    run, again = entry.run(), entry.run()
    run.advance(steps)
    again.advance(1)  # whatever it was before, it is now the run that was saved
    saved = through_a_file(run.saved())
    kept = plain(saved)
    again.load(saved)
    assert again.standing() == run.standing()
    assert again.advance(2) == run.advance(2) and again.standing() == run.standing()
    assert plain(saved) == kept  # neither changed by loading nor by the run that went on from it


@every
def test_a_state_dict_is_reproducible_and_shares_nothing_that_moves(entry: Entry) -> None:
    run = entry.run()
    run.advance(3)
    state = run.optimizer.state_dict()
    assert plain(run.optimizer.state_dict()) == plain(state)
    own = {name: value for name, value in state.items() if name != "state"}  # torch hands out its state itself
    kept = plain(own)
    run.advance(3)
    assert plain(own) == kept


@every
def test_a_foreign_state_dict_is_refused_and_nothing_changes(entry: Entry) -> None:
    run, fewer = entry.run(), entry.run()
    run.advance(2)
    before = run.standing()
    fewer.split()
    good = run.optimizer.state_dict()
    for bad, message in [
        (torch.optim.SGD(run.params, 0.1).state_dict(), "must have the entry '(rule|method)'"),
        ({**good, **{k: {**good[k], "name": "?", "kind": "?"} for k in ("rule", "method") if k in good}}, "must come"),
        (fewer.optimizer.state_dict(), "(different number of )?parameter group"),
    ]:
        with pytest.raises(ValueError, match=message):
            run.optimizer.load_state_dict(bad)
        assert run.standing() == before


@every
def test_hooks_on_checkpoints_are_called_once(entry: Entry) -> None:
    run = entry.run()
    called: list[str] = []
    # `Perturbed` hands its hooks on checkpoints to the optimizer inside.
    inner = getattr(run.optimizer, "optimizer", run.optimizer)

    def note(name: str) -> Callable[..., None]:
        def hook(optimizer: Any, *_: Any) -> None:
            assert optimizer is inner
            called.append(name)

        return hook

    run.optimizer.register_state_dict_pre_hook(note("before save"))
    run.optimizer.register_state_dict_post_hook(note("after save"))
    run.optimizer.register_load_state_dict_pre_hook(note("before load"))
    run.optimizer.register_load_state_dict_post_hook(note("after load"))
    run.advance(1)
    state = run.optimizer.state_dict()
    assert called == ["before save", "after save"]
    run.optimizer.load_state_dict(state)
    assert called == ["before save", "after save", "before load", "after load"]


ROUTES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda run: pickle.loads(pickle.dumps(run)),
}


@every
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())
def test_a_copy_shares_nothing_and_goes_on_alike(entry: Entry, route: Callable[[Run], Run]) -> None:
    run = entry.run()
    scheduler = lr_scheduler.StepLR(run.optimizer, 2, 0.5)
    for _ in range(3):
        run.advance()
        scheduler.step()
    run.optimizer.zero_grad()
    called: list[Any] = []
    run.optimizer.register_step_post_hook(lambda *_: called.append(1))
    twin = route(run)
    everything = [(each.optimizer.state_dict(), each.params, each.points[:0]) for each in (run, twin)]
    assert not storages(everything[0]) & storages(everything[1])
    before = run.standing()
    assert twin.standing() == before and "step" in vars(run.optimizer) and "step" not in vars(twin.optimizer)
    losses = twin.advance(2)
    assert run.standing() == before and called == []
    after = twin.standing()
    assert run.advance(2) == losses and run.standing() == after == twin.standing()


@every
def test_a_copy_has_all_attributes(entry: Entry) -> None:
    optimizer = entry.run().optimizer
    twin = copy.deepcopy(optimizer)
    public = {name for name in vars(optimizer) if not name.startswith("_optimizer")}
    assert public == {name for name in vars(twin) if not name.startswith("_optimizer")}
    twin.register_step_pre_hook(lambda *_: None)
    twin.zero_grad()
