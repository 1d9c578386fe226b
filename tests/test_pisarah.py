"""PiSARAH against a loop in plain tensors and against stochastic gradients at equal cost; on one sample it is GD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.problems import Split, flat, generator, quadratic_bilevel
from torchbilevel import (
    CG,
    GD,
    BatchSizes,
    Danskin,
    Decay,
    Implicit,
    MinimaxProblem,
    PiSARAH,
    Spider,
    Unrolled,
    projections,
)

# f = -g, g(x, y) = mean_i 1/2 (a_i'y - c_i)^2 + MU/2 |y - x|^2: gradients and curvature are noisy; x = 0 stays.
N, MU = 100, 0.2
_normal = generator(1)
A = _normal(N, 5).sign() * torch.linspace(0.3, 0.8, 5, dtype=torch.float64)
C = A @ _normal(5) + _normal(N)
X0, Y0 = torch.zeros(5, dtype=torch.float64), torch.full((5,), 0.2, dtype=torch.float64)
SETS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "free": (None, lambda y: y),
    "box": (projections.linf_ball(0.4), lambda y: y.clamp(-0.4, 0.4)),
    "simplex": (projections.simplex(), lambda y: to_simplex(y)),
}


def to_simplex(y: Tensor) -> Tensor:
    ordered = y.sort(descending=True).values
    return (y - ((ordered.cumsum(0) - 1) / torch.arange(1, 6)).max()).clamp(min=0)


def g(x: Tensor, y: Tensor, batch: Any) -> Tensor:
    a, c = batch
    return 0.5 * (a @ y - c).square().mean() + 0.5 * MU * (y - x).square().sum()


def g_y(y: Tensor, batch: Any) -> Tensor:
    a, c = batch
    return a.T @ (a @ y - c) / len(c) + MU * y


def problem(y_set: str = "free") -> MinimaxProblem:
    shapes = [(5,)] if y_set == "simplex" else [(2,), (), (2, 1)]
    return MinimaxProblem(
        Split(X0, [(5,)]),
        Split(Y0, shapes),
        loss=lambda upper, lower, batch: -g(upper.flat(), lower.flat(), batch),
        projection=SETS[y_set][0],
    )


class Feed:
    """A source whose draw number k is the same in every instance with one seed, and the sizes asked of it."""

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.asked = seed, []

    def __call__(self, n: int | None) -> Any:
        self.asked.append(n)
        generator = torch.Generator().manual_seed(10_000 * self.seed + len(self.asked))
        index = torch.randint(N, (n,), generator=generator) if n is not None else slice(None)
        return A[index], C[index]


# --- step for step ---


def reference(draw: Callable[[int], Any], project: Callable[[Tensor], Tensor], lr: float, m: int, J: int) -> Tensor:
    y = Y0
    for _ in range(J):
        v = g_y(y, draw(20))
        for _ in range(m - 1):
            last, y, batch = y, project(y - lr * v), draw(3)
            v = v + g_y(y, batch) - g_y(last, batch)
        y = project(y - lr * v)
    return y


@pytest.mark.parametrize("role", ["initial_solver", "lower_solver"])
@pytest.mark.parametrize("y_set", SETS)
def test_step_for_step(y_set: str, role: str) -> None:
    options: dict[str, Any] = {"lower_solver": None, role: PiSARAH(0.4, steps=4, restarts=3)}
    sizes = BatchSizes(upper=2, lower=3, anchor=20)
    estimator, feed, draw = Danskin(**options, batch_sizes=sizes).bind(problem(y_set)), Feed(), Feed()
    estimator.backward(feed)
    y = reference(draw, SETS[y_set][1], 0.4, 4, 3)
    torch.testing.assert_close(flat(estimator.problem.y), y, rtol=1e-12, atol=1e-12)
    assert (y - Y0).norm() > 0.1
    assert feed.asked == [20, 3, 3, 3] * 3 + [2]  # every sample is a new one, the last that of f_x
    gradients, points = estimator.counts.upper_gradients, estimator.counts.upper_gradient_samples
    assert (gradients, points) == (3 * (1 + 2 * 3) + 1, 3 * (20 + 2 * 3 * 3) + 2)


def test_the_initial_solver_runs_once_and_before_the_lower_solver() -> None:
    start, sizes = PiSARAH(0.4, steps=4, restarts=3), BatchSizes(upper=2, lower=3, anchor=20)
    estimator = Danskin(GD(0.3, 1), initial_solver=start, batch_sizes=sizes).bind(problem())
    feed, draw = Feed(), Feed()
    y = reference(draw, SETS["free"][1], 0.4, 4, 3)
    for _ in range(2):
        estimator.backward(feed)
        y = y - 0.3 * g_y(y, draw(3))
        draw(2)  # of f_x
        torch.testing.assert_close(flat(estimator.problem.y), y, rtol=1e-12, atol=1e-12)


# --- what it is without noise, and under noise ---


@pytest.mark.parametrize("y_set", SETS)
def test_on_one_sample_it_is_gradient_descent(y_set: str) -> None:
    batch, ends = Feed()(None), []
    for solver in (PiSARAH(0.4, steps=4, restarts=3), GD(0.4, steps=12)):
        for options in ({"lower_solver": solver}, {"lower_solver": None, "initial_solver": solver}):
            estimator = Danskin(**options).bind(problem(y_set))
            estimator.backward(batch)
            ends.append(flat(estimator.problem.y))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-12, atol=1e-12)


def test_as_lower_solver_of_a_bilevel_problem() -> None:
    paths = []
    for solver in (PiSARAH(0.3, steps=3, restarts=2), GD(0.3, steps=6)):
        q = quadratic_bilevel(curved=True)
        estimator = Implicit(solver, CG(5)).bind(q.problem)
        for _ in range(2):
            estimator.backward(lower=q.lower_batch, upper=q.upper_batch)
        paths.append(torch.cat([flat(q.problem.y), flat(p.grad for p in q.problem.upper_parameters)]))
    torch.testing.assert_close(paths[0], paths[1], rtol=1e-12, atol=1e-12)


def test_one_step_per_restart_is_gradient_descent_on_large_samples() -> None:
    solver, sizes = PiSARAH(0.4, steps=1, restarts=5), BatchSizes(upper=2, lower=3, anchor=20)
    ends = []
    for lower, size in ((solver, sizes), (GD(0.4, steps=5), BatchSizes(upper=2, lower=20))):
        estimator = Danskin(lower, batch_sizes=size).bind(problem())
        estimator.backward(Feed())
        ends.append(flat(estimator.problem.y))
    assert torch.equal(*ends)


def test_it_is_far_more_accurate_than_sgd_on_equally_many_samples() -> None:
    """With all rows for the large samples the error shrinks with every restart; SGD stops at its noise."""
    m, J, size, lr = 8, 4, 4, 0.4
    points = J * (N + 2 * (m - 1) * size)
    y_star = torch.linalg.solve(A.T @ A / N + MU * torch.eye(5, dtype=A.dtype), A.T @ C / N)
    errors = []
    for solver in (PiSARAH(lr, m, J), GD(lr, points // size)):
        errors.append([])
        for seed in range(10):
            estimator = Danskin(solver, batch_sizes=BatchSizes(upper=1, lower=size)).bind(problem())
            estimator.backward(Feed(seed))
            assert estimator.counts.upper_gradient_samples == points + 1
            errors[-1].append(float((flat(estimator.problem.y) - y_star).norm()))
    assert max(errors[0]) < 0.1 * min(errors[1])


# --- what is refused ---


def test_a_failure_of_the_initial_solver_is_its_own() -> None:
    estimator = Danskin(GD(0.1, 1), initial_solver=PiSARAH(1e200, steps=3, restarts=2)).bind(problem())
    with pytest.raises(FloatingPointError, match=r"not finite after 6 steps of PiSARAH\(.*a smaller lr may help"):
        estimator.backward(Feed()(None))
    assert torch.equal(flat(estimator.problem.y), Y0) and estimator.memory.calls == 0


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: PiSARAH(0.0, 2, 2), ValueError, "lr must be positive and finite, got 0.0"),
        (lambda: PiSARAH("0.1", 2, 2), TypeError, "lr must be a number"),
        (lambda: PiSARAH(lambda upper: upper.lr, 2, 2), TypeError, r"lr must be a number, got .*GD\(lr=...\)"),
        (lambda: PiSARAH(0.1, 0, 2), ValueError, "steps must be a positive integer, got 0"),
        (lambda: PiSARAH(0.1, 2, 0), ValueError, "restarts must be a positive integer, got 0"),
        (lambda: PiSARAH(0.1, 2, True), ValueError, "restarts must be a positive integer, got True"),
        (lambda: PiSARAH(0.1, 2, 1.5), ValueError, "restarts must be a positive integer, got 1.5"),
        (lambda: Unrolled(PiSARAH(0.1, 2, 2)), (TypeError, ValueError), "PiSARAH"),
        (lambda: Danskin(PiSARAH(0.1, 2, 2), recursion=Spider(2)), ValueError, "use GD, SignGD or Adam .*got PiSARAH"),
        (lambda: Danskin(PiSARAH(0.1, 2, 2), decay=Decay()), ValueError, "use GD, SignGD or Adam, got PiSARAH"),
    ],
)
def test_what_cannot_work_is_refused(make: Callable[[], Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        make()
