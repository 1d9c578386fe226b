"""AID-BiO and ITD-BiO against loops of ten lines, and what their constructors refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import octopus
from tests.problems import flat, quadratic_minimax
from torchbilevel import CG, GD, AIDBiO, ITDBiO, Method, Neumann, TorchOptim
from torchbilevel.problem import BilevelProblem

L, THETA = 1.5, 0.5


def problem() -> BilevelProblem:
    """The octopus with a lower level that mixes coordinates, near its first saddle."""
    start = torch.tensor([0.3, -0.2, 0.4], dtype=torch.float64)
    coupling = torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.5, 0.1], [0.3, 0.0, 0.8]])
    return octopus.bilevel(d=3, L=L, theta=THETA, kappa=5.0, rotated=True, start=start, coupling=coupling)


def run(method: Method, steps: int) -> tuple[Tensor, Tensor]:
    """The iterates x_1, x_2, ... and y_1, y_2, ..."""
    xs, ys = [], []
    for _ in range(steps):
        method.zero_grad()
        method.backward()
        method.step()
        xs.append(flat(method.problem.x))
        ys.append(flat(method.problem.y))
    return torch.stack(xs), torch.stack(ys)


def upper_gradients(A: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """f_x and f_y of f = O((1 - theta) x + theta A^{-1} y)."""
    point = ((1 - THETA) * x + THETA * torch.linalg.solve(A, y)).requires_grad_()
    (slope,) = torch.autograd.grad(octopus.octopus(point, L), point)
    return (1 - THETA) * slope, THETA * torch.linalg.solve(A.T, slope)


def conjugate_gradients(H: Tensor, b: Tensor, z: Tensor, steps: int) -> Tensor:
    r = b - H @ z
    p = r
    for _ in range(steps):
        alpha = (r @ r) / (p @ H @ p)
        z, new = z + alpha * p, r - alpha * H @ p
        r, p = new, new + (new @ new) / (r @ r) * p
    return z


@pytest.mark.parametrize("warm", [True, False])
def test_aid_bio_step_for_step(warm: bool) -> None:
    made = problem()
    solvers: dict[str, Any] = {"lower_solver": GD(lr=0.7, steps=4), "linear_solver": CG(max_iter=2, tol=None)}
    xs, ys = run(AIDBiO(made, 0.1, warm_start=warm, **solvers), 40)
    H, A = made.lower.H, made.lower.coupling
    x, y, z = flat(problem().x), torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for t in range(40):
        if not warm:
            y, z = torch.zeros_like(y), torch.zeros_like(z)
        for _ in range(4):
            y = y - 0.7 * H @ (y - A @ x)
        f_x, f_y = upper_gradients(A, x, y)
        z = conjugate_gradients(H, f_y, z, 2)
        x = x - 0.1 * (f_x + A.T @ H @ z)  # g_xy = -A'H
        torch.testing.assert_close(xs[t], x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ys[t], y, rtol=1e-9, atol=1e-9)
    assert (x - flat(problem().x)).norm() > 1


def test_the_adjoint_can_start_at_zero_every_time() -> None:
    made = problem()
    lower, linear = GD(lr=0.7, steps=4), CG(max_iter=1, tol=None)
    method = AIDBiO(made, 0.1, lower_solver=lower, linear_solver=linear, warm_start_adjoint=False)
    xs, _ = run(method, 10)
    H, A = made.lower.H, made.lower.coupling
    x, y = flat(problem().x), torch.zeros(3, dtype=torch.float64)
    for t in range(10):
        for _ in range(4):
            y = y - 0.7 * H @ (y - A @ x)
        f_x, f_y = upper_gradients(A, x, y)
        x = x - 0.1 * (f_x + A.T @ H @ conjugate_gradients(H, f_y, torch.zeros_like(y), 1))
        torch.testing.assert_close(xs[t], x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("truncate", [None, 2])
def test_itd_bio_step_for_step(truncate: int | None, recompute: bool) -> None:
    made = problem()
    method = ITDBiO(made, 0.1, lower_solver=GD(lr=0.7, steps=5), truncate=truncate, recompute=recompute)
    xs, ys = run(method, 30)
    H, A = made.lower.H, made.lower.coupling
    x, y = flat(problem().x), torch.zeros(3, dtype=torch.float64)
    for t in range(30):
        for _ in range(5):
            y = y - 0.7 * H @ (y - A @ x)
        v, p = upper_gradients(A, x, y)
        for _ in range(truncate or 5):
            v, p = v + 0.7 * A.T @ H @ p, p - 0.7 * H @ p
        x = x - 0.1 * v
        torch.testing.assert_close(xs[t], x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ys[t], y, rtol=1e-9, atol=1e-9)
    assert (x - flat(problem().x)).norm() > 1


def gradient_at(method: Method) -> Tensor:
    method.backward()
    return flat(p.grad for p in method.problem.upper_parameters if p.grad is not None)


@pytest.mark.parametrize("linear_solver", [CG(max_iter=3, tol=1e-14), Neumann(steps=300, lr=1.0), None])
def test_exact_solves_give_the_gradient_of_the_octopus(linear_solver: Any) -> None:
    x = flat(problem().x).requires_grad_()
    (expected,) = torch.autograd.grad(octopus.octopus(x, L), x)
    tolerance = 1e-5 if linear_solver is None else 1e-12  # the default CG stops at 1e-6
    aid = AIDBiO(problem(), 0.1, lower_solver=GD(lr=1.0, steps=300), linear_solver=linear_solver)
    torch.testing.assert_close(gradient_at(aid), expected, rtol=tolerance, atol=tolerance)
    itd = ITDBiO(problem(), 0.1, lower_solver=GD(lr=1.0, steps=300))
    torch.testing.assert_close(gradient_at(itd), expected, rtol=1e-12, atol=1e-12)


def test_unrolling_from_a_function_of_x_is_maml() -> None:
    """g = 1/2 |y - b|^2 from y_0 = x: y_K = b + (1 - lr)^K (x - b), and f = 1/2 |y_K - c|^2."""
    start, b, c = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, -2.0], [0.5, 0.5], [2.0, 1.0]))
    upper, lower = (torch.nn.ParameterList([torch.zeros(2, dtype=torch.float64)]) for _ in range(2))
    with torch.no_grad():
        upper[0].copy_(start)
    maml = BilevelProblem(
        upper,
        lower,
        upper_loss=lambda upper, lower, batch: 0.5 * (lower[0] - batch).square().sum(),
        lower_loss=lambda upper, lower, batch: 0.5 * (lower[0] - batch).square().sum(),
        lower_init=lambda upper: upper[0],
    )
    method = ITDBiO(maml, 0.5, lower_solver=GD(lr=0.4, steps=3), warm_start=False)
    x = start
    for _ in range(5):
        method.zero_grad()
        method.backward(lower=b, upper=c)
        method.step()
        x = x - 0.5 * 0.6**3 * (b + 0.6**3 * (x - b) - c)
        torch.testing.assert_close(upper[0].detach(), x, rtol=1e-13, atol=1e-13)


SOLVER = GD(lr=0.1, steps=5)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: AIDBiO(problem().upper, 0.1, lower_solver=SOLVER), TypeError, "problem must be a BilevelProblem .*Upper"),
    (lambda: ITDBiO(problem().upper, 0.1, lower_solver=SOLVER), TypeError, "problem must be a BilevelProblem .*Upper"),
    (
        lambda: AIDBiO(quadratic_minimax().problem, 0.1, lower_solver=SOLVER),
        ValueError,
        "Implicit is for bilevel .*Danskin",
    ),
    *(
        (lambda cls=cls, lr=lr: cls(problem(), lr, lower_solver=SOLVER), ValueError, f"lr must be .*, got {lr!r}")
        for cls in (AIDBiO, ITDBiO)
        for lr in (-0.1, math.nan, math.inf, "1e-3")
    ),
    *(
        (
            lambda cls=cls: cls(problem(), 0.1, lower_solver=torch.optim.SGD),  # type: ignore[misc]
            TypeError,
            r"TorchOptim\(torch.optim.SGD|use GD",
        )
        for cls in (AIDBiO, ITDBiO)
    ),
    (lambda: AIDBiO(problem(), 0.1, lower_solver=SOLVER, linear_solver=SOLVER), TypeError, r"linear_solver .*CG\(.*GD"),
    (
        lambda: AIDBiO(problem(), 0.1, lower_solver=GD(lr=lambda upper: upper.x[0], steps=2)),
        ValueError,
        "lr of the lower solver .* use Unrolled",
    ),
    (lambda: ITDBiO(problem(), 0.1, lower_solver=None), TypeError, "NoneType cannot be unrolled; use GD"),  # type: ignore[arg-type]
    (
        lambda: ITDBiO(problem(), 0.1, lower_solver=TorchOptim(torch.optim.SGD, steps=2, lr=0.1)),
        TypeError,
        "TorchOptim.* cannot be unrolled; use GD",
    ),
    (lambda: ITDBiO(problem(), 0.1, lower_solver=GD(0.1, 5, tol=1e-3)), ValueError, "leave tol=None, got tol=0.001"),
    *(
        (
            lambda k=k: ITDBiO(problem(), 0.1, lower_solver=SOLVER, truncate=k),
            ValueError,
            f"truncate must be between 1 and .*5.*, got {k}",
        )
        for k in (0, 6)
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_arguments_are_named_with_what_would_work(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()
