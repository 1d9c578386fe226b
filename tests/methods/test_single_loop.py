"""SOBA and SABA against loops of ten lines; the table of SABA taken apart."""

from __future__ import annotations

import copy
import io
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods import noisy
from tests.methods.noisy import LOWER, UPPER, X0, Y0, Rows, close, d_f, feeds, g_y, run, second
from tests.problems import assign, flat, quadratic_minimax
from torchbilevel import GD, SABA, SOBA, Decay, Method, sample, stream
from torchbilevel.draws import BatchSizes, Draws
from torchbilevel.estimators.saba import Saba, mean, reduce
from torchbilevel.estimators.soba import Soba
from torchbilevel.samples import Block
from torchbilevel.sources import Blocks
from torchbilevel.tensors import Tensors

RHO, GAMMA = 0.5, 0.3
Z0 = torch.zeros_like(Y0)
SHUFFLED = partial(SABA, shuffle=True)


def directions(x: Tensor, y: Tensor, z: Tensor, lower: Rows, upper: Rows) -> tuple[Tensor, ...]:
    """Those of y, z and x."""
    (f_x, f_y), (g_xy_z, g_yy_z) = d_f(x, y, upper), second(x, y, z, lower)
    return g_y(x, y, lower), g_yy_z - f_y, f_x - g_xy_z


class Recorded(sample):
    """A ``sample`` that remembers which single rows it chose."""

    def __init__(self, tensors: Any, seed: int) -> None:
        super().__init__(tensors, seed)
        self.chosen: list[int] = []

    def choose(self, n: int) -> Tensor:
        rows = super().choose(n)
        self.chosen.append(int(rows[0]))
        return rows


def blocks(rows: Rows, n: int) -> list[Rows]:
    return list(zip(*(t.split(n) for t in rows), strict=True))


def shares(rows: Rows, n: int) -> list[float]:
    return [len(t) / len(rows[0]) for t in rows[0].split(n)]


def z_of(method: Method) -> Tensor:
    assert method.estimator.memory.z is not None
    return flat(method.estimator.memory.z)


# --- step for step --------------------------------------------------------------------------------

DECAYS: dict[str, tuple[dict[str, Any], float, float]] = {
    "default": ({}, 1 / 2, 1 / 2),
    "2/5 and 3/5": ({"decay": Decay(power=3 / 5, lower_power=2 / 5)}, 3 / 5, 2 / 5),
    "None": ({"decay": None}, 0.0, 0.0),
}


@pytest.mark.parametrize("decay", DECAYS)
def test_soba_step_for_step(decay: str) -> None:
    options, power, lower_power = DECAYS[decay]
    data, twin = feeds(), feeds()
    method = SOBA(noisy.problem(), GAMMA, lower_solver=GD(RHO, 1), batch_size=5, lower_batch_size=4, seed=3, **options)
    x, y, z = X0, Y0, Z0
    for t in range(10):
        (x_new,), (y_new,), _ = run(method, data, 1)
        d_y, d_z, d_x = directions(x, y, z, twin["lower"](4), twin["upper"](5))
        rho, gamma = RHO * (1 + t) ** -lower_power, GAMMA * (1 + t) ** -power
        x, y, z = x - gamma * d_x, y - rho * d_y, z - rho * d_z
        close([x_new], [x])
        close([y_new, z_of(method)], [y, z])
    assert twin["lower"].asked == data["lower"].asked and twin["upper"].asked == data["upper"].asked


