"""``SharedInverse``: its inverse against the dense formula, its solve against CG, its calls against a loop by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.problems import QuadraticBilevel, flat, generator, quadratic_bilevel, quadratic_minimax, spd
from torchbilevel import (
    CG,
    GD,
    Adam,
    BilevelProblem,
    LinearSolveWarning,
    Method,
    SharedInverse,
    TaskBatch,
)
from torchbilevel.estimators.shared_inverse import Pairs, improve, inverse


def dense(pairs: Pairs, d: int) -> Tensor:
    """The BFGS inverse by its update with matrices."""
    eye = torch.eye(d, dtype=torch.float64)
    if not pairs[0]:
        return eye
    s, a = pairs[0][-1], pairs[1][-1]
    B = (s @ a) / (a @ a) * eye
    for s, a in zip(*pairs, strict=True):
        V = eye - torch.outer(a, s) / (s @ a)
        B = V.T @ B @ V + torch.outer(s, s) / (s @ a)
    return B


def test_the_two_loops_are_the_dense_update() -> None:
    normal = generator(0)
    A = spd(normal, 7, 0.2, 3.0)
    S = normal(4, 7)
    r = normal(7)
    for k in range(5):
        pairs = (tuple(S[:k]), tuple(S[:k] @ A))
        torch.testing.assert_close(inverse(pairs, r), dense(pairs, 7) @ r)


@pytest.mark.parametrize("warm", [False, True])
def test_on_a_fixed_matrix_the_directions_are_those_of_conjugate_gradients(warm: bool) -> None:
    normal = generator(1)
    A, b, z0 = spd(normal, 8, 0.1, 2.0), normal(8), normal(8) if warm else None
    for k in range(1, 5):
        want = CG(k, tol=None).solve(lambda s: (A @ s[0],), (b,), None if z0 is None else (z0,))
        got, pairs = improve(lambda s: A @ s, b, z0, ((), ()), k)
        torch.testing.assert_close(got.residual, want.residual)
        assert got.iterations == want.iterations and len(pairs[0]) == len(pairs[1]) == k
        # The last step is free: without it z is that of CG.
        before = got.z[0] - inverse(pairs, b - A @ want.z[0])
        torch.testing.assert_close(before, want.z[0])
    solved = improve(lambda s: A @ s, b, z0, ((), ()), 12)[0]  # eight directions span the space, and then it ends
    torch.testing.assert_close(solved.z[0], torch.linalg.solve(A, b))


def by_hand(p: QuadraticBilevel, parts: list[int], lr: float, kept: int) -> list[Tensor]:
    """X after every call, from matrices and derivatives written out."""
    upper, lower = p.modules()
    pairs: Pairs = ((), ())
    x, y, z, path = p.x0.clone(), p.y0.clone(), torch.zeros_like(p.y0), []
    R, C, r = upper.R, upper.C, p.response

    def g_y(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return r.H @ y + r.w * (r.E @ x).exp() * y - r.B @ x - rows.mean(0)

    for t, n in enumerate(parts):
        train, valid = p.lower_batch[0][:n], p.upper_batch[0][:n]
        if t == 0:
            for _ in range(3):
                y = y - 0.3 * g_y(x, y, train)
        else:
            y = y - dense(pairs, len(y)) @ g_y(x, y, train)
        A = r.H + torch.diag(r.w * (r.E @ x).exp())
        residual = y - valid.mean(0) + C.T @ x - A @ z
        for _ in range(2):
            s = dense(pairs, len(y)) @ residual
            a = (s @ residual) / (s @ A @ s)
            z, residual = z + a * s, residual - a * (A @ s)
            pairs = ((*pairs[0], s), (*pairs[1], A @ s))
        z = z + dense(pairs, len(y)) @ residual
        pairs = (pairs[0][-kept:], pairs[1][-kept:])
        g_yx = torch.diag(r.w * (r.E @ x).exp() * y) @ r.E - r.B
        x = x - lr * (R @ x + C @ y - g_yx.T @ z)
        path.append(x)
    return path


@pytest.mark.parametrize("parts", [[8] * 6, [1, 2, 4, 8, 8, 8]])
def test_six_calls_are_those_of_the_loop_by_hand(parts: list[int]) -> None:
    p = quadratic_bilevel(curved=True)
    estimator = SharedInverse(GD(0.3, 3), products=2, memory=5)
    method = Method(p.problem, estimator, torch.optim.SGD(p.problem.upper_parameters, 0.05))
    for n, want in zip(parts, by_hand(p, parts, 0.05, 5), strict=True):
        method.zero_grad()
        method.backward(lower=(p.lower_batch[0][:n],), upper=(p.upper_batch[0][:n],))
        method.step()
        torch.testing.assert_close(flat(p.problem.x), want, rtol=1e-10, atol=1e-10)
    assert len(estimator.memory.tracked["directions"]) == 5


def test_at_rest_it_finds_the_hypergradient_at_its_cost() -> None:
    p = quadratic_bilevel(curved=True)
    estimator = SharedInverse(GD(0.3, 3)).bind(p.problem)
    rows, calls, d = 8, 25, 6
    for _ in range(calls):
        for q in p.problem.upper_parameters:
            q.grad = None
        estimator.backward(lower=p.lower_batch, upper=p.upper_batch)
    got = flat(q.grad for q in p.problem.upper_parameters if q.grad is not None)
    torch.testing.assert_close(got, p.grad_phi(p.x0), rtol=1e-9, atol=1e-9)
    counts = estimator.counts
    assert counts.lower_gradients == 3 + calls - 1
    assert counts.upper_gradients == counts.jacobian_products == calls
    # Without a residual in the first call, and without directions once the residual is round-off.
    assert calls - 1 + d <= counts.hessian_products <= 2 * calls - 1
    assert counts.hessian_product_samples == rows * counts.hessian_products


def test_what_it_refuses() -> None:
    for name in ("products", "memory"):
        for wrong in (0, True, 1.5):
            with pytest.raises(ValueError, match=f"{name} must be a positive integer"):
                SharedInverse(GD(0.1, 1), **{name: wrong})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lower_solver must be GD"):
        SharedInverse(Adam(0.1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="use Danskin"):
        SharedInverse(GD(0.1, 1)).bind(quadratic_minimax().problem)
    net = nn.Linear(2, 1).double()
    tasks = BilevelProblem(
        net, TaskBatch(net, 3), upper_loss=lambda u, v, b: v.weight.sum(), lower_loss=lambda u, v, b: v.weight.sum()
    )
    with pytest.raises(ValueError, match="use Implicit"):
        SharedInverse(GD(0.1, 1)).bind(tasks)


def test_negative_curvature_is_reported_and_not_learned() -> None:
    p = quadratic_bilevel()
    p.response.H.neg_()
    estimator = SharedInverse(GD(0.1, 1)).bind(p.problem)
    with pytest.warns(LinearSolveWarning, match="non-positive curvature"):
        estimator.backward(lower=p.lower_batch, upper=p.upper_batch)
    assert estimator.memory.tracked["directions"] == () and estimator.memory.z is None
