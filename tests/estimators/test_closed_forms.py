"""Hypergradients on problems whose y*, Phi and grad Phi are known, and the rates at which they are approached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.problems import (
    FACTORIES,
    assign,
    constrained_minimax,
    flat,
    generator,
    quadratic_bilevel,
    quadratic_minimax,
)
from torchbilevel import (
    CG,
    GD,
    BilevelProblem,
    Danskin,
    Direct,
    Estimator,
    Implicit,
    LinearSolver,
    LowerSolver,
    Neumann,
    SignGD,
    TorchOptim,
    Unrolled,
)

# Steps of the order of 1 / L.
BILEVEL = {"quadratic": 1.0, "curved quadratic": 0.5, "ridge": 0.25, "logistic": 1.0, "binary logistic": 1.0}
MINIMAX = ["minimax", "simplex", "box"]
LBFGS = {"lr": 1.0, "max_iter": 20, "history_size": 20, "tolerance_grad": 1e-13, "tolerance_change": 0.0}


def run(case: Any, estimator: Estimator, x: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """f, the hypergradient and y after one backward at x."""
    problem = case.problem
    if x is not None:
        assign(problem.upper, x)
    if hasattr(case, "batch"):
        value = estimator.bind(problem).backward(case.batch)
    else:
        value = estimator.bind(problem).backward(lower=case.lower_batch, upper=case.upper_batch)
    gradient = flat(p.grad for p in problem.upper_parameters)
    for p in problem.upper_parameters:
        p.grad = None
    return value, gradient, flat(problem.y).clone()


def assert_exact(case: Any, x: Tensor, result: tuple[Tensor, Tensor, Tensor]) -> None:
    for got, want in zip(result, (case.phi(x), case.grad_phi(x), case.y_star(x)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def points(case: Any) -> list[Tensor]:
    return [case.x0, case.x0 + 0.1 * generator(9)(len(case.x0))]


@pytest.mark.parametrize("name", BILEVEL)
@pytest.mark.parametrize("solver", [CG(max_iter=40, tol=1e-14), CG(max_iter=40, tol=None), Direct()], ids=str)
def test_implicit_at_the_lower_optimum(name: str, solver: LinearSolver) -> None:
    case = FACTORIES[name]()
    for x in points(case):
        assign(case.problem.lower, case.y_star(x))
        assert_exact(case, x, run(case, Implicit(None, solver), x))


@pytest.mark.parametrize("name", ["quadratic", "curved quadratic", "ridge"])
def test_implicit_by_neumann_series(name: str) -> None:
    case = FACTORIES[name]()
    assign(case.problem.lower, case.y_star(case.x0))
    assert_exact(case, case.x0, run(case, Implicit(None, Neumann(300, BILEVEL[name]))))


@pytest.mark.parametrize("name", BILEVEL)
@pytest.mark.parametrize("kind", ["GD", "LBFGS"])
def test_implicit_with_its_own_lower_solver(name: str, kind: str) -> None:
    case = FACTORIES[name]()
    lower: LowerSolver = GD(BILEVEL[name], 800, momentum=0.5, tol=1e-12)
    if kind == "LBFGS":
        lower = TorchOptim(torch.optim.LBFGS, 20, tol=1e-12, **LBFGS)
    estimator = Implicit(lower, CG(max_iter=40, tol=1e-14))
    for x in points(case):  # the second one starts warm
        assert_exact(case, x, run(case, estimator, x))
    assert estimator.last is not None and estimator.last.solve is not None
    assert estimator.last.solve.status == "converged" and estimator.last.lower.residual <= 1e-12


@pytest.mark.parametrize(
    ("name", "recompute"), [("quadratic", False), ("quadratic", True), ("ridge", False), ("logistic", False)]
)
def test_unrolling_tends_to_the_implicit_gradient(name: str, recompute: bool) -> None:
    case = FACTORIES[name]()
    x, errors = case.x0, []
    for steps in (10, 30, 90, 270):
        assign(case.problem.lower, case.y0)
        result = run(case, Unrolled(GD(BILEVEL[name], steps), recompute=recompute))
        errors.append((result[1] - case.grad_phi(x)).norm())
    # the error falls at least as (1 - lr mu)^K up to a factor K
    assert errors[1] < 0.3 * errors[0] and errors[2] < 0.05 * errors[1] and errors[3] < 1e-3 * errors[2]
    assert_exact(case, x, result)


@pytest.mark.parametrize("truncate", [None, 1, 4])
@pytest.mark.parametrize("recompute", [False, True])
def test_unrolled_descent_on_a_quadratic(truncate: int | None, recompute: bool) -> None:
    """From a constant y_0, dy_K/dx = (I - (I - lr H)^T) H^-1 B, T the number of steps that are differentiated."""
    case, lr, steps = quadratic_bilevel(), 0.4, 6
    estimator = Unrolled(GD(lr, steps), truncate=truncate, recompute=recompute)
    value, gradient, y = run(case, estimator)
    x, r = case.x0, case.response
    eye = torch.eye(6, dtype=torch.float64)
    shrink = torch.linalg.matrix_power(eye - lr * r.H, steps)
    want = case.y_star(x) + shrink @ (case.y0 - case.y_star(x))
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    moved = eye - torch.linalg.matrix_power(eye - lr * r.H, steps if truncate is None else truncate)
    f_y = y - case.upper_batch[0].mean(0) + case.C.T @ x
    want = case.R @ x + case.C @ y + (moved @ torch.linalg.solve(r.H, r.B)).T @ f_y
    torch.testing.assert_close(gradient, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MINIMAX)
def test_danskin(name: str) -> None:
    case = FACTORIES[name]()
    estimator = Danskin(GD(0.3, 2000, tol=1e-12))
    for x in points(case):
        assert_exact(case, x, run(case, estimator, x))
    assert estimator.last is not None and estimator.last.lower.steps < 2000


def test_danskin_with_attack_steps() -> None:
    """Sign steps end within their length of the maximum, here every coordinate for itself."""
    case = constrained_minimax(simplex=False)
    value, gradient, y = run(case, Danskin(SignGD(1e-3, 1200)))
    assert (y - case.y_star(case.x0)).abs().max() <= 1e-3
    torch.testing.assert_close(gradient, case.grad_phi(case.x0), rtol=0, atol=5e-3)


def test_unrolling_serves_minimax_problems_too() -> None:
    case = quadratic_minimax()
    assert_exact(case, case.x0, run(case, Unrolled(GD(0.3, 800))))
    box = constrained_minimax(simplex=False)
    assert_exact(box, box.x0, run(box, Unrolled(GD(0.5, 200), recompute=True)))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_maml_on_quadratic_tasks(steps: int, recompute: bool) -> None:
    """y_0 = x: the gradient of f(y_K(x)) is (I - lr H)^K f_y, K = 1 being the formula of the MAML paper."""
    case, lr = quadratic_bilevel(), 0.3
    r, t = case.response, case.upper_batch[0].mean(0)
    b, H, normal = case.lower_batch[0].mean(0), r.H, generator(3)
    upper, lower = torch.nn.Linear(6, 1, bias=False).double(), torch.nn.Linear(6, 1, bias=False).double()
    start = normal(6)
    assign(upper, start)
    problem = BilevelProblem(
        upper,
        lower,
        lower_loss=lambda upper, lower, batch: 0.5 * lower.weight[0] @ H @ lower.weight[0] - b @ lower.weight[0],
        upper_loss=lambda upper, lower, batch: 0.5 * (lower.weight[0] - t).square().sum(),
        lower_init=lambda upper: upper.weight,
    )
    estimator = Unrolled(GD(lr, steps), recompute=recompute, warm_start=False).bind(problem)
    shrink = torch.linalg.matrix_power(torch.eye(6, dtype=torch.float64) - lr * H, steps)
    exact = torch.linalg.solve(H, b)
    y = exact + shrink @ (start - exact)
    for _ in range(2):  # every call starts at x again
        upper.weight.grad = None
        value = estimator.backward()
        torch.testing.assert_close(value, 0.5 * (y - t).square().sum(), rtol=1e-12, atol=0)
        torch.testing.assert_close(upper.weight.grad[0], shrink @ (y - t), rtol=1e-12, atol=1e-12)
