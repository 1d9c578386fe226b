"""What an optimizer is built on: lists, names, groups; and what it refuses."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.conformance.entries import ENTRIES, OTHERS, RULES, Entry, over
from torchbilevel import methods, optim

every = over(ENTRIES)
every_rule = over(RULES)


def test_the_table_is_complete() -> None:
    kinds = {entry.kind.__name__ for entry in ENTRIES.values()}
    assert kinds == {*methods.__all__, *optim.__all__} - OTHERS.keys()


# --- what parameters come in -----------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "generator": lambda model: (p for p in model.parameters()),
    "parameters()": lambda model: model.parameters(),
    "tuple": lambda model: tuple(model.parameters()),
    "names": lambda model: model.named_parameters(),
    "list of names": lambda model: list(model.named_parameters()),
    "group": lambda model: [{"params": model.parameters()}],
    "group of names": lambda model: [{"params": list(model.named_parameters())}],
    "groups": lambda model: [{"params": [p]} for p in model.parameters()],
}


@every_rule
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_parameters_come_in_every_form_that_torch_takes(entry: Entry, form: Callable[[nn.Module], Any]) -> None:
    run, plain = entry.run(over=form), entry.run()
    run.advance(3)
    plain.advance(3)
    assert all(torch.equal(p, q) for p, q in zip(run.points, plain.points, strict=True))
    again = entry.run(over=form)
    again.load(run.saved())
    assert again.standing() == run.standing()


@every_rule
def test_names_are_kept_and_used(entry: Entry) -> None:
    run = entry.run(over=FORMS["names"])
    assert run.optimizer.state_dict()["param_groups"][0]["param_names"] == ["p0", "p1"]

    def closure() -> float:
        run.params[0].grad, run.params[1].grad = torch.ones(2).double(), torch.tensor(math.nan).double()
        return 0.0

    before = run.points
    with pytest.raises(FloatingPointError, match="'p1' of group 0"):
        run.optimizer.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(run.points, before, strict=True))


@every_rule
def test_what_torch_refuses_as_parameters_is_refused(entry: Entry) -> None:
    p = nn.Parameter(torch.zeros(2))
    for bad, error, message in [
        (p, TypeError, "an iterable of Tensors or dicts, but got torch.FloatTensor"),
        ([], ValueError, "empty parameter list"),
        ([1.0], TypeError, "can only optimize Tensors"),
        ([p * 2], ValueError, "can't optimize a non-leaf Tensor"),
        ([{"params": [p]}, {"params": [p]}], ValueError, "more than one parameter group"),
        ([("p", p), p], ValueError, "with/without names"),
    ]:
        with pytest.raises(error, match=message):
            entry.build(bad)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        entry.build([p, p])


@every
def test_a_learning_rate_may_be_a_tensor(entry: Entry) -> None:
    run, plain = entry.run(), entry.run()
    lr = run.optimizer.param_groups[0]["lr"]
    if "lr" in entry.options:
        run = entry.run(lr=torch.tensor(lr, dtype=torch.float64))
    else:
        run.optimizer.param_groups[0]["lr"] = torch.tensor(lr, dtype=torch.float64)
    run.advance(2)
    plain.advance(2)
    for p, q in zip(run.points, plain.points, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-14)
    assert float(run.optimizer.param_groups[0]["lr"]) == lr


@every
def test_shows_its_groups(entry: Entry) -> None:
    text = repr(entry.run().optimizer)
    assert entry.kind.__name__ in text and "lr: " in text


# --- groups ----------------------------------------------------------------------------------------------------------


@every
def test_each_group_moves_by_its_own_lr(entry: Entry) -> None:
    """Where nothing but a descent step happens, half of the lr is half of the move."""
    run, plain = entry.run(**entry.descent), entry.run(**entry.descent)
    lr = plain.optimizer.param_groups[0]["lr"]
    run.split(lr=lr / 2)
    before = [p.detach().clone() for p in run.params]
    for each in (run, plain):
        each.advance()
    for i, (x, p, q) in enumerate(zip(before, run.params, plain.params, strict=True)):
        torch.testing.assert_close(p - x, (q - x) * (0.5 if i else 1.0), rtol=1e-7, atol=0)
        assert not torch.equal(p, x)


@every
def test_a_group_with_lr_zero_rests_in_every_phase(entry: Entry) -> None:
    run = entry.run()
    run.split(lr=0.0)
    before = [p.detach().clone() for p in run.params]
    run.advance(3)
    assert not torch.equal(run.params[0], before[0])
    assert all(torch.equal(p, x) for p, x in zip(run.params[1:], before[1:], strict=True))


@every
def test_a_group_can_be_added_in_the_middle_of_a_run(entry: Entry) -> None:
    run = entry.run()
    params = run.optimizer.param_groups[0]["params"]
    rest = params[1:]
    del params[1:]
    start = [p.detach().clone() for p in rest]
    run.advance(2)
    assert all(torch.equal(p, x) for p, x in zip(rest, start, strict=True))
    run.optimizer.add_param_group({"params": (p for p in rest)})
    assert run.optimizer.param_groups[1]["lr"] == run.optimizer.defaults["lr"]
    run.advance(4)
    assert not any(torch.equal(p, x) for p, x in zip(rest, start, strict=True))
    assert len(run.optimizer.result().x) == len(run.params)
    again = entry.run()
    again.split()
    again.load(run.saved())
    assert again.standing() == run.standing() and again.advance(2) == run.advance(2)
    with pytest.raises(ValueError, match="more than one parameter group"):
        run.optimizer.add_param_group({"params": rest})


# --- bad values ------------------------------------------------------------------------------------------------------


# What another argument must be for this one to be looked at.
NEEDS: dict[str, dict[str, Any]] = {
    "value_tol": {"value_test": True, "test": "value", "max_movement": None},
    "lipschitz": {"solver": "gradient"},
    "max_movement": {"value_tol": None},
}


@every
def test_a_number_out_of_range_is_refused_by_name_and_value(entry: Entry) -> None:
    known = inspect.signature(entry.kind).parameters
    numbers = {name: str(p.annotation) for name, p in known.items() if re.match("float|int", str(p.annotation))}
    assert numbers.keys() >= {"seed"} - ({"seed"} - known.keys())
    for name, annotation in numbers.items():
        needs = {k: v for k, v in NEEDS.get(name, {}).items() if k in known}
        bad: list[Any] = [math.nan, 1.5, True, "1"] if "float" not in annotation else [math.nan]
        for value in bad if name == "seed" else [*bad, -1, -0.5]:
            with pytest.raises(ValueError, match=rf"{name}\b.*{value}"):
                entry.run(**{**needs, name: value})


def test_a_learning_rate_inside_is_refused_by_its_own_optimizer() -> None:
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        RULES["Perturbed(Adam)"].run(lr=-1)
