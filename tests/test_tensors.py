"""Arithmetic on tuples against the same arithmetic on one flat vector, and the law of the ball."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from torchbilevel import tensors as ts

SHAPES = ((2, 3), (), (4,), (0,))


def draw(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in SHAPES)


def flat(a: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in a])


a, b = draw(0), draw(1)


@pytest.mark.parametrize("n", [1, 4])
def test_dot_and_norm_are_those_of_the_flat_vector(n: int) -> None:
    assert ts.dot(a[:n], b[:n]).item() == pytest.approx((flat(a[:n]) @ flat(b[:n])).item(), rel=1e-14)
    assert ts.norm(a[:n]).item() == pytest.approx(flat(a[:n]).norm().item(), rel=1e-14)
    assert ts.dot(a[:n], b[:n]).shape == ()


def test_dot_of_half_precision_is_summed_in_float32() -> None:
    # In bfloat16 a sum of ones stops at 256; in float16 squares of 300 overflow.
    ones = torch.ones(5000, dtype=torch.bfloat16)
    assert ts.dot((ones,), (ones,)).item() == 5000
    assert ts.dot((ones, ones), (ones, ones)).item() == 10000
    assert ts.norm((torch.full((4,), 300.0, dtype=torch.float16),)).item() == 600


def test_dot_of_mixed_dtypes_has_the_widest() -> None:
    mixed = (torch.ones(2, dtype=torch.float32), torch.ones(2, dtype=torch.float64))
    assert ts.dot(mixed, mixed).dtype == torch.float64
    assert ts.dot(mixed[::-1], mixed[::-1]).dtype == torch.float64


@pytest.mark.parametrize("alpha", [0.3, torch.tensor(0.3, dtype=torch.float64)], ids=["number", "tensor"])
def test_linear_combinations(alpha: float | Tensor) -> None:
    for got, want in (
        (ts.add(a, b), flat(a) + flat(b)),
        (ts.sub(a, b), flat(a) - flat(b)),
        (ts.scale(alpha, a), 0.3 * flat(a)),
        (ts.axpy(alpha, a, b), 0.3 * flat(a) + flat(b)),
    ):
        assert tuple(t.shape for t in got) == tuple(t.shape for t in a)
        torch.testing.assert_close(flat(got), want)
    narrow = draw(0, torch.float32)
    assert {t.dtype for t in (*ts.scale(alpha, narrow), *ts.axpy(alpha, narrow, narrow))} == {torch.float32}


@pytest.mark.parametrize("alpha", [0.3, torch.tensor(0.3, dtype=torch.float64)], ids=["number", "tensor"])
def test_in_place_updates(alpha: float | Tensor) -> None:
    for update, want in (
        (lambda t: ts.add_scaled_(t, alpha, b), flat(a) + 0.3 * flat(b)),
        (lambda t: ts.add_scaled_(t, alpha, b, sign=-1), flat(a) - 0.3 * flat(b)),
        (lambda t: ts.scale_add_(t, alpha, b), 0.3 * flat(a) + flat(b)),
    ):
        target = ts.clone(a)
        pointers = [t.data_ptr() for t in target]
        update(target)
        torch.testing.assert_close(flat(target), want)
        assert [t.data_ptr() for t in target] == pointers


@pytest.mark.parametrize(
    "like", [a, a[:1], (a[0].float(), a[1], a[2].float(), a[3]), ()], ids=["all", "one", "mixed", "none"]
)
def test_layout_is_a_round_trip_and_keeps_inner_products(like: tuple[Tensor, ...]) -> None:
    layout = ts.Layout(like)
    vectors = layout.pack(like)
    assert len(vectors) == len({t.dtype for t in like}) and all(v.dim() == 1 for v in vectors)
    back = layout.unpack(vectors)
    assert all(torch.equal(s, t) and s.dtype == t.dtype for s, t in zip(back, like, strict=True))
    if like:
        other = tuple(torch.cos(t) for t in like)
        assert layout.dot(vectors, layout.pack(other)) == pytest.approx(ts.dot(like, other).item(), rel=1e-6)
        # What is done to the vectors is done to the tuple.
        doubled = layout.unpack(tuple(2 * v for v in vectors))
        assert all(torch.equal(s, 2 * t) for s, t in zip(doubled, like, strict=True))


@pytest.mark.parametrize("f", [ts.dot, ts.add, ts.sub, lambda s, t: ts.axpy(1.0, s, t)])
def test_tuples_of_different_lengths_are_refused(f) -> None:
    with pytest.raises(ValueError, match="shorter|longer"):
        f(a, a[:2])


def test_copies_and_aliases() -> None:
    source = tuple(t.clone().requires_grad_() for t in a)
    for f, aliases, leaf in ((ts.detach, True, False), (ts.leaves, True, True), (ts.clone, False, False)):
        out = f(source)
        assert all(t.is_leaf and t.requires_grad is leaf for t in out)
        assert all((s.data_ptr() == t.data_ptr()) is aliases for s, t in zip(source[:3], out[:3], strict=True))
        assert torch.equal(flat(out), flat(source))
    assert all(not t.any() for t in ts.zeros(a))
    assert ts.numel(a) == 11


def test_flatten_and_unflatten_are_inverse() -> None:
    mixed = (a[0].float(), *a[1:])
    vector = ts.flatten(mixed)
    assert vector.dtype == torch.float64
    torch.testing.assert_close(vector, flat((a[0].float().double(), *a[1:])))
    back = ts.unflatten(vector, mixed)
    assert all(torch.equal(s, t) and s.dtype == t.dtype for s, t in zip(back, mixed, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_entry_is_not_finite(bad: float) -> None:
    for i in (0, 1, 2):
        spoiled = ts.clone(a)
        spoiled[i].reshape(-1)[-1] = bad
        assert not ts.is_finite(spoiled)
        assert not ts.is_finite(b, spoiled)
    assert not ts.is_finite((torch.tensor([math.inf, -math.inf]),))


def test_finite_entries_with_an_overflowing_sum_are_finite() -> None:
    assert ts.is_finite((torch.full((3,), 3e38),), (torch.full((3,), 6e4, dtype=torch.float16),))
    assert ts.is_finite(())


def test_mix_seed_is_the_same_on_every_machine_and_tells_arguments_apart() -> None:
    # The first 63 of the 64 bits of BLAKE2b, as every implementation gives them.
    assert ts.mix_seed(0, 1, 2) == int(hashlib.blake2b(b"0,1,2", digest_size=8).hexdigest(), 16) // 2
    seeds = {ts.mix_seed(*parts) for parts in ((0,), (1,), (0, 1), (1, 0), (0, 0, 1), (12, 3), (1, 23), (-1,))}
    assert len(seeds) == 8
    assert all(0 <= s < 2**63 for s in seeds)


def test_ball_is_uniform() -> None:
    # P(|xi| <= t) = (t / r)^n, so (|xi| / r)^n is uniform; and the direction has mean 0 and covariance I / n.
    like = (torch.zeros(2, dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    draws = torch.stack([flat(ts.ball(like, 0.5, seed)) for seed in range(2000)])
    lengths = draws.norm(dim=1)
    assert lengths.max() <= 0.5
    assert stats.kstest(((lengths / 0.5) ** 3).numpy(), "uniform").pvalue > 0.01
    directions = draws / lengths[:, None]
    assert directions.mean(0).abs().max() < 4 * math.sqrt(1 / 3 / 2000)
    torch.testing.assert_close(
        directions.T @ directions / 2000, torch.eye(3, dtype=torch.float64) / 3, atol=0.04, rtol=0
    )


def test_ball_depends_on_the_seed_alone() -> None:
    before = torch.get_rng_state()
    first = ts.ball(a, 1.0, 7)
    torch.manual_seed(1)
    assert torch.equal(flat(first), flat(ts.ball(a, 1.0, 7)))
    assert not torch.equal(flat(first), flat(ts.ball(a, 1.0, 8)))
    torch.set_rng_state(before)
    ts.ball(a, 1.0, 9)
    assert torch.equal(torch.get_rng_state(), before)
    assert not flat(ts.ball(a, 0.0, 7)).any()


def test_ball_of_half_precision_is_the_rounded_float32_draw() -> None:
    half = ts.ball((torch.zeros(50, dtype=torch.bfloat16),), 0.1, 3)[0]
    single = ts.ball((torch.zeros(50),), 0.1, 3)[0]
    assert torch.equal(half, single.bfloat16())
