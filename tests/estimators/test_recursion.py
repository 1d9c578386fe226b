"""Recursions: without noise they are the plain estimate, with noise their formula; y moves as each says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.problems import flat, generator, quadratic_bilevel, quadratic_minimax, unflat
from torchbilevel import (
    GD,
    Adam,
    BatchSizes,
    Danskin,
    Decay,
    Direct,
    Estimator,
    Hybrid,
    Implicit,
    Method,
    Neumann,
    Plain,
    Recursion,
    SGDSolve,
    Spider,
    Storm,
    TorchOptim,
    sample,
)

LR, STEP = 0.3, 0.05
KINDS = ["minimax", "bilevel"]


def setting(kind: str, recursion: Recursion | None, steps: int = 1, **options: Any) -> tuple[Estimator, Any]:
    if kind == "minimax":
        q = quadratic_minimax()
        return Danskin(GD(LR, steps), recursion=recursion, **options).bind(q.problem), q
    b = quadratic_bilevel(curved=True)
    solver = options.pop("linear_solver", Neumann(4, 0.5))
    estimator = Implicit(GD(LR, steps), solver, recursion=recursion, warm_start_adjoint=False, **options)
    return estimator.bind(b.problem), b


def data(kind: str, q: Any, t: int | None = None) -> dict[str, Any]:
    if kind == "minimax":
        return {"batch": q.batch if t is None else sample(q.batch, seed=t)}
    batches = {"lower": q.lower_batch, "upper": q.upper_batch}
    return batches if t is None else {name: sample(batch, seed=t) for name, batch in batches.items()}


def path(kind: str, recursion: Recursion | None, steps: int = 1, n: int = 6, **options: Any) -> Tensor:
    """(x, y, v) after each of n gradient steps on full batches, one row each."""
    estimator, q = setting(kind, recursion, steps, **options)
    rows = []
    for _ in range(n):
        estimator.backward(**data(kind, q))
        v = flat(p.grad for p in estimator.problem.upper_parameters)
        rows.append(torch.cat([flat(estimator.problem.x), flat(estimator.problem.y), v]))
        with torch.no_grad():
            for p in estimator.problem.upper_parameters:
                p -= STEP * p.grad
                p.grad = None
    return torch.stack(rows)


# --- without noise --------------------------------------------------------------------------------


@pytest.mark.parametrize("tracks", ["hypergradient", "gradients"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_all_are_the_plain_estimate(kind: str, tracks: Any) -> None:
    plain = path(kind, Plain(simultaneous=True))
    for recursion in (Storm(0.3, 0.1, tracks), Storm(1.0, tracks=tracks), Hybrid(0.3, 0.6, tracks)):
        torch.testing.assert_close(path(kind, recursion), plain, rtol=1e-12, atol=1e-12)
    # The last of K estimates of SPIDER is that after K - 1 steps of y.
    before = path(kind, None, steps=3)
    torch.testing.assert_close(path(kind, Spider(2, tracks, "last"), steps=4), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_anchors_after_the_moves_start_with_an_anchor_alone(kind: str) -> None:
    got, before = path(kind, Spider(2, selects="last", anchors="after"), steps=4), path(kind, None, steps=3)
    estimator, _ = setting(kind, None)
    y0 = flat(estimator.problem.y)
    dx = len(flat(estimator.problem.x))
    assert torch.equal(got[0, dx : dx + len(y0)], y0) and not torch.allclose(before[0, dx : dx + len(y0)], y0)


@pytest.mark.parametrize("kind", KINDS)
def test_argmin_takes_the_y_after_which_y_moves_least(kind: str) -> None:
    """Along gradient descent with a small step that is the last; with a step beyond 2 / L it is the first."""
    small, large = Spider(9, selects="argmin"), Spider(9, selects="last")
    torch.testing.assert_close(path(kind, small, steps=4), path(kind, large, steps=4), rtol=0, atol=0)
    estimator, q = setting(kind, small, 4)
    estimator.lower_solver = GD(9.0, 4)
    y0 = flat(estimator.problem.y).clone()
    estimator.backward(**data(kind, q))
    assert torch.equal(flat(estimator.problem.y), y0)


def test_simultaneous_moves_are_gradient_descent_ascent() -> None:
    estimator, q = setting("minimax", Plain(simultaneous=True))
    x, y = flat(q.problem.x).clone(), flat(q.problem.y).clone()
    estimator.backward(q.batch)
    v, u = gradients("minimax", q, x, y, q.batch)
    torch.testing.assert_close(flat(p.grad for p in q.problem.upper_parameters), v)
    torch.testing.assert_close(flat(q.problem.y), y - LR * u)
    assert estimator.memory.tracked == {}


# --- with noise -----------------------------------------------------------------------------------


def gradients(kind: str, q: Any, x: Tensor, y: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """(f_x, g_y) of a minimax problem by autograd on its raw loss."""
    upper, lower = q.modules()
    for module, vector in ((upper, x), (lower, y)):
        for p, t in zip(module.parameters(), unflat(vector, list(module.parameters())), strict=True):
            p.data.copy_(t)
    q.loss(upper, lower, batch).backward()
    return flat(p.grad for p in upper.parameters()), -flat(p.grad for p in lower.parameters())


class Numbered:
    """A source of given draws; ``served`` lists them in order."""

    def __init__(self, batch: tuple[Tensor, ...], seed: int) -> None:
        self._source, self.served = sample(batch, seed), []

    def __call__(self, n: int | None) -> Any:
        self.served.append(self._source(n))
        return self.served[-1]


@pytest.mark.parametrize("recursion", [Plain(simultaneous=True), Storm(1.0)])
def test_without_a_past_only_the_first_estimate_is_on_a_large_sample(recursion: Recursion) -> None:
    estimator, q = setting("minimax", recursion, batch_sizes=BatchSizes(upper=2, anchor=4))
    source = Numbered(q.batch, 0)
    for _ in range(3):
        estimator.backward(source)
    assert [len(rows) for (rows,) in source.served] == [4, 2, 2]


def test_storm_and_hybrid_step_for_step() -> None:
    for recursion in (Storm(0.4, 0.7), Hybrid(0.4, 0.7)):
        decay = Decay(power=0.5, offset=2.0)
        estimator, q = setting("minimax", recursion, batch_sizes=BatchSizes(upper=2, anchor=4), decay=decay)
        method = Method(q.problem, estimator, torch.optim.SGD(q.problem.upper_parameters, STEP))
        source, x, y = Numbered(q.batch, 0), flat(q.problem.x).clone(), flat(q.problem.y).clone()
        v = u = x_old = y_old = None
        for t in range(5):
            source.served.clear()
            method.zero_grad()
            method.backward(source)
            method.step()
            batch, *other = source.served
            assert len(batch[0]) == (4 if t == 0 else 2) and len(other) == (t > 0 and isinstance(recursion, Hybrid))
            new = gradients("minimax", q, x, y, batch)
            if t == 0:
                v, u = new
            else:
                old = gradients("minimax", q, x_old, y_old, batch)
                s = (2 / (2 + t - 1)) ** 0.5
                a, b = min(1, 0.4 * s**2), min(1, 0.7 * s**2)
                if other:
                    fresh = gradients("minimax", q, x, y, other[0])
                    v = (1 - a) * (v + new[0] - old[0]) + a * fresh[0]
                    u = (1 - b) * (u + new[1] - old[1]) + b * fresh[1]
                else:
                    v, u = new[0] + (1 - a) * (v - old[0]), new[1] + (1 - b) * (u - old[1])
            x_old, y_old, s = x, y, (2 / (2 + t)) ** 0.5
            x, y = x - STEP * s * v, y - LR * s * u
            torch.testing.assert_close(flat(q.problem.x), x, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(flat(q.problem.y), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("anchors", ["before", "after", "as printed"])
@pytest.mark.parametrize("selects", ["argmin", "last"])
def test_spider_step_for_step(anchors: Any, selects: Any) -> None:
    K, q_period = 3, 2
    recursion = Spider(q_period, selects=selects, anchors=anchors)
    estimator, q = setting("minimax", recursion, K, batch_sizes=BatchSizes(upper=2, anchor=5))
    method = Method(q.problem, estimator, torch.optim.SGD(q.problem.upper_parameters, STEP))
    source, x, y = Numbered(q.batch, 0), flat(q.problem.x).clone(), flat(q.problem.y).clone()
    v = u = x_old = None
    for t in range(5):
        source.served.clear()
        method.zero_grad()
        method.backward(source)
        method.step()
        served: Iterator[Any] = iter(source.served)
        old, moved = (x_old, y), True
        if t % q_period == 0 and (anchors != "after" or t == 0):
            v, u = gradients("minimax", q, x, y, next(served))
            old = (x_old, y) if anchors == "as printed" and t > 0 else (x, y)
            moved = anchors != "after"
        if moved:
            ys, vs, us, lengths = [y], [], [], []
            for k in range(K):
                if old is not None and not (k == 0 and old[0] is x):
                    batch = next(served)
                    new, past = gradients("minimax", q, x, ys[k], batch), gradients("minimax", q, *old, batch)
                    v, u = v + new[0] - past[0], u + new[1] - past[1]
                vs.append(v)
                us.append(u)
                lengths.append(u.norm())
                old = (x, ys[k])
                ys.append(ys[k] - LR * u)
            k = K - 1 if selects == "last" else min(range(K), key=lambda i: float(lengths[i]))
            y, v, u = ys[k], vs[k], us[k]
            if anchors == "after" and t % q_period == 0:
                v, u = gradients("minimax", q, x, y, next(served))
        assert next(served, None) is None
        x_old, x = x, x - STEP * v
        torch.testing.assert_close(flat(q.problem.x), x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(flat(q.problem.y), y, rtol=1e-12, atol=1e-12)


def test_gradients_tracked_are_finished_by_a_fresh_solve() -> None:
    """With the exact solve and full batches of g, v = f_x - g_xy g_yy^-1 f_y at the estimates of f_x and f_y."""
    recursion = Storm(0.4, tracks="gradients")
    sizes = BatchSizes(upper=2, lower=50)
    estimator, q = setting("bilevel", recursion, batch_sizes=sizes, linear_solver=Direct())
    for t in range(3):
        for p in q.problem.upper_parameters:
            p.grad = None
        y = flat(q.problem.y).clone()
        estimator.backward(**data("bilevel", q, t))
        kept = estimator.memory.tracked
        f_x, f_y = flat(kept["upper"][: len(q.problem.x)]), flat(kept["upper"][len(q.problem.x) :])
        x = flat(q.problem.x)
        r = q.response
        # g_y = M(x) y - B x - c, so that g_xy z = (d g_y / d x)' z with d g_y / d x_j = D_j y - B e_j.
        M, first = r.matrix(x), (r.w * (r.E @ x).exp())[:, None] * r.E
        z = torch.linalg.solve(M, f_y)
        want = f_x - (first * y[:, None] - r.B).T @ z
        got = flat(p.grad for p in q.problem.upper_parameters)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            for p in q.problem.upper_parameters:
                p -= STEP * p.grad


# --- memory, probes, cost -------------------------------------------------------------------------

NOISY: dict[str, tuple[str, Recursion | None, int]] = {
    "plain": ("bilevel", None, 3),
    "SGDA": ("minimax", Plain(simultaneous=True), 1),
    "Storm": ("bilevel", Storm(0.3), 1),
    "Hybrid": ("minimax", Hybrid(0.3), 1),
    "Spider": ("bilevel", Spider(2, tracks="hypergradient", anchors="after"), 3),
    "Spider, gradients": ("bilevel", Spider(2), 3),
}
SIZES = BatchSizes(upper=2, lower=3, jvp=2, hvp=1, anchor=5)


def noisy(name: str) -> tuple[Method, dict[str, Any]]:
    kind, recursion, steps = NOISY[name]
    estimator, q = setting(kind, recursion, steps, batch_sizes=SIZES, decay=Decay())
    return Method(q.problem, estimator, torch.optim.SGD(q.problem.upper_parameters, STEP)), data(kind, q, 0)


def advance(method: Method, sources: dict[str, Any], n: int) -> None:
    for _ in range(n):
        method.zero_grad()
        method.backward(**sources)
        method.step()


@pytest.mark.parametrize("name", list(NOISY))
def test_resumed_equals_uninterrupted(name: str, tmp_path: Any) -> None:
    method, sources = noisy(name)
    advance(method, sources, 3)
    saved = {
        "method": method.state_dict(),
        "upper": method.problem.upper.state_dict(),
        "sources": {k: s.state_dict() for k, s in sources.items()},
    }
    torch.save(saved, tmp_path / "checkpoint.pt")
    advance(method, sources, 4)
    other, others = noisy(name)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other.problem.upper.load_state_dict(saved["upper"])
    other.load_state_dict(saved["method"])
    for k, s in others.items():
        s.load_state_dict(saved["sources"][k])
    advance(other, others, 4)
    assert torch.equal(flat(other.problem.x), flat(method.problem.x))
    assert torch.equal(flat(other.problem.y), flat(method.problem.y))
    assert other.estimator.counts == method.estimator.counts


@pytest.mark.parametrize("name", list(NOISY))
def test_a_probe_repeats_the_last_backward_on_its_samples(name: str) -> None:
    method, sources = noisy(name)
    method.estimator.keeps_past = True
    advance(method, sources, 3)
    method.zero_grad()
    loss = method.backward(**sources)
    v, x = flat(p.grad for p in method.problem.upper_parameters), flat(method.problem.x).clone()
    state, drawn = method.state_dict(), {k: s.draws for k, s in sources.items()}
    probe = method.estimator.probe()
    normal = generator(3)
    with torch.no_grad():
        for p in method.problem.upper_parameters:
            p += normal(*p.shape, 1)[..., 0]
    probe()
    assert not torch.allclose(flat(p.grad for p in method.problem.upper_parameters), v)
    with torch.no_grad():
        for p, t in zip(method.problem.upper_parameters, unflat(x, method.problem.x), strict=True):
            p.copy_(t)
    assert torch.equal(probe(), loss) and torch.equal(probe.value(), loss)
    assert torch.equal(flat(p.grad for p in method.problem.upper_parameters), v)
    assert drawn == {k: s.draws for k, s in sources.items()}
    after = method.state_dict()["method"]["estimator"]
    before = state["method"]["estimator"]
    assert all(torch.equal(flat(dict(after["tracked"])[k]), flat(t)) for k, t in before["tracked"])
    assert after["calls"] == before["calls"] and torch.equal(flat(after["y"]), flat(before["y"]))


def test_the_past_is_kept_where_it_is_needed() -> None:
    method, sources = noisy("Storm")
    advance(method, sources, 1)
    with pytest.raises(RuntimeError, match=r"estimator.keeps_past = True"):
        method.estimator.probe()


@pytest.mark.parametrize(
    ("name", "first", "later"),
    [
        # f gradients, g gradients, Hessian products, Jacobian products
        ("SGDA", (1, 0, 0, 0), (1, 0, 0, 0)),
        ("Hybrid", (1, 0, 0, 0), (3, 0, 0, 0)),
        ("Storm", (1, 1, 4, 1), (2, 2, 8, 2)),
        ("plain", (1, 3, 4, 1), (1, 3, 4, 1)),
        ("Spider", (1, 1, 4, 1), (6, 6, 24, 6)),
        ("Spider, gradients", (5, 5, 4, 1), (6, 6, 4, 1)),
    ],
)
def test_cost_is_two_gradients_for_each_correction(name: str, first: tuple[int, ...], later: tuple[int, ...]) -> None:
    method, sources = noisy(name)
    for want in (first, later):
        before = method.estimator.counts.state_dict()
        advance(method, sources, 1)
        spent = {k: n - before[k] for k, n in method.estimator.counts.state_dict().items()}
        kinds = ("upper_gradients", "lower_gradients", "hessian_products", "jacobian_products")
        assert tuple(spent[k] for k in kinds) == want


def test_the_adjoint_may_go_on_in_a_single_loop() -> None:
    """SGD on the linear system, one step per call: at fixed x and y it tends to the solution."""
    q = quadratic_bilevel()
    estimator = Implicit(None, SGDSolve(1, 0.5)).bind(q.problem)
    x, y = flat(q.problem.x), flat(q.problem.y)
    for _ in range(300):
        estimator.backward(lower=q.lower_batch, upper=q.upper_batch)
    f_y = y - q.upper_batch[0].mean(0) + q.C.T @ x
    assert estimator.memory.z is not None
    torch.testing.assert_close(flat(estimator.memory.z), torch.linalg.solve(q.response.matrix(x), f_y))


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Storm(0.0), ValueError, r"weight must be in \(0, 1\], got 0.0"),
        (lambda: Storm(None), ValueError, r"weight must be in \(0, 1\], got None"),  # type: ignore[arg-type]
        (lambda: Storm("0.5"), ValueError, r"weight must be in \(0, 1\], got '0.5'"),  # type: ignore[arg-type]
        (lambda: Storm(0.5, 1.5), ValueError, r"lower_weight must be in \(0, 1\], got 1.5"),
        (lambda: Hybrid(0.5, tracks="y"), ValueError, "tracks must be one of 'hypergradient', 'gradients', got 'y'"),
        (lambda: Spider(0), ValueError, "period must be a positive integer, got 0"),
        (lambda: Spider(2, selects="next"), ValueError, "selects must be one of 'argmin', 'last', got 'next'"),
        (lambda: Spider(2, anchors="never"), ValueError, "anchors must be one of .*got 'never'"),
        (lambda: Danskin(GD(0.1, 1), recursion=Storm), TypeError, r"recursion must be Recursion, such as Storm\("),
        (lambda: Danskin(GD(0.1, 1), batch_sizes=3), TypeError, r"batch_sizes must be BatchSizes, such as .*got 3"),
        (lambda: Danskin(GD(0.1, 1), decay=0.5), TypeError, "decay must be Decay, such as .*got 0.5"),
        (lambda: Danskin(GD(0.1, 1), warm_start="no"), TypeError, "warm_start must be True or False, got 'no'"),
        (lambda: Implicit(None, Neumann(3, 0.1, shrink=0.1)), ValueError, "shrink=0.1 .*give a hvp_batch_size"),
        (lambda: Danskin(GD), TypeError, r"lower_solver must be a lower solver such as .* got GD"),
        (lambda: Danskin(GD(0.1, 1), initial_solver=0), TypeError, "initial_solver must be a lower solver .* got int"),
        (lambda: Danskin(GD(0.1, 1), recursion=Storm(0.5), warm_start=False), ValueError, "needs warm_start=True"),
        (lambda: Danskin(None, recursion=Storm(0.5)), ValueError, "use GD, SignGD or Adam without tol, got None"),
        (lambda: Danskin(GD(0.1, 1, tol=0.1), recursion=Storm(0.5)), ValueError, "without tol, got GD"),
        (lambda: Danskin(GD(0.1, 2), recursion=Storm(0.5)), ValueError, "give the lower solver steps=1, got 2"),
        (lambda: Danskin(GD(0.1, 1), recursion=Spider(3)), ValueError, "give the lower solver steps >= 2, got 1"),
        (
            lambda: Danskin(TorchOptim(torch.optim.SGD, 1, lr=0.1), decay=Decay()),
            ValueError,
            "decay= scales the lr of the lower solver",
        ),
    ],
)
def test_what_cannot_work_is_refused(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_adam_moves_y_along_the_estimate() -> None:
    q = quadratic_minimax()
    y = flat(q.problem.y).clone()
    Danskin(Adam(0.1, 1), recursion=Storm(0.5)).bind(q.problem).backward(q.batch)
    u = gradients("minimax", q, q.x0, y, q.batch)[1]
    torch.testing.assert_close(flat(q.problem.y), y - 0.1 * u / (u.abs() + 1e-8))


def test_numbers_that_are_not_finite_do_not_pass() -> None:
    for recursion in (Storm(0.5), Spider(2)):
        estimator, q = setting("minimax", recursion, 1 if isinstance(recursion, Storm) else 3)
        estimator.backward(q.batch)
        bad = tuple(torch.full_like(t, float("nan")) for t in q.batch)
        y = flat(q.problem.y).clone()
        with pytest.raises(FloatingPointError):
            estimator.backward(bad)
        assert torch.equal(flat(q.problem.y), y) and estimator.memory.calls == 1
