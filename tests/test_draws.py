"""Draws: every use has its own sample, of its own size, drawn once."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from torchbilevel.draws import BatchSizes, Draws
from torchbilevel.sources import sample


class Recorder:
    """A source that numbers its draws and remembers what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[int | None] = []

    def __call__(self, n: int | None = None) -> torch.Tensor:
        self.asked.append(n)
        return torch.full((n or 100,), float(len(self.asked)))


SIZES = BatchSizes(upper=2, lower=3, jvp=5, hvp=7, anchor=11, lower_anchor=13)


def test_each_use_draws_once_and_by_its_own_size() -> None:
    lower, upper = Recorder(), Recorder()
    draws = Draws(lower, upper, 0, SIZES, False)
    assert not lower.asked and not upper.asked
    small, large = draws.at(0), draws.at(0, anchor=True)
    used = [small.upper, large.upper, small.lower, small.jvp, small.hvp(0), small.hvp(1), large.lower, large.jvp]
    used += [large.hvp(0), draws.at(1).lower, small.hvp(2, size=17)]
    assert upper.asked == [2, 11] and lower.asked == [3, 5, 7, 7, 13, 13, 13, 3, 17]
    assert len({s.seed for s in used}) == len(used)
    again = draws.at(0)
    assert again.upper is used[0] and again.hvp(1) is used[5] and draws.at(0, anchor=True).jvp is used[7]
    assert upper.asked == [2, 11] and lower.asked == [3, 5, 7, 7, 13, 13, 13, 3, 17]


def test_defaults_of_the_sizes() -> None:
    sizes = BatchSizes(upper=2, lower=3)
    assert [sizes.size(r, False) for r in ("upper", "lower", "jvp", "hvp")] == [2, 3, 3, 3]
    assert [sizes.size(r, True) for r in ("upper", "lower", "jvp", "hvp")] == [None] * 4
    sizes = BatchSizes(anchor=9)
    assert [sizes.size(r, True) for r in ("upper", "lower", "jvp", "hvp")] == [9] * 4


@pytest.mark.parametrize("minimax", [False, True])
def test_without_sizes_one_sample_of_each_loss_serves_all_uses(minimax: bool) -> None:
    lower = Recorder()
    upper = lower if minimax else Recorder()
    draws = Draws(lower, upper, 0, None, minimax)
    draw = draws.at(3, anchor=True)
    assert draw.single and draw.lower is draw.jvp is draw.hvp(4) is draws.at(0).lower is draws.pair.lower
    assert draw.upper is draws.pair.upper and (draw.upper is draw.lower) == minimax
    assert lower.asked == [None] and upper.asked == [None]


def test_the_pair_is_what_the_sources_give_by_themselves() -> None:
    lower, upper = Recorder(), Recorder()
    draws = Draws(lower, upper, 0, SIZES, False)
    assert draws.pair.lower.size == draws.pair.upper.size == 100 and draws.pair is draws.pair


def test_the_seed_decides_the_seeds_of_all_samples() -> None:
    first, same, other = (Draws(Recorder(), Recorder(), seed, SIZES, False) for seed in (0, 0, 1))
    assert first.at(2).hvp(1).seed == same.at(2).hvp(1).seed != other.at(2).hvp(1).seed
    assert first.at(2).seed == same.at(2).seed != other.at(2).seed


def test_a_plain_batch_is_refused_unless_it_may_be_reused() -> None:
    batch = torch.zeros(4)
    with pytest.raises(ValueError, match=r"lower= got one batch \(Tensor\).*sample\(tensors, seed\).*reuse_batch=True"):
        Draws(batch, Recorder(), 0, SIZES, False)
    with pytest.raises(ValueError, match=r"batch= got one batch \(tuple\)"):
        Draws((batch,), (batch,), 0, SIZES, True)
    with pytest.raises(TypeError, match=r"upper= got a DataLoader"):
        Draws(None, DataLoader(batch), 0, SIZES, False)
    draws = Draws(batch, None, 0, BatchSizes(reuse_batch=True), False)
    assert draws.at(0).lower.batch is draws.at(1).hvp(2).batch is batch
    assert draws.at(0).lower.seed != draws.at(1).lower.seed  # dropout is independent all the same


def test_a_copy_keeps_the_samples_and_leaves_the_sources() -> None:
    lower: Any = Recorder()
    draws = Draws(lower, Recorder(), 0, SIZES, False)
    drawn = draws.at(0).lower
    twin = copy.deepcopy(draws)
    assert torch.equal(twin.at(0).lower.batch, drawn.batch) and twin.at(0).lower.batch is not drawn.batch
    with pytest.raises(RuntimeError, match="call backward first"):
        twin.at(1).lower  # noqa: B018
    assert lower.asked == [3]


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_sizes_out_of_range(size: Any) -> None:
    with pytest.raises(ValueError, match=rf"hvp_batch_size \(hvp\) must be a positive integer or None, got {size}"):
        BatchSizes(hvp=size)


def test_a_batch_is_no_flag() -> None:
    with pytest.raises(TypeError, match="reuse_batch must be True or False, got 'yes'"):
        BatchSizes(reuse_batch="yes")  # type: ignore[arg-type]


def test_of_a_large_sample_the_numbers_of_the_rows_are_kept() -> None:
    data = torch.arange(200.0).repeat_interleave(100_000).view(200, 100_000)
    expected = [rows.clone() for rows in map(sample(data, seed=4), (5, 5, 5))]
    source = sample(data, seed=4)
    draws = Draws(source, source, 0, BatchSizes(upper=5), True)
    first = draws.at(0).upper
    assert draws.at(0).upper is first
    taken = [first.batch, draws.at(1).upper.batch, draws.at(2).upper.batch]
    # Rows that later steps have pushed out are taken again, not drawn again, and a copy without the source has them.
    again = [draws.at(k).upper.batch for k in range(3)]
    assert source.draws == 3 and draws.at(0).upper.seed == first.seed and draws.at(0).upper is not first
    copied = [copy.deepcopy(draws).at(k).upper.batch for k in range(3)]
    for rows in zip(expected, taken, again, copied, strict=True):
        assert all(torch.equal(rows[0], other) for other in rows[1:])


def test_of_large_samples_those_of_one_step_are_in_memory() -> None:
    source = sample(torch.zeros(50, 100_000), seed=0)
    draws, alive = Draws(source, source, 0, BatchSizes(upper=5), True), []
    for k in range(4):
        alive.append(weakref.ref(draws.at(k).upper.batch))
        assert [ref() is not None for ref in alive] == [False] * k + [True]
    draws.put_away()
    assert alive[-1]() is None