@pytest.mark.parametrize("shuffle", [False, True])
def test_saba_step_for_step(shuffle: bool) -> None:
    n, m = 16, 25  # of 60 rows: four blocks of g and three of f, the last of each shorter
    data = {"lower": Recorded(LOWER, 1), "upper": Recorded(UPPER, 2)}
    method = SABA(noisy.problem(), GAMMA, lower_solver=GD(RHO, 1), batch_size=m, lower_batch_size=n, shuffle=shuffle)
    of_g, of_f, w_g, w_f = blocks(LOWER, n), blocks(UPPER, m), shares(LOWER, n), shares(UPPER, m)
    x, y, z = X0, Y0, Z0
    # the arguments at which each block was met last; before the first step that of the start, or none
    met_g = {} if shuffle else dict.fromkeys(range(len(of_g)), (x, y, z))
    met_f = {} if shuffle else dict.fromkeys(range(len(of_f)), (x, y))

    def parts_of_g(i: int, at: Any) -> Tensor:
        return torch.cat([g_y(*at[:2], of_g[i]), *second(*at, of_g[i])])

    def parts_of_f(j: int, at: Any) -> Tensor:
        return torch.cat(d_f(*at, of_f[j]))

    for t in range(25):
        (x_new,), (y_new,), _ = run(method, data, 1)
        now_g, now_f = (x, y, z), (x, y)
        if shuffle:
            i, j = (data[s].order(t // k, k)[t % k] for s, k in (("lower", len(of_g)), ("upper", len(of_f))))
        else:
            i, j = (data[s].chosen[-1] // size if t else 0 for s, size in (("lower", n), ("upper", m)))
        before_g, before_f = dict(met_g), dict(met_f)
        met_g[i], met_f[j] = now_g, now_f
        if t < len(of_g) - 1 and shuffle:
            estimate_g = torch.stack([parts_of_g(k, at) for k, at in met_g.items()]).mean(0)
        else:
            estimate_g = parts_of_g(i, now_g) - parts_of_g(i, before_g.setdefault(i, now_g))
            estimate_g += sum(w_g[k] * parts_of_g(k, at) for k, at in before_g.items())
        if t < len(of_f) - 1 and shuffle:
            estimate_f = torch.stack([parts_of_f(k, at) for k, at in met_f.items()]).mean(0)
        else:
            estimate_f = parts_of_f(j, now_f) - parts_of_f(j, before_f.setdefault(j, now_f))
            estimate_f += sum(w_f[k] * parts_of_f(k, at) for k, at in before_f.items())
        (d_y, g_xy_z, g_yy_z), (f_x, f_y) = estimate_g.split([4, 3, 4]), estimate_f.split([3, 4])
        x, y, z = x - GAMMA * (f_x - g_xy_z), y - RHO * d_y, z - RHO * (g_yy_z - f_y)
        close([x_new], [x])
        close([y_new, z_of(method)], [y, z])
    if not shuffle:
        assert {i // n for i in data["lower"].chosen} == set(range(4))
        assert {j // m for j in data["upper"].chosen} == set(range(3))


@pytest.mark.parametrize("shuffle", [False, True])
def test_saba_of_one_block_is_soba_on_all_rows_bitwise(shuffle: bool) -> None:
    saba = SABA(noisy.problem(), GAMMA, lower_solver=GD(RHO, 1), shuffle=shuffle)
    soba = SOBA(noisy.problem(), GAMMA, lower_solver=GD(RHO, 1), decay=None)
    for _ in range(20):
        run(saba, {"lower": sample(LOWER, 1), "upper": sample(UPPER, 2)}, 1)
        run(soba, {"lower": LOWER, "upper": UPPER}, 1)
        assert torch.equal(flat(saba.problem.x), flat(soba.problem.x))
        assert torch.equal(flat(saba.problem.y), flat(soba.problem.y)) and torch.equal(z_of(saba), z_of(soba))


# --- the table ------------------------------------------------------------------------------------


class Forced:
    """Blocks of which one is drawn always."""

    def __init__(self, source: sample, n: int, i: int) -> None:
        self.blocks, self.i = Blocks(source, n), i
        self.shares = self.blocks.shares

    def __call__(self, n: int | None = None) -> Any:
        return Block(self.blocks[self.i], self.i, self.shares)


def every_estimate(method: Method, x: Tensors, y: Tensors, n: int, m: int) -> list[tuple[float, Tensor]]:
    """The chance of every pair of blocks, and where each leads: v, y and z in one vector."""
    found = []
    for i, w in enumerate(shares(LOWER, n)):
        for j, u in enumerate(shares(UPPER, m)):
            sources = Forced(sample(LOWER, 0), n, i), Forced(sample(UPPER, 0), m, j)
            e = method.estimator.evaluate(x, y, method.estimator.memory, Draws(*sources, 0, BatchSizes(m, n), False))
            assert e.z is not None
            found.append((w * u, torch.cat([flat(e.hypergradient), flat(e.y), flat(e.z)])))
    return found


def exact(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """The same on all rows."""
    d_y, d_z, d_x = directions(x, y, z, LOWER, UPPER)
    return torch.cat([d_x, y - RHO * d_y, z - RHO * d_z])


def start(seed: int = 0, n: int = 16, m: int = 25, shuffle: bool = False) -> tuple[Method, dict[str, Any]]:
    method = SABA(noisy.problem(), GAMMA, lower_solver=GD(RHO, 1), batch_size=m, lower_batch_size=n, shuffle=shuffle)
    return method, {"lower": sample(LOWER, 2 * seed), "upper": sample(UPPER, 2 * seed + 1)}


def test_estimates_are_unbiased() -> None:
    method, data = start()
    run(method, data, 9)
    assert len({float(t[0].norm()) for name, t in method.estimator.memory.tracked.items() if " " in name}) == 7
    x, y = method.problem.x, method.problem.y
    found = every_estimate(method, x, y, 16, 25)
    expected = exact(flat(x), flat(y), z_of(method))
    close([sum(chance * v for chance, v in found)], [expected])
    assert all((v - expected).norm() > 1e-3 for _, v in found)  # the single ones are off


def test_estimates_are_exact_where_the_table_is_fresh() -> None:
    method, data = start()
    run(method, data, 1)
    memory = method.estimator.memory
    method.estimator.memory = type(memory)(memory.calls, None, None, memory.tracked)
    assign(method.problem.upper, X0)
    assign(method.problem.lower, Y0)
    for _, v in every_estimate(method, method.problem.x, method.problem.y, 16, 25):
        close([v], [exact(X0, Y0, Z0)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounding_errors_of_the_means_do_not_pile_up(dtype: torch.dtype) -> None:
    """The means are those of the table to round-off, after moves that were a million times larger than the entries."""
    table = {f"lower {i}": (torch.full((3,), 1.0 + i, dtype=dtype),) for i in range(4)}
    equal = (0.25,) * 4
    table["lower"] = mean(table, "lower", equal)
    for t in range(1, 401):
        size = 1e6 if t < 390 else 1.0
        new = (torch.full((3,), size * (1 + t % 7) / 3, dtype=dtype),)
        reduce(table, "lower", new, Block(None, t % 4, equal), t)
    rows = torch.stack([table[f"lower {i}"][0] for i in range(4)]).mean(0)
    torch.testing.assert_close(table["lower"][0], rows, rtol=4 * torch.finfo(dtype).eps, atol=0.0)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_saba_converges_with_constant_steps_and_soba_does_not(seed: int, shuffle: bool) -> None:
    """To a stationary point of Phi, at a linear rate; SOBA stays at its noise."""
    method, data = start(seed, n=30, m=30, shuffle=shuffle)
    soba = SOBA(noisy.problem(), GAMMA, lower_solver=GD(RHO, 1), decay=None, batch_size=30, lower_batch_size=30)
    norms = []
    for _ in range(3):
        run(method, data, 60)
        norms.append(float(noisy.grad_phi(flat(method.problem.x)).norm()))
    run(soba, feeds(seed=seed), 100)
    assert norms[1] < 1e-2 * norms[0] and norms[2] < 1e-2 * norms[1] and norms[2] < 1e-9
    assert noisy.grad_phi(flat(soba.problem.x)).norm() > 1e-3


# --- around ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "steps"), [(SOBA, 10), (SABA, 10), (SHUFFLED, 3), (SHUFFLED, 10)])
def test_a_resumed_run_equals_an_uninterrupted_one(kind: Any, steps: int) -> None:
    def begin() -> tuple[Method, dict[str, Any]]:
        method = kind(noisy.problem(), GAMMA, lower_solver=GD(RHO, 1), batch_size=7, lower_batch_size=9, seed=5)
        return method, {"lower": sample(LOWER, 1), "upper": sample(UPPER, 2)}

    method, data = begin()
    run(method, data, 22)
    first, early = begin()
    run(first, early, steps)
    state = first.state_dict()
    file = io.BytesIO()
    parts = {"x": first.problem.upper.state_dict(), "sources": {k: s.state_dict() for k, s in early.items()}}
    torch.save({"method": state, **parts}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    run(first, early, 22 - steps)  # what was saved is not what goes on
    for held in (saved, {**saved, "method": state}):
        late, sources = begin()
        late.problem.upper.load_state_dict(saved["x"])
        late.load_state_dict(held["method"])
        for side, source in sources.items():
            source.load_state_dict(saved["sources"][side])
        run(late, sources, 22 - steps)
        for other in (late, first):
            assert torch.equal(flat(method.problem.x), flat(other.problem.x))
            assert torch.equal(flat(method.problem.y), flat(other.problem.y))
            assert torch.equal(z_of(method), z_of(other)) and method.estimator.counts == other.estimator.counts


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_copy_goes_on_by_itself(shuffle: bool) -> None:
    method, data = start(shuffle=shuffle)
    method.estimator.keeps_past = True
    run(method, data, 5)
    twin, sources = copy.deepcopy(method), copy.deepcopy(data)
    before = copy.deepcopy(twin.estimator.memory.tracked)
    run(method, data, 6)
    assert all(torch.equal(t[0], before[k][0]) for k, t in twin.estimator.memory.tracked.items())
    probe = twin.estimator.probe()  # x has moved since the backward, so that this evaluates
    probe()
    assert torch.isfinite(flat(p.grad for p in twin.problem.upper_parameters)).all()
    run(twin, sources, 6)
    assert torch.equal(flat(method.problem.x), flat(twin.problem.x))
    assert torch.equal(flat(method.problem.y), flat(twin.problem.y)) and torch.equal(z_of(method), z_of(twin))


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("kind", [SOBA, SABA, SHUFFLED])
def test_a_probe_replays_the_last_backward(kind: Any, steps: int) -> None:
    method = kind(noisy.problem(), GAMMA, lower_solver=GD(RHO, 1), batch_size=7, lower_batch_size=9)
    data = {"lower": sample(LOWER, 1), "upper": sample(UPPER, 2)}
    method.estimator.keeps_past = True
    run(method, data, steps - 1)
    method.zero_grad()
    value = method.backward(**data)
    v, x, memory = [p.grad.clone() for p in method.problem.upper_parameters], flat(method.problem.x), None
    memory, draws = copy.deepcopy(method.estimator.memory), [source.draws for source in data.values()]
    probe = method.estimator.probe()
    assign(method.problem.upper, x + 0.1)
    assert probe() != value
    assign(method.problem.upper, x)
    assert torch.equal(probe(), value) and torch.equal(probe.value(), value)
    assert torch.equal(flat(p.grad for p in method.problem.upper_parameters), flat(v))
    assert [source.draws for source in data.values()] == draws
    now = method.estimator.memory.tracked
    assert now.keys() == memory.tracked.keys()
    assert all(torch.equal(flat(now[k]), flat(t)) for k, t in memory.tracked.items() if t or now[k])


def test_costs() -> None:
    for kind, first in ((SOBA, (1, 1, 9, 7)), (SHUFFLED, (1, 1, 9, 7)), (SABA, (7, 9, 60, 60))):
        method = kind(noisy.problem(), GAMMA, lower_solver=GD(RHO, 1), batch_size=7, lower_batch_size=9)
        data = {"lower": sample(LOWER, 1), "upper": sample(UPPER, 2)}
        for t in range(3):
            before = copy.copy(method.estimator.counts)
            run(method, data, 1)
            after, (of_g, of_f, rows_g, rows_f) = method.estimator.counts, first if t == 0 else (1, 1, None, None)
            for name in ("lower_gradients", "hessian_products", "jacobian_products"):
                assert getattr(after, name) - getattr(before, name) == of_g
            assert after.upper_gradients - before.upper_gradients == of_f
            if t == 0:
                assert after.lower_gradient_samples == after.hessian_product_samples == rows_g
                assert after.upper_gradient_samples == rows_f
    kept = sum(t.numel() for name, (t,) in method.estimator.memory.tracked.items() if " " in name)
    assert kept == 7 * (2 * 4 + 3) + 9 * (4 + 3)


@pytest.mark.parametrize("seed", range(3))
def test_phi_goes_down_under_noise(seed: int) -> None:
    method = SOBA(noisy.problem(), 1.0, lower_solver=GD(0.8, 1), batch_size=10, lower_batch_size=10)
    run(method, feeds(seed=seed), 60)
    assert noisy.phi(flat(method.problem.x)) < noisy.phi(X0) - 0.4


@pytest.mark.parametrize("kind", [Soba, Saba])
def test_what_cannot_work_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="plain steps here: use GD"):
        kind(GD(0.1, 1, momentum=0.9))
    with pytest.raises(ValueError, match="steps=1"):
        kind(GD(0.1, 2))
    with pytest.raises(ValueError, match="needs no z"):
        kind(GD(0.1, 1)).bind(quadratic_minimax().problem)


def test_shuffle_is_a_flag() -> None:
    with pytest.raises(TypeError, match="shuffle must be True or False, got None"):
        Saba(GD(0.1, 1), shuffle=None)  # type: ignore[arg-type]


def test_saba_refuses_data_whose_blocks_it_cannot_tell_apart() -> None:
    method, data = start()
    for side, bad in (("lower", LOWER), ("upper", stream([UPPER])), ("upper", None), ("lower", noisy.Feed(LOWER))):
        with pytest.raises(TypeError, match=rf"{side}= must be a source sample\(tensors, seed\)"):
            method.backward(**{**data, side: bad})
    run(method, data, 2)
    y = flat(method.problem.y)
    for other, n in ((tuple(t[:30] for t in LOWER), 2), (tuple(t.repeat(2, 1)[:70] for t in LOWER[:2]), 5)):
        with pytest.raises(ValueError, match=f"lower= has {n} blocks, and the table another number"):
            method.backward(**{**data, "lower": sample(other, 0)})
    assert torch.equal(flat(method.problem.y), y) and method.estimator.memory.calls == 2
    with pytest.raises(ValueError, match="must be positive"):
        Blocks(sample(LOWER, 0), 0)
    method, data = start(shuffle=True)
    run(method, data, 2)
    taken = next(s for s in range(9) if sample(LOWER, s).order(0, 4)[2] in data["lower"].order(0, 4)[:2])
    with pytest.raises(ValueError, match=r"lower= is a sample of another seed .* within the first pass"):
        method.backward(**{**data, "lower": sample(LOWER, taken)})
    with pytest.raises(ValueError, match="lower= has 2 blocks, and the table another number"):
        method.backward(**{**data, "lower": sample(tuple(t[:30] for t in LOWER), 0)})
    assert method.estimator.memory.calls == 2


@pytest.mark.parametrize("kind", [SOBA, SABA])
def test_a_z_that_is_not_finite_is_refused_before_anything_changes(kind: Any) -> None:
    method = kind(noisy.problem(), GAMMA, lower_solver=GD(RHO, 1))
    data = {"lower": sample(LOWER, 1), "upper": sample(UPPER, 2)}
    run(method, data, 1)
    bad = UPPER[0].clone()
    bad[0, 0] = torch.nan
    before = method.estimator.memory
    with pytest.raises(FloatingPointError):
        method.backward(lower=data["lower"], upper=sample((bad, UPPER[1]), 2))
    assert method.estimator.memory is before


def test_losses_without_x_are_refused() -> None:
    problem = noisy.problem()
    problem = type(problem)(
        problem.upper,
        problem.lower,
        upper_loss=lambda upper, lower, batch: noisy.f(X0, lower.flat(), batch),
        lower_loss=lambda upper, lower, batch: noisy.g(X0, lower.flat(), batch),
    )
    for kind in (SOBA, SABA):
        with pytest.raises(ValueError, match="zero in silence"):
            kind(problem, GAMMA, lower_solver=GD(RHO, 1)).backward(lower=sample(LOWER, 1), upper=sample(UPPER, 2))
