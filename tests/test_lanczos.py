"""Lanczos against dense eigenvalues, and its probability bound against counted failures."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.problems import generator
from torchbilevel.lanczos import Eigenpair, distance_below, smallest_eigenpair

SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "random": lambda n: generator(1)(n),
    "smallest is multiple": lambda n: torch.cat([torch.full((n // 3,), -1.0), torch.linspace(0, 2, n - n // 3)]),
    "smallest are clustered": lambda n: torch.cat([-1 + 1e-7 * torch.arange(n // 3), torch.linspace(0, 1, n - n // 3)]),
    "two values": lambda n: torch.cat([torch.full((n // 2,), -1.0), torch.full((n - n // 2,), 3.0)]),
    "one negative": lambda n: torch.cat([torch.tensor([-0.05]), torch.linspace(0, 1, n - 1)]),
    "semidefinite, low rank": lambda n: torch.cat([torch.zeros(n - n // 5), torch.arange(n // 5) + 1.0]),
    "uniform": lambda n: torch.linspace(-0.01, 1, n),
    "logarithmic": lambda n: torch.logspace(-6, 2, n),
    "large and negative": lambda n: torch.cat([torch.tensor([-100.0]), torch.linspace(0, 1, n - 1)]),
    "all equal": lambda n: torch.full((n,), 2.5),
    "zero": torch.zeros,
}


def matrix(spectrum: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    q, _ = torch.linalg.qr(generator(len(spectrum))(len(spectrum), len(spectrum)))
    a = (q * spectrum.double()) @ q.T
    return ((a + a.T) / 2).to(dtype)


def draws(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Callable[[], Tensor]:
    g = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(n, generator=g, dtype=dtype)


@pytest.mark.parametrize("n", [1, 2, 3, 40, 300])
@pytest.mark.parametrize("name", SPECTRA)
def test_equals_the_dense_eigenvalue(name: str, n: int) -> None:
    a = matrix(SPECTRA[name](n))
    eigenvalues = torch.linalg.eigvalsh(a)
    true, size = float(eigenvalues[0]), max(float(eigenvalues.abs().max()), 1e-9)
    pair = smallest_eigenpair(lambda v: a @ v, draws(n)())
    assert abs(pair.value - true) <= 1e-8 * size
    assert -1e-13 * size <= pair.value - true <= pair.error + 1e-14 * size
    assert pair.error <= 1e-6 * size
    assert abs(pair.vector.norm() - 1) < 1e-12
    torch.testing.assert_close(a @ pair.vector, pair.value * pair.vector, atol=1e-6 * size, rtol=0)
    assert pair.residual == pytest.approx(float((a @ pair.vector - pair.value * pair.vector).norm()), abs=1e-13 * size)
    assert pair.largest <= float(eigenvalues[-1]) + 1e-12 * size
    assert pair.products <= n + 1


@pytest.mark.parametrize("n", [2, 40, 300])
@pytest.mark.parametrize("name", SPECTRA)
def test_float32_is_as_good_as_its_operator(name: str, n: int) -> None:
    a = matrix(SPECTRA[name](n), torch.float32)
    eigenvalues = torch.linalg.eigvalsh(a.double())
    true, size = float(eigenvalues[0]), max(float(eigenvalues.abs().max()), 1e-9)
    draw = draws(n, dtype=torch.float32)
    pair = smallest_eigenpair(
        lambda v: a @ v,
        draw(),
        failure_probability=1e-3,
        enough=lambda value, residual, error: error <= 1e-3 * size,
        redraw=draw,
    )
    assert pair.vector.dtype == torch.float32
    assert -1e-5 * size <= pair.value - true <= pair.error + 1e-6 * size
    assert pair.error <= 1e-3 * size


def test_the_bound_needs_a_redraw_only_where_round_off_ends_the_space() -> None:
    a = matrix(SPECTRA["two values"](100), torch.float32)
    draw = draws(100, dtype=torch.float32)
    alone = smallest_eigenpair(lambda v: a @ v, draw(), failure_probability=1e-3)
    assert alone.exact
    assert alone.products == 3
    assert alone.error > 1e-3
    pair = smallest_eigenpair(
        lambda v: a @ v, draw(), failure_probability=1e-3, redraw=draw, enough=lambda v, r, error: error < 1e-4
    )
    assert pair.error < 1e-4
    assert pair.products <= 13


def test_a_subspace_is_exhausted_and_its_complement_not_seen() -> None:
    n, m = 30, 8
    q, _ = torch.linalg.qr(generator(3)(n, m))
    draw = draws(n)
    pair = smallest_eigenpair(
        lambda v: q @ (q.T @ v),
        q @ (q.T @ draw()),
        enough=lambda value, residual, error: False,
        redraw=lambda: q @ (q.T @ draw()),
    )
    assert pair.value == pytest.approx(1.0, abs=1e-12)  # beyond the subspace: 0
    assert pair.exact
    assert pair.products == m + 1
    assert pair.error < 1e-12


def test_cap_on_the_basis_is_kept_and_the_bound_covers_what_it_costs() -> None:
    spectrum = torch.logspace(-6, 0, 400, dtype=torch.float64)
    pairs = [
        smallest_eigenpair(lambda v: spectrum * v, draws(400)(), max_basis=k, failure_probability=1e-3)
        for k in (1, 5, 20, 60)
    ]
    for k, pair in zip((1, 5, 20, 60), pairs, strict=True):
        assert pair.products == k + 1
        assert not pair.exact
        assert pair.value - pair.error <= 1e-6 <= pair.value
    assert pairs[3].error < pairs[2].error < 0.1 * pairs[1].error


def test_stops_as_soon_as_enough() -> None:
    spectrum = torch.cat([torch.tensor([-1.0]), torch.linspace(0, 1, 499)]).double()
    seen: list[tuple[float, float, float]] = []

    def enough(value: float, residual: float, error: float) -> bool:
        seen.append((value, residual, error))
        return value < -0.5

    pair = smallest_eigenpair(lambda v: spectrum * v, draws(500)(), enough=enough)
    assert pair.products < 20
    assert pair.value <= seen[-1][0] + 1e-12 < -0.5 <= seen[-2][0]
    values, _, errors = zip(*seen, strict=True)
    assert list(values) == sorted(values, reverse=True)
    assert all(v - e <= -1 for v, e in zip(values, errors, strict=True))


@pytest.mark.parametrize("name", ["random", "one negative", "uniform", "logarithmic", "semidefinite, low rank"])
def test_distance_below_holds_at_every_step_for_the_true_overlap(name: str) -> None:
    n = 60
    a, start = matrix(SPECTRA[name](n)), draws(n, 5)()
    eigenvalues, vectors = torch.linalg.eigh(a)
    lowest = eigenvalues - eigenvalues[0] <= 1e-9  # the projection on the whole eigenspace counts
    overlap = float((vectors[:, lowest].T @ start).norm() / start.norm())
    basis = [start / start.norm()]
    betas: list[float] = []
    previous = math.inf
    for _ in range(12):
        q = torch.stack(basis)
        ritz = torch.linalg.eigvalsh(q @ a @ q.T)
        w = a @ basis[-1]
        w = w - q.T @ (q @ w)
        w = w - q.T @ (q @ w)
        betas.append(float(w.norm()))
        s = distance_below(ritz, betas, overlap)
        assert float(ritz[0] - eigenvalues[0]) <= s * (1 + 1e-9)
        assert float((ritz - ritz[0] + s).log().sum()) == pytest.approx(
            sum(map(math.log, betas)) - math.log(overlap), abs=1e-6
        )
        previous = min(previous, s)
        basis.append(w / betas[-1])
    assert previous < 0.5 * float(eigenvalues[-1] - eigenvalues[0]), "never useful"


def count_failures(spectrum: Tensor, steps: int, probability: float, runs: int) -> int:
    true, failures = float(spectrum.min()), 0
    for seed in range(runs):
        pair = smallest_eigenpair(
            lambda v: spectrum * v,
            draws(len(spectrum), seed)(),
            max_basis=steps,
            failure_probability=probability,
            enough=lambda value, residual, error: False,
        )
        failures += pair.value - pair.error > true + 1e-9
    return failures


def test_failures_in_two_dimensions_are_as_frequent_as_theory_says() -> None:
    """One step from (c, s), |c| the overlap: theta - lambda = s^2, beta = |c s|, so it fails if |c| < |s| t."""
    probability, runs = 0.3, 800
    t = probability * math.sqrt(math.pi / 4)
    exact = 2 / math.pi * math.atan(t)
    failures = count_failures(torch.tensor([-1.0, 0.0], dtype=torch.float64), 1, probability, runs)
    assert exact < probability
    assert abs(failures - exact * runs) < 3.5 * math.sqrt(runs * exact * (1 - exact))


@pytest.mark.parametrize("steps", [3, 6, 12])
def test_failures_are_no_more_frequent_than_stated(steps: int) -> None:
    """A lone smallest eigenvalue near a dense rest is what a start can miss."""
    probability, runs = 0.3, 150
    spectrum = torch.cat([torch.tensor([-0.05]), torch.linspace(0, 1, 99)]).double()
    failures = count_failures(spectrum, steps, probability, runs)
    assert failures <= probability * runs + 3 * math.sqrt(runs * probability * (1 - probability))
    # A start without any overlap is the failure that the probability stands for.
    start = draws(100)()
    start[0] = 0.0
    pair = smallest_eigenpair(lambda v: spectrum * v, start, max_basis=90, failure_probability=probability)
    assert pair.value - pair.error > -0.05


def test_what_is_not_symmetric_widens_the_bar() -> None:
    a, skew = matrix(SPECTRA["uniform"](50)), generator(7)(50, 50)
    true = float(torch.linalg.eigvalsh(a)[0])
    exact, off = (
        smallest_eigenpair(lambda v, e=e: a @ v + e * (skew @ v), draws(50)(), enough=lambda v, r, error: error < 1e-6)
        for e in (0.0, 1e-4)
    )
    assert exact.error < 1e-6
    assert 1e-4 < off.error < 1e-1
    assert off.value - off.error <= true <= off.value + off.error


def test_length_of_the_start_does_not_matter() -> None:
    a, start = matrix(SPECTRA["random"](20)), draws(20)()
    one, other = (smallest_eigenpair(lambda v: a @ v, s * start) for s in (1.0, 4.0))
    assert one.value == other.value
    assert torch.equal(one.vector, other.vector)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_operator_that_is_not_finite_is_reported_as_such(bad: float) -> None:
    pair = smallest_eigenpair(lambda v: v * bad, draws(10)())
    assert isinstance(pair, Eigenpair)
    assert not math.isfinite(pair.value)
    assert pair.products == 2


def test_no_graph_is_kept() -> None:
    scale = torch.ones(5, dtype=torch.float64, requires_grad=True)
    assert not smallest_eigenpair(lambda v: scale * v, draws(5)()).vector.requires_grad
