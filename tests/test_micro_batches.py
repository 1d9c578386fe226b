"""Accumulation: pieces of a batch equal the batch, in ``.grad`` and inside the solves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import torchbilevel as tb
from tests.distributed.cases import GD, NEUMANN, SIZES, bilevel, data, drawn, minimax, shard
from torchbilevel.samples import Batches

METHODS: dict[str, Callable[[], tb.Method]] = {
    "AIDBiO": lambda: tb.AIDBiO(bilevel(), 0.05, lower_solver=GD, linear_solver=tb.CG(20, tol=1e-8)),
    "ITDBiO": lambda: tb.ITDBiO(bilevel(), 0.05, lower_solver=GD),
    "GDmax": lambda: tb.GDmax(minimax(), 0.05, lower_solver=GD),
    "StocBiO": lambda: tb.StocBiO(bilevel(), 0.05, lower_solver=GD, linear_solver=NEUMANN, **SIZES),
}


def run(name: str, pieces: Callable[[Any], Any]) -> torch.Tensor:
    method = METHODS[name]()
    make = drawn if name == "StocBiO" else shard
    given = {"batch": pieces(make(1))} if name == "GDmax" else {"lower": pieces(make(1)), "upper": pieces(make(2))}
    for _ in range(3):
        method.zero_grad()
        method.backward(**given)
        method.step()
    return torch.cat([*method.problem.x, *method.problem.y])


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("size", [1, 5, 100])
def test_pieces_equal_the_batch(name: str, size: int) -> None:
    whole = run(name, lambda given: given)
    torch.testing.assert_close(run(name, lambda given: tb.micro_batches(given, size)), whole, rtol=1e-10, atol=1e-11)


def test_pieces_are_views_of_every_form() -> None:
    rows, targets = data(0)
    batch = {"a": rows, "b": [targets, (rows, 3.0)]}
    pieces = list(tb.micro_batches(batch, 10))
    assert [weight for weight, _ in pieces] == [10 / 24, 10 / 24, 4 / 24]
    last = pieces[-1][1]
    assert torch.equal(last["b"][1][0], rows[20:]) and last["b"][1][1] == 3.0 and len(last["b"][0]) == 4
    assert last["a"].untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
    source = tb.micro_batches(tb.sample(rows, seed=0), 4)
    drawn_rows = source(6)
    assert isinstance(drawn_rows, Batches) and [len(piece) for _, piece in drawn_rows] == [4, 2]
    assert torch.equal(torch.cat([piece for _, piece in drawn_rows]), tb.sample(rows, seed=0)(6))


def test_bad_input_is_refused() -> None:
    rows, targets = data(0)
    for size in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="size must be a positive integer, got"):
            tb.micro_batches(rows, size)
    with pytest.raises(ValueError, match="must share their first dimension, got 3 and 24"):
        tb.micro_batches((rows, targets[:3]), 5)


def test_checkpointed_modules_are_refused_by_check() -> None:
    """What torch.utils.checkpoint runs again, it runs with the module's own parameters: derivatives would be wrong."""
    from torch.utils.checkpoint import checkpoint

    problem = bilevel()
    forward = type(problem.lower).forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(problem.lower), "forward", lambda self, x: checkpoint(forward, self, x, use_reentrant=False))
        with pytest.raises(ValueError, match=r"upper_loss uses torch\.utils\.checkpoint.*micro_batches"):
            problem.check(lower=data(1), upper=data(2))
    problem.check(lower=data(1), upper=data(2))
