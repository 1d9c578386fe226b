"""SGDA, SGDmax, SREDA and Acc-MDA against loops in plain tensors, and what they are without noise."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.problems import Split, flat, generator, quadratic_bilevel, quadratic_minimax
from torchbilevel import (
    GD,
    SGDA,
    SREDA,
    AccMDA,
    Decay,
    GDmax,
    Method,
    MinimaxProblem,
    PiSARAH,
    SGDmax,
    projections,
    sample,
    stream,
)

# --- a problem all of whose derivatives are noisy, in plain tensors ---

N, MU = 50, 0.3
Point = tuple[Tensor, Tensor]
Map = Callable[[Tensor], Tensor]
_normal = generator(0)
A = 0.7 * _normal(N, 3).sign()
B = 0.6 * (torch.cat([A, A[:, :1]], 1) + 0.5 * _normal(N, 4)).sign()
ROWS = (A, B, 0.2 + 0.5 * _normal(N).sign())
X0 = torch.tensor([2.0, -2.0, 1.5], dtype=torch.float64)
Y0 = torch.full((4,), 0.25, dtype=torch.float64)


def f(x: Tensor, y: Tensor, batch: Any) -> Tensor:
    a, b, c = batch
    s, t = a @ x, b @ y
    return ((s + c) * t - 0.5 * t.square() + s.cos()).mean() - 0.5 * MU * y.square().sum() + 0.1 * x.square().sum()


def gradients(x: Tensor, y: Tensor, batch: Any) -> Point:
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    v, u = torch.autograd.grad(f(x, y, batch), (x, y))
    return v, u


def y_star(x: Tensor) -> Tensor:
    return torch.linalg.solve(B.T @ B / N + MU * torch.eye(4, dtype=x.dtype), B.T @ (A @ x + ROWS[2]) / N)


def slope(x: Tensor) -> Tensor:
    """|grad Phi|."""
    return gradients(x, y_star(x), ROWS)[0].norm()


def to_simplex(y: Tensor) -> Tensor:
    ordered = y.sort(descending=True).values
    return (y - ((ordered.cumsum(0) - 1) / torch.arange(1, 5)).max()).clamp(min=0)


def free(t: Tensor) -> Tensor:
    return t


SETS: dict[str, tuple[Any, Map]] = {
    "free": (None, free),
    "box": (projections.linf_ball(0.6), lambda y: y.clamp(-0.6, 0.6)),
    "simplex": (projections.simplex(), to_simplex),
}


# Of the first two coordinates of x; the way down leads out of it.
BOX = torch.tensor([1.0, -2.5], dtype=torch.float64), torch.tensor([2.5, -1.5], dtype=torch.float64)


def problem(y_set: str = "free", upper_projection: Any = None) -> MinimaxProblem:
    shapes = [(4,)] if y_set == "simplex" else [(2, 1), (), (1,)]
    return MinimaxProblem(
        Split(X0, [(2,), ()]),
        Split(Y0, shapes),
        loss=lambda upper, lower, batch: f(upper.flat(), lower.flat(), batch),
        projection=SETS[y_set][0],
        upper_projection=upper_projection,
    )


class Feed:
    """A source whose draw number k is the same in every instance, and the sizes asked of it."""

    def __init__(self) -> None:
        self.asked: list[int | None] = []

    def __call__(self, n: int | None) -> Any:
        self.asked.append(n)
        index = torch.randint(N, (n or N,), generator=torch.Generator().manual_seed(len(self.asked)))
        return tuple(t[index] for t in ROWS)


def advance(method: Method, data: Any, n: int = 1) -> Method:
    for _ in range(n):
        method.zero_grad()
        method.backward(data)
        method.step()
    return method


def follows(method: Method, reference: Callable[[Feed], Iterator[Point]], steps: int = 7) -> None:
    """The method and the loop are at one point after every step, and ask for the same samples in the same order."""
    feed, other = Feed(), Feed()
    for x, y in islice(reference(other), steps):
        advance(method, feed)
        torch.testing.assert_close(flat(method.problem.x), x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(flat(method.problem.y), y, rtol=1e-12, atol=1e-12)
        assert feed.asked == other.asked
    assert (x - X0).norm() > 0.1 and (y - Y0).norm() > 0.1


# --- each method as its paper has it ---


@pytest.mark.parametrize("y_set", SETS)
def test_sgda_step_for_step(y_set: str) -> None:
    def reference(draw: Feed) -> Iterator[Point]:
        x, y = X0, Y0
        while True:
            v, u = gradients(x, y, draw(4))
            x, y = x - 0.1 * v, SETS[y_set][1](y + 0.3 * u)
            yield x, y

    follows(SGDA(problem(y_set), 0.1, lower_solver=GD(0.3, 1), batch_size=4), reference)


def test_alternating_sgda_step_for_step() -> None:
    def reference(draw: Feed) -> Iterator[Point]:
        x, y = X0, Y0
        while True:
            y = y + 0.3 * gradients(x, y, draw(4))[1]
            x = x - 0.1 * gradients(x, y, draw(4))[0]
            yield x, y

    follows(SGDA(problem(), 0.1, lower_solver=GD(0.3, 1), alternating=True, batch_size=4), reference)


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("y_set", SETS)
def test_sgdmax_step_for_step(y_set: str, warm: bool) -> None:
    def reference(draw: Feed) -> Iterator[Point]:
        x, y = X0, Y0
        while True:
            y = y if warm else Y0
            for _ in range(3):
                y = SETS[y_set][1](y + 0.3 * gradients(x, y, draw(2))[1])
            x = x - 0.1 * gradients(x, y, draw(4))[0]
            yield x, y

    method = SGDmax(problem(y_set), 0.1, lower_solver=GD(0.3, 3), batch_size=4, lower_batch_size=2, warm_start=warm)
    follows(method, reference)


@pytest.mark.parametrize("selects", ["argmin", "last"])
@pytest.mark.parametrize("y_set", SETS)
def test_sreda_step_for_step(y_set: str, selects: Any) -> None:
    selected, short = set(), set()

    def reference(draw: Feed) -> Iterator[Point]:
        x, y, project = X0, Y0, SETS[y_set][1]
        for t in count():
            if t % 3 == 0:
                v, u = gradients(x, y, draw(9))
            short.add(bool(0.4 / v.norm() > 0.4))
            last, p, x = (x, y), (x, y), x - min(0.4 / v.norm(), 0.4) * v
            yield x, last[1]
            trail = []
            for _ in range(4):
                batch = draw(2)
                new, old = gradients(x, y, batch), gradients(*p, batch)
                v, u, p = v + new[0] - old[0], u + new[1] - old[1], (x, y)
                ahead = project(y + 2.0 * u)
                trail.append((float((ahead - y).norm()), y, v, u))
                y = ahead
            best = trail[-1] if selects == "last" else min(trail, key=lambda entry: entry[0])
            selected.add(next(k for k in range(4) if trail[k] is best))
            _, y, v, u = best

    options = {"period": 3, "selects": selects, "batch_size": 2, "anchor_size": 9}
    follows(SREDA(problem(y_set), 0.4, max_rate=0.4, lower_solver=GD(2.0, 4), **options), reference, 10)
    assert short == {True, False} and (selected == {3} if selects == "last" else len(selected) > 1)


@pytest.mark.parametrize("x_set", ["free", "box"])
@pytest.mark.parametrize("y_set", SETS)
def test_acc_mda_step_for_step(y_set: str, x_set: str) -> None:
    def reference(draw: Feed) -> Iterator[Point]:
        x, y, project_y = X0, Y0, SETS[y_set][1]
        project_x: Map = (lambda x: torch.cat([x[:2].clamp(*BOX), x[2:]])) if x_set == "box" else free
        v, u = gradients(x, y, draw(4))
        for t in count():
            s = (2 / (2 + t)) ** (1 / 3)
            old, x, y = (x, y), x + s * (project_x(x - 0.5 * v) - x), y + s * (project_y(y + 0.6 * u) - y)
            yield x, y
            a, b, batch = 0.5 * s**2, 0.8 * s**2, draw(4)
            past, (v_new, u_new) = gradients(*old, batch), gradients(x, y, batch)
            v, u = v_new + (1 - a) * (v - past[0]), u_new + (1 - b) * (u - past[1])

    bounded = problem(y_set, {"p0": projections.box(*BOX)} if x_set == "box" else None)
    weights = {"weight": 0.5, "lower_weight": 0.8, "decay": Decay(offset=2)}
    follows(AccMDA(bounded, 0.5, lower_solver=GD(0.6, 1), batch_size=4, **weights), reference)


def test_the_decay_of_acc_mda_is_the_papers() -> None:
    assert AccMDA(problem(), 0.1, weight=0.5, lower_solver=GD(0.3, 1)).estimator.decay == Decay(power=1 / 3, offset=1)


def test_sreda_may_start_from_pisarah() -> None:
    start = PiSARAH(0.5, steps=3, restarts=2)
    method, feed, draw = sreda(initial_solver=start), Feed(), Feed()
    advance(method, feed)
    y = Y0
    for _ in range(2):
        u, last = gradients(X0, y, draw(9))[1], y
        for _ in range(2):
            y, batch = last + 0.5 * u, draw(4)
            u, last = u + gradients(X0, y, batch)[1] - gradients(X0, last, batch)[1], y
        y = y + 0.5 * u
    v = gradients(X0, y, draw(9))[0]
    torch.testing.assert_close(flat(method.problem.y), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flat(method.problem.x), X0 - min(0.1 / v.norm(), 0.25) * v, rtol=1e-12, atol=1e-12)
    assert feed.asked == draw.asked == [9, 4, 4, 9, 4, 4, 9]
    advance(method, feed)
    assert feed.asked[7:] == [4] * 4  # once is enough


# --- reductions ---


def sgda(**options: Any) -> Method:
    return SGDA(problem(), 0.1, lower_solver=GD(0.3, 1), **{"batch_size": 4, **options})


def sgdmax(**options: Any) -> Method:
    return SGDmax(problem(), 0.1, lower_solver=GD(0.3, 3), **{"batch_size": 4, **options})


def sreda(**options: Any) -> Method:
    options = {"batch_size": 4, "anchor_size": 9, "period": 3, "max_rate": 0.25, **options}
    return SREDA(problem(), options.pop("lr", 0.1), lower_solver=GD(0.3, 4), **options)


def acc_mda(**options: Any) -> Method:
    return AccMDA(problem(), 0.1, lower_solver=GD(0.3, 1), **{"weight": 0.3, "batch_size": 4, **options})


def same_path(a: Method, b: Method, data: Callable[[], Any], exactly: bool = False) -> None:
    sources = data(), data()
    for _ in range(8):
        advance(a, sources[0])
        advance(b, sources[1])
        for left, right in ((a.problem.x, b.problem.x), (a.problem.y, b.problem.y)):
            tol = 0.0 if exactly else 1e-12
            torch.testing.assert_close(flat(left), flat(right), rtol=tol, atol=tol)


def test_on_full_batches_sgda_is_descent_ascent() -> None:
    x, y, method = X0, Y0, sgda(batch_size=None)
    for _ in range(20):
        s, t = A @ x, B @ y
        v = (A.T @ (t - s.sin())) / N + 0.2 * x
        u = B.T @ (s + ROWS[2] - t) / N - MU * y
        x, y = x - 0.1 * v, y + 0.3 * u
        advance(method, ROWS)
        torch.testing.assert_close(flat(method.problem.x), x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(flat(method.problem.y), y, rtol=1e-12, atol=1e-12)


def test_on_full_batches_acc_mda_without_decay_is_sgda() -> None:
    same_path(acc_mda(decay=None), sgda(), lambda: ROWS)


def test_acc_mda_of_weight_one_without_decay_is_sgda_on_every_sample() -> None:
    same_path(acc_mda(weight=1.0, decay=None), sgda(), Feed, exactly=True)


def test_on_full_batches_sgdmax_and_alternating_sgda_are_gdmax() -> None:
    for method, steps in (sgdmax(reuse_batch=True), 3), (sgda(alternating=True, reuse_batch=True), 1):
        same_path(method, GDmax(problem(), 0.1, lower_solver=GD(0.3, steps)), lambda: ROWS, exactly=True)


@pytest.mark.parametrize("period", [1, 3, 100])
def test_on_full_batches_sreda_is_gdmax(period: int) -> None:
    """With K - 1 ascent steps, after a first step of x alone; ``lr`` is out of reach here."""
    method = sreda(period=period, selects="last", lr=1e9, reuse_batch=True)
    advance(method, ROWS)
    other = GDmax(problem(), 0.25, lower_solver=GD(0.3, 3))
    other.problem.upper.load_state_dict(method.problem.upper.state_dict())
    same_path(method, other, lambda: ROWS)


def test_sreda_of_period_one_ascends_on_the_large_sample_of_the_step_before() -> None:
    """Where corrections are free of noise: v is a gradient on the new large sample, u one on the last."""
    q = quadratic_minimax()
    method = SREDA(q.problem, 0.1, period=1, lower_solver=GD(0.8, 4), selects="last", batch_size=1, anchor_size=3)

    def slopes(x: Tensor, y: Tensor, rows: Tensor) -> Point:
        u = q.V.T @ x
        return q.P @ x + q.q * q.V @ u.pow(3) + q.C @ y, q.C.T @ x + rows.mean(0) - q.Q @ y

    served: list[Tensor] = []
    rows = sample(q.batch, seed=0)

    def source(n: int) -> tuple[Tensor, ...]:
        batch = rows(n)
        served.extend(batch if n == 3 else ())
        return batch

    x, y = q.x0, q.y0
    for t in range(6):
        advance(method, source)
        for _ in range(3 if t else 0):
            y = y + 0.8 * slopes(x, y, served[-2])[1]
        v = slopes(x, y, served[-1])[0]
        x = x - 0.1 / v.norm() * v
        assert len(served) == t + 1
        torch.testing.assert_close(flat(q.problem.x), x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(flat(q.problem.y), y, rtol=1e-12, atol=1e-12)


# --- under noise ---

METHODS: dict[str, Callable[..., Method]] = {
    "SGDA": sgda,
    "alternating SGDA": partial(sgda, alternating=True),
    "SGDmax": sgdmax,
    "SREDA": sreda,
    "SREDA, PiSARAH": partial(sreda, initial_solver=PiSARAH(0.5, steps=3, restarts=2)),
    "AccMDA": acc_mda,
}


@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_of_phi_goes_down(name: str) -> None:
    options = {"decay": Decay(offset=50)} if name == "AccMDA" else {}
    for seed in range(2):
        method = METHODS[name](**options)
        advance(method, sample(ROWS, seed), 45)
        assert slope(flat(method.problem.x)) < 0.2 * slope(X0)


@pytest.mark.parametrize(
    ("name", "costs"),
    [
        ("SGDA", [1, 1, 1, 1, 1]),
        ("alternating SGDA", [2, 2, 2, 2, 2]),
        ("SGDmax", [4, 4, 4, 4, 4]),
        ("SREDA", [1, 8, 8, 9, 8]),
        ("SREDA, PiSARAH", [11, 8, 8, 9, 8]),
        ("AccMDA", [1, 2, 2, 2, 2]),
    ],
)
def test_the_cost_is_that_of_the_docstring(name: str, costs: list[int]) -> None:
    method, feed, gradients = METHODS[name](), Feed(), []
    for _ in costs:
        before = method.estimator.counts.state_dict()
        advance(method, feed)
        spent = {k: n - before[k] for k, n in method.estimator.counts.state_dict().items()}
        gradients.append(spent.pop("upper_gradients"))
        assert not any(n for k, n in spent.items() if "samples" not in k and "points" not in k), spent
    assert gradients == costs


@pytest.mark.parametrize("name", METHODS)
def test_resumed_equals_uninterrupted(name: str, tmp_path: Any) -> None:
    method, source = METHODS[name](), sample(ROWS, 0)
    advance(method, source, 3)
    saved = {
        "method": method.state_dict(),
        "upper": method.problem.upper.state_dict(),
        "source": source.state_dict(),
    }
    torch.save(saved, tmp_path / "checkpoint.pt")
    advance(method, source, 5)
    other, again = METHODS[name](), sample(ROWS, 0)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other.problem.upper.load_state_dict(saved["upper"])
    other.load_state_dict(saved["method"])
    again.load_state_dict(saved["source"])
    advance(other, again, 5)
    assert torch.equal(flat(other.problem.x), flat(method.problem.x))
    assert torch.equal(flat(other.problem.y), flat(method.problem.y))
    assert other.estimator.counts == method.estimator.counts


def test_a_copy_goes_its_own_way_within_the_same_set() -> None:
    method = AccMDA(problem("box", {"p0": projections.box(*BOX)}), 0.5, weight=0.5, lower_solver=GD(0.6, 1))
    advance(method, ROWS, 2)
    twin, x = copy.deepcopy(method), flat(method.problem.x).clone()
    advance(twin, ROWS, 5)
    assert torch.equal(flat(method.problem.x), x)
    advance(method, ROWS, 5)
    assert torch.equal(flat(method.problem.x), flat(twin.problem.x))


# --- data, and what is refused ---


def test_a_loop_over_a_loader_is_enough_where_a_step_draws_one_sample() -> None:
    batches = [Feed()(n) for n in (4, 5, 6)]
    for make in sgda, acc_mda:
        method, other = make(), make(batch_size=None)
        for batch in batches:
            advance(method, batch)
        advance(other, stream(batches), 3)
        assert torch.equal(flat(method.problem.x), flat(other.problem.x))


@pytest.mark.parametrize("name", ["alternating SGDA", "SGDmax", "SREDA"])
def test_a_step_that_draws_several_samples_refuses_a_plain_batch(name: str) -> None:
    with pytest.raises(ValueError, match=r"batch= got one batch .* reuse_batch=True"):
        METHODS[name]().backward(ROWS)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: SGDA(torch.nn.Linear(1, 1), 0.1, lower_solver=GD(0.1, 1)),
            TypeError,
            "problem must be .* got Linear",
        ),
        *(
            (lambda make=make: make(quadratic_bilevel().problem, 0.1), ValueError, "Danskin is for minimax problems")
            for make in (
                partial(SGDA, lower_solver=GD(0.1, 1)),
                partial(SGDmax, lower_solver=GD(0.1, 2)),
                partial(SREDA, lower_solver=GD(0.1, 2), period=2),
                partial(AccMDA, lower_solver=GD(0.1, 1), weight=0.5),
            )
        ),
        *(
            (
                lambda make=make, lr=lr: make(problem(), lr),
                ValueError,
                f"lr must be a non-negative, finite number, got {lr!r}",
            )
            for lr in (-0.1, math.nan, "1e-3")
            for make in (
                partial(SGDA, lower_solver=GD(0.1, 1)),
                partial(SREDA, lower_solver=GD(0.1, 2), period=2),
                partial(AccMDA, lower_solver=GD(0.1, 1), weight=0.5),
            )
        ),
        (lambda: SGDA(problem(), 0.1, lower_solver=GD(0.1, 2)), ValueError, "give the lower solver steps=1, got 2"),
        (lambda: SREDA(problem(), 0.1, period=2, lower_solver=GD(0.1, 1)), ValueError, "steps >= 2, got 1"),
        (lambda: sreda(period=0), ValueError, "period must be a positive integer, got 0"),
        (lambda: sreda(selects="next"), ValueError, "selects must be one of 'argmin', 'last', got 'next'"),
        (lambda: sreda(max_rate=0.0), ValueError, "max_rate must be positive and finite, or None .* got 0.0"),
        (lambda: sreda(anchor_size=0), ValueError, r"anchor_size \(anchor\) must be a positive integer or None, got 0"),
        (lambda: sreda(initial_solver=PiSARAH), TypeError, "initial_solver must be a lower solver .* got PiSARAH"),
        (lambda: acc_mda(weight=0.0), ValueError, r"weight must be in \(0, 1\], got 0.0"),
        (lambda: acc_mda(decay=0.5), TypeError, "decay must be Decay, .* got 0.5"),
    ],
)
def test_what_cannot_work_is_refused(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
