"""Sources: reproducible, resumable draws from memory, and streams of a loader's batches."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from torchbilevel import CG, GD, Implicit, sample, stream
from torchbilevel.sources import Blocks

INPUTS, LABELS = torch.arange(40.0).reshape(20, 2), torch.arange(20)


def test_rows_stay_together() -> None:
    source = sample((INPUTS, LABELS), seed=0)
    inputs, labels = source(7)
    assert inputs.shape == (7, 2) and torch.equal(INPUTS[labels], inputs)


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict"])
def test_forms(form: str) -> None:
    data = {"tensor": LABELS, "tuple": (LABELS, INPUTS), "list": [LABELS, INPUTS], "dict": {"t": LABELS, "x": INPUTS}}
    draw, full = (sample(data[form], seed=1)(n) for n in (5, None))
    for batch, rows in ((draw, 5), (full, 20)):
        assert isinstance(batch, {"tensor": Tensor, "dict": dict}.get(form, tuple))
        tensors = [batch] if form == "tensor" else list(batch.values() if form == "dict" else batch)
        assert [len(t) for t in tensors] == [rows] * len(tensors)
    # Every form draws the same rows.
    assert torch.equal(draw if form == "tensor" else draw["t"] if form == "dict" else draw[0], sample(LABELS, 1)(5))


class Row(NamedTuple):
    t: Tensor
    x: Tensor


def test_a_named_tuple_keeps_its_names() -> None:
    source = sample(Row(LABELS, INPUTS), seed=1)
    for batch in (source(5), source(None), copy.deepcopy(source)(5)):
        assert isinstance(batch, Row) and torch.equal(INPUTS[batch.t], batch.x)


@pytest.mark.parametrize("seed", [None, 0.5, True])
def test_a_seed_is_an_integer(seed: Any) -> None:
    with pytest.raises(ValueError, match=f"seed must be an integer, got {seed}"):
        sample(LABELS, seed)


def test_a_seed_of_numpy_is_one_too() -> None:
    numpy = pytest.importorskip("numpy")
    assert torch.equal(sample(LABELS, numpy.int64(3))(4), sample(LABELS, 3)(4))
    estimator = Implicit(GD(0.1, 1), CG(), seed=numpy.int64(3))
    assert type(estimator.seed) is int and estimator.seed == 3  # so that checkpoints load with weights_only


def test_draws_are_reproducible_and_do_not_touch_the_global_state() -> None:
    before = torch.get_rng_state()
    one, two, other = sample(LABELS, seed=0), sample(LABELS, seed=0), sample(LABELS, seed=1)
    first, second = one(8), one(8)
    torch.manual_seed(99)
    assert torch.equal(two(8), first) and torch.equal(two(8), second)
    assert not torch.equal(first, second) and not torch.equal(other(8), first)
    torch.set_rng_state(before)
    one(8)
    assert torch.equal(torch.get_rng_state(), before)


def test_resuming_draws_on() -> None:
    source = sample(LABELS, seed=3)
    source(4), source(6)
    state = source.state_dict()
    want = [source(4), source(6)]
    resumed = sample(LABELS, seed=3)
    resumed.load_state_dict(state)
    assert all(torch.equal(s, t) for s, t in zip(want, [resumed(4), resumed(6)], strict=True))


def test_full_batch_when_n_reaches_the_rows() -> None:
    source = sample((INPUTS, LABELS), seed=0)
    for n in (None, 20, 21):
        inputs, labels = source(n)
        assert torch.equal(inputs, INPUTS) and torch.equal(labels, LABELS)
    # Full batches are no draws: what comes after does not depend on how many there were.
    assert torch.equal(source(5)[1], sample((INPUTS, LABELS), seed=0)(5)[1])


def test_draws_are_uniform_and_with_replacement() -> None:
    source = sample(LABELS, seed=0)
    draws = torch.stack([source(10) for _ in range(1000)])
    counts = torch.bincount(draws.reshape(-1), minlength=20)
    # Chi-square with 19 degrees of freedom: 43.8 is its 99.9 % point.
    assert ((counts - 500) ** 2 / 500).sum() < 43.8
    # P(10 draws of 20 all differ) = 20! / (10! 20^10) = 0.0655.
    distinct = sum(len(set(row.tolist())) == 10 for row in draws)
    assert 30 < distinct < 105


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ((INPUTS, LABELS[:3]), ValueError, r"share their first dimension, got \[\(20, 2\), \(3,\)\]"),
        ((INPUTS, torch.tensor(1.0)), ValueError, r"got \[\(20, 2\), \(\)\]"),
        ((), ValueError, r"got \[\]"),
        (torch.zeros(0, 2), ValueError, r"got \[\(0, 2\)\]"),
        ((INPUTS, LABELS.tolist()), ValueError, r"got \[\(20, 2\), 'list'\]"),
        (TensorDataset(INPUTS), TypeError, "got TensorDataset"),
        (3, TypeError, "got int"),
    ],
)
def test_bad_tensors_are_refused(tensors: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sample(tensors, seed=0)


@pytest.mark.parametrize("n", [0, -1])
def test_bad_size_is_refused_and_is_no_draw(n: int) -> None:
    source = sample(LABELS, seed=0)
    with pytest.raises(ValueError, match=f"batch size must be positive, got {n}"):
        source(n)
    assert source.draws == 0


# --- stream ---------------------------------------------------------------------------------------------------------


def test_stream_starts_over() -> None:
    source = stream(DataLoader(TensorDataset(LABELS), batch_size=8))
    got = [source()[0] for _ in range(7)]
    parts = LABELS.split(8)
    assert all(torch.equal(got[i], parts[i % 3]) for i in range(7))
    assert source.served == 7


def test_stream_shuffles_anew_every_time_as_the_loader_does() -> None:
    loader = DataLoader(TensorDataset(LABELS), batch_size=20, shuffle=True)
    source = stream(loader)
    torch.manual_seed(5)
    got = [source()[0] for _ in range(2)]
    torch.manual_seed(5)
    want = [batch[0] for _ in range(2) for batch in loader]
    assert all(torch.equal(s, t) for s, t in zip(got, want, strict=True))
    assert not torch.equal(*got)


def test_stream_of_an_iterator_ends() -> None:
    source = stream(iter([LABELS[:2], LABELS[2:4]]))
    assert source(2).tolist() == [0, 1] and source(None).tolist() == [2, 3]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="exhausted after 2 batches; stream a DataLoader or a non-empty list"):
            source()
    with pytest.raises(RuntimeError, match="exhausted after 0 batches"):
        stream([])()


def test_stream_refuses_another_batch_size() -> None:
    source = stream(DataLoader(TensorDataset(LABELS), batch_size=8))
    assert len(source(8)[0]) == len(source(8)[0]) == 8
    with pytest.raises(
        ValueError, match=r"of 8 data points was asked .* gave 4; set .* batch_size=8 and drop_last=True"
    ):
        source(8)


@pytest.mark.parametrize("loader", [3, None, INPUTS, {"x": INPUTS}])
def test_stream_refuses_what_has_no_batches(loader: object) -> None:
    with pytest.raises(TypeError, match="loader must be a DataLoader or a list of batches"):
        stream(loader)  # type: ignore[arg-type]


# --- blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "lengths"), [(8, [8, 8, 4]), (5, [5] * 4), (20, [20]), (99, [20]), (None, [20]), (1, [1] * 20)]
)
def test_blocks_hold_every_row_once_and_in_order(n: int | None, lengths: list[int]) -> None:
    blocks = Blocks(sample((INPUTS, LABELS), seed=0), n)
    batches = [blocks[i] for i in range(len(blocks.shares))]
    assert [len(labels) for _, labels in batches] == lengths
    assert torch.equal(torch.cat([labels for _, labels in batches]), LABELS)
    assert torch.equal(torch.cat([inputs for inputs, _ in batches]), INPUTS)
    assert list(blocks.shares) == [length / 20 for length in lengths]


def test_blocks_are_drawn_by_their_shares() -> None:
    source = sample(LABELS, seed=3)
    blocks = Blocks(source, 8)
    drawn = [blocks(8) for _ in range(1500)]
    assert all(torch.equal(block.rows, blocks[block.index]) and block.shares is blocks.shares for block in drawn)
    for i, share in enumerate(blocks.shares):
        count = sum(block.index == i for block in drawn)
        assert abs(count - 1500 * share) < 4.5 * (1500 * share * (1 - share)) ** 0.5
    again = Blocks(sample(LABELS, seed=3), 8)
    assert [again(8).index for _ in range(50)] == [block.index for block in drawn[:50]]
    again = Blocks(source, 8)
    source.load_state_dict({"draws": 50})
    assert [again(8).index for _ in range(50)] == [block.index for block in drawn[50:100]]


def test_blocks_in_passes_are_those_of_one_order_after_the_other() -> None:
    source = sample(LABELS, seed=3)
    passes = [[Blocks(source, 2, turn=10 * k + t)(2) for t in range(10)] for k in range(4)]
    orders = [[block.index for block in blocks] for blocks in passes]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4 and source.draws == 0
    assert all(torch.equal(block.rows, Blocks(source, 2)[block.index]) for block in passes[0])
    assert orders == [sample(INPUTS, seed=3).order(k, 10) for k in range(4)]  # the seed's, whatever the data
    assert orders[0] != sample(LABELS, seed=4).order(0, 10)


def test_a_single_block_takes_no_draw() -> None:
    source = sample(LABELS, seed=0)
    for block in (Blocks(source, None)(20), Blocks(source, 8)(None), Blocks(source, 20, turn=3)(20)):
        assert block.index == 0 and block.shares == (1.0,) and torch.equal(block.rows, LABELS)
    assert source.draws == 0
