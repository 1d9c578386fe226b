"""Perturbed AID and perturbed GDmax: reductions, reference loops, the octopus, the escape test, constraints on x."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import octopus
from tests.problems import assign, flat, quadratic_bilevel, quadratic_minimax, unflat
from torchbilevel import (
    CG,
    GD,
    AIDBiO,
    BilevelProblem,
    Danskin,
    Implicit,
    Method,
    Neumann,
    PerturbedAID,
    PerturbedGDmax,
    optim,
    projections,
)
from torchbilevel.problem import MinimaxProblem, Problem
from torchbilevel.tensors import ball, mix_seed


def step(method: Method, **data: Any) -> Tensor:
    method.zero_grad()
    loss = method.backward(**data)
    method.step()
    return loss


def gradient(problem: Problem) -> Tensor:
    return flat(p.grad for p in problem.upper_parameters if p.grad is not None)


# --- reductions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"radius": 0.0, "grad_tol": 1e6}, {"radius": 1.0, "grad_tol": 0.0}])
def test_without_displacements_it_is_sgd_on_the_hypergradient_bitwise(settings: dict[str, float]) -> None:
    solver, linear = GD(lr=0.4, steps=3), CG(max_iter=2)
    bilevel, minimax = quadratic_bilevel(curved=True), quadratic_minimax()
    aid = PerturbedAID(bilevel.problem, 0.01, lower_solver=solver, linear_solver=linear, **settings)
    gdmax = PerturbedGDmax(minimax.problem, 0.01, lower_solver=solver, **settings)
    for method, data, twin, estimator in (
        (
            aid,
            {"lower": bilevel.lower_batch, "upper": bilevel.upper_batch},
            quadratic_bilevel(curved=True).problem,
            Implicit(solver, linear),
        ),
        (gdmax, {"batch": minimax.batch}, quadratic_minimax().problem, Danskin(solver)),
    ):
        problem = method.problem
        estimator.bind(twin)
        optimizer = torch.optim.SGD(twin.upper_parameters, lr=0.01)
        for _ in range(20):
            optimizer.zero_grad()
            loss = estimator.backward(**data)
            optimizer.step()
            assert torch.equal(step(method, **data), loss)
            assert torch.equal(flat(problem.x), flat(twin.x)) and torch.equal(flat(problem.y), flat(twin.y))
        assert method.events == [] and method.result().claim == "running" and method.steps == 20


# --- ten lines each --------------------------------------------------------------------------------------------------


def displacement(like: Tensor, parameters: Any, radius: float, seed: int, t: int) -> Tensor:
    return flat(ball(unflat(like, parameters), radius, mix_seed(seed, t, 0)))


@pytest.mark.parametrize("seed", [0, 3])
def test_perturbed_aid_step_for_step(seed: int) -> None:
    L, theta, lr, eps, r, wait = 1.5, 0.5, 1 / 6, 0.05, 0.1, 6
    coupling = torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.5, 0.1], [0.3, 0.0, 0.8]])
    shape = {"theta": theta, "kappa": 5.0, "rotated": True, "coupling": coupling}
    start = octopus.saddle(1, 3) + 1e-3
    problem = octopus.bilevel(d=3, L=L, start=start, **shape)  # type: ignore[arg-type]
    assign(problem.lower, coupling.double() @ start)
    solvers: dict[str, Any] = {"lower_solver": GD(lr=0.8, steps=9), "linear_solver": CG(max_iter=2, tol=None)}
    method = PerturbedAID(problem, lr, radius=r, grad_tol=eps, escape_steps=wait, seed=seed, **solvers)

    H, A = problem.lower.H, problem.lower.coupling
    x = start
    y, z, last = A @ x, torch.zeros_like(x), -math.inf
    displaced = []
    for t in range(60):
        for _ in range(9):
            y = y - 0.8 * H @ (y - A @ x)
        point = ((1 - theta) * x + theta * torch.linalg.solve(A, y)).requires_grad_()
        (slope,) = torch.autograd.grad(octopus.octopus(point, L), point)
        b = theta * torch.linalg.solve(A.T, slope)
        residual = b - H @ z
        p = residual
        for _ in range(2):
            alpha = (residual @ residual) / (p @ H @ p)
            z, new = z + alpha * p, residual - alpha * H @ p
            residual, p = new, new + (new @ new) / (residual @ residual) * p
        v = (1 - theta) * slope + A.T @ H @ z
        if v.norm() <= 0.8 * eps and t - last > wait:
            x, last = x + displacement(x, problem.upper_parameters, r, seed, t), t
            displaced.append((t, v.norm().item()))
        else:
            x = x - lr * v
        step(method)
        torch.testing.assert_close(flat(problem.x), x, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(flat(problem.y), y, rtol=1e-7, atol=1e-7)
    assert len(displaced) >= 2 and (x - start).norm() > 1
    assert [(e.step, e.kind) for e in method.events] == [(t, "perturbation") for t, _ in displaced]
    assert [e.value for e in method.events] == pytest.approx([size for _, size in displaced], rel=1e-6)


@pytest.mark.parametrize("seed", [0, 3])
def test_perturbed_gdmax_step_for_step(seed: int) -> None:
    q, eps, r, wait = quadratic_minimax(), 0.05, 0.05, 10
    problem = q.problem
    assign(problem.upper, torch.zeros(4, dtype=torch.float64))
    method = PerturbedGDmax(
        problem, 0.2, radius=r, grad_tol=eps, lower_solver=GD(lr=0.9, steps=4), escape_steps=wait, seed=seed
    )

    x, y, last = torch.zeros_like(q.x0), q.y0, -math.inf
    displaced = []
    for t in range(60):
        for _ in range(4):
            y = y + 0.9 * (q.C.T @ x + q.batch[0].mean(0) - q.Q @ y)
        v = q.P @ x + q.q * q.V @ (q.V.T @ x).pow(3) + q.C @ y
        if v.norm() <= 0.8 * eps and t - last > wait:
            x, last = x + displacement(x, problem.upper_parameters, r, seed, t), t
            displaced.append(t)
        else:
            x = x - 0.2 * v
        step(method, batch=q.batch)
        torch.testing.assert_close(flat(problem.x), x, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(flat(problem.y), y, rtol=1e-8, atol=1e-8)
    assert len(displaced) >= 2 and [e.step for e in method.events] == displaced
    assert q.phi(x).item() == pytest.approx(q.phi(q.minimum).item(), abs=1e-2)


# --- the octopus -----------------------------------------------------------------------------------------------------


def walk(method: Method, until: int, at_most: int) -> list[int]:
    """Times at which the saddles are left, up to a number of them or of steps."""
    history = [flat(method.problem.x)]
    while len(octopus.left_behind(history[-1:])) < until and len(history) <= at_most:
        step(method)
        history.append(flat(method.problem.x))
    return octopus.left_behind(history)


SERIES: dict[str, Any] = {"lower_solver": GD(lr=1.0, steps=20), "linear_solver": Neumann(steps=20, lr=1.0)}
DU: dict[str, Any] = {"radius": math.e / 100, "grad_tol": math.e / 100, "escape_steps": 10}


@pytest.mark.parametrize(("L", "saddles"), [(1.0, 4), (2.0, 3)])
def test_aid_bio_leaves_the_saddles_in_geometric_time(L: float, saddles: int) -> None:
    times = walk(AIDBiO(octopus.bilevel(d=5, L=L), 1 / (4 * L), **SERIES), saddles, 400)
    assert len(times) == saddles
    assert times[-1] / times[-2] == pytest.approx(octopus.time_ratio(L), rel=0.05)


@pytest.mark.parametrize("L", [1.0, 2.0])
def test_perturbed_aid_leaves_them_in_arithmetic_time(L: float) -> None:
    times = walk(PerturbedAID(octopus.bilevel(d=5, L=L), 1 / (4 * L), **DU, **SERIES), 5, 250)
    gaps = [b - a for a, b in zip(times[1:], times[2:], strict=False)]  # the first gap is made by the starting point
    assert len(times) == 5 and max(gaps) - min(gaps) <= 5, times


def test_perturbed_gdmax_leaves_them_in_arithmetic_time() -> None:
    """Without displacements the four gaps between five saddles would add up to 23 times the first at L = 1."""
    for seed in range(3):
        problem = octopus.minimax(d=5, L=1.0, seed=seed)
        method = PerturbedGDmax(problem, 0.25, lower_solver=GD(lr=1.0, steps=10), seed=seed, **DU)
        times = walk(method, 5, 250)
        assert len(times) == 5 and times[4] - times[0] <= 8 * (times[1] - times[0]), times


# --- the escape test -------------------------------------------------------------------------------------------------


def escape(stop: bool) -> tuple[PerturbedGDmax, Any]:
    """From the saddle 0 of the quadratic minimax problem, |y - y*| <= tol / mu throughout."""
    q = quadratic_minimax()
    problem = q.problem
    assign(problem.upper, torch.zeros(4, dtype=torch.float64))
    method = PerturbedGDmax(
        problem,
        0.3,
        radius=0.05,
        grad_tol=1e-2,
        lower_solver=GD(lr=1.0, steps=100, tol=1e-4),
        escape_steps=24,
        value_test=True,
        value_tol=1e-2,
        stop=stop,
    )
    return method, q


def test_the_escape_test_tells_the_saddle_from_the_minimum() -> None:
    method, q = escape(stop=False)
    history, claims, losses = [flat(method.problem.x)], [], []
    for _ in range(70):
        losses.append(step(method, batch=q.batch).item())
        history.append(flat(method.problem.x))
        result = method.result()
        claims.append(result.claim)
        assert torch.equal(flat(result.x), history[result.step])
        if result.claim == "running":
            assert result.step == method.steps and torch.equal(flat(result.y), flat(method.problem.y))
        else:  # |g_y(x~, y)| <= tol at the point before the displacement
            assert (q.Q @ (flat(result.y) - q.y_star(flat(result.x)))).norm() <= 1e-4

    kinds = [event.kind for event in method.events]
    assert kinds[:4] == ["perturbation", "escaped", "perturbation", "escape test passed"]
    first, escaped, second, passed = (event.step for event in method.events[:4])
    assert (first, escaped, passed) == (0, 24, second + 24)
    assert claims[:24] == ["stationary"] * 24 and claims[24:second] == ["running"] * (second - 24)
    assert claims[second:passed] == ["stationary"] * 24
    assert claims[passed:] == ["escape test passed"] * (70 - passed)
    for event in method.events:
        before = {"perturbation": None, "escaped": first, "escape test passed": second}[event.kind]
        if before is None:
            assert event.value == pytest.approx(q.grad_phi(history[event.step]).norm().item(), abs=2e-3)
        elif event.step <= passed:
            assert event.value == losses[event.step] - losses[before]
    answer = method.result()
    assert answer.step == second and q.grad_phi(flat(answer.x)).norm() <= 1e-2
    assert q.phi(flat(answer.x)).item() == pytest.approx(q.phi(q.minimum).item(), abs=1e-4)


def test_a_result_is_a_copy() -> None:
    method, q = escape(stop=False)
    for claim in ("running", "stationary"):
        for t in (*method.result().x, *method.result().y):
            t.fill_(7.0)
        result, problem = method.result(), method.problem
        assert result.claim == claim
        assert not any((t == 7.0).any() for t in (*result.x, *result.y, *problem.x, *problem.y))
        step(method, batch=q.batch)


def test_stop_ends_the_run_at_the_point_of_the_claim() -> None:
    method, q = escape(stop=True)
    twin, _ = escape(stop=False)
    while not method.done:
        assert method.steps < 110
        step(method, batch=q.batch)
        step(twin, batch=q.batch)
    result, problem = method.result(), method.problem
    assert result.claim == "escape test passed" and result.step == method.events[-2].step
    assert torch.equal(flat(problem.x), flat(result.x)) and torch.equal(flat(problem.y), flat(result.y))
    assert torch.equal(flat(result.x), flat(twin.result().x)) and torch.equal(flat(result.y), flat(twin.result().y))
    assert not torch.equal(flat(twin.problem.x), flat(result.x))
    assert (q.Q @ (flat(problem.y) - q.y_star(flat(problem.x)))).norm() <= 1e-4
    for action in (lambda: method.backward(q.batch), method.step):
        with pytest.raises(RuntimeError, match=r"the run has ended .*method.result\(\)"):
            action()
    resumed, _ = escape(stop=True)
    resumed.problem.upper.load_state_dict(problem.upper.state_dict())
    resumed.load_state_dict(method.state_dict())
    assert resumed.done and torch.equal(flat(resumed.result().y), flat(result.y))


def test_stop_does_not_project_the_answer_again() -> None:
    """A projection that rounds would move it."""
    q = quadratic_minimax()
    problem = MinimaxProblem(*q.modules(), loss=q.loss, upper_projection=lambda t: t * (1 - 1e-9))
    method = PerturbedGDmax(
        problem,
        0.1,
        radius=0.01,
        grad_tol=1e3,
        lower_solver=GD(lr=1.0, steps=5, tol=1e-3),
        escape_steps=2,
        value_test=True,
        value_tol=1e3,
        stop=True,
    )
    for _ in range(3):
        step(method, batch=q.batch)
    assert method.done and torch.equal(flat(problem.x), flat(method.result().x))
    assert torch.equal(flat(problem.x), q.x0)


def test_the_escape_test_on_a_bilevel_problem() -> None:
    tol = 1e-7
    problem = octopus.bilevel(d=2, L=1.0, start=octopus.minimum(2) + 0.01)
    method = PerturbedAID(
        problem,
        0.25,
        radius=0.02,
        grad_tol=1e-2,
        lower_solver=GD(lr=1.0, steps=500, tol=tol),
        escape_steps=8,
        value_test=True,
        value_tol=1e-3,
        stop=True,
    )
    while not method.done:
        assert method.steps < 40
        step(method)
    assert method.result().claim == "escape test passed"
    x, y = flat(problem.x), flat(problem.y)
    assert (x - octopus.minimum(2)).norm() < 1e-2 and (problem.lower.H * (y - x)).norm() <= tol


def test_a_step_that_compares_values_needs_a_backward() -> None:
    method, q = escape(stop=False)
    for prepare in (lambda: None, lambda: (method.backward(q.batch), method.zero_grad(set_to_none=False))):
        prepare()
        with pytest.raises(RuntimeError, match="call backward before step"):
            method.step()
    assert method.steps == 0 and method.events == []


def test_values_of_several_backwards_add_up_for_the_test() -> None:
    """Two backwards per step double the loss, and with it the drop that is recorded."""
    once, q = escape(stop=False)
    twice, _ = escape(stop=False)
    for group in twice.param_groups:
        group["lr"] /= 2
    for _ in range(25):
        step(once, batch=q.batch)
        twice.zero_grad()
        twice.backward(q.batch)
        twice.backward(q.batch)
        twice.step()
    drops = [method.events[1].value for method in (once, twice)]
    assert method_kinds(once) == method_kinds(twice) == ["perturbation", "escaped"]
    assert drops[1] == pytest.approx(2 * drops[0], rel=1e-3)


def method_kinds(method: Method) -> list[str]:
    return [event.kind for event in method.events[:2]]


def test_a_group_added_later_keeps_its_current_value_in_the_result() -> None:
    q = quadratic_minimax()
    problem = q.problem
    first, second = problem.upper_parameters
    rule = optim.PerturbedGD([first], 0.1, radius=0.1, grad_tol=1e3, escape_steps=5)
    method = Method(problem, Danskin(GD(lr=0.8, steps=3)), rule)
    before = [p.detach().clone() for p in (first, second)]
    step(method, batch=q.batch)
    method.add_param_group({"params": [second]})
    step(method, batch=q.batch)
    result = method.result()
    assert result.claim == "stationary" and torch.equal(result.x[0], before[0])
    assert torch.equal(result.x[1], second.detach()) and not torch.equal(second, before[1])


# --- x in a box ------------------------------------------------------------------------------------------------------


def boxed(low: float, high: float) -> tuple[BilevelProblem, dict[str, Any], Any]:
    q = quadratic_bilevel()
    problem = BilevelProblem(
        *q.modules(), upper_loss=q.upper_loss, lower_loss=q.lower_loss, upper_projection=projections.box(low, high)
    )
    return problem, {"lower": q.lower_batch, "upper": q.upper_batch}, q


def test_in_a_box_it_is_projected_gradient_descent_and_stationarity_that_of_the_mapping() -> None:
    low, high, lr, eps, r, wait, seed = -0.1, 0.1, 0.008, 0.1, 0.02, 8, 5
    problem, data, q = boxed(low, high)
    solvers: dict[str, Any] = {"lower_solver": GD(lr=0.9, steps=10), "linear_solver": CG(max_iter=6, tol=1e-12)}
    method = PerturbedAID(problem, lr, radius=r, grad_tol=eps, escape_steps=wait, seed=seed, **solvers)
    free = q.problem
    estimator = Implicit(solvers["lower_solver"], solvers["linear_solver"]).bind(free)
    x, last = q.x0, -math.inf
    displaced, slopes = [], []
    for t in range(40):
        assign(free.upper, x)
        for p in free.upper_parameters:
            p.grad = None
        estimator.backward(**data)
        v = gradient(free)
        ahead = (x - lr * v).clamp(low, high)
        mapping = (x - ahead) / lr
        if mapping.norm() <= 0.8 * eps and t - last > wait:
            x = (x + displacement(x, free.upper_parameters, r, seed, t)).clamp(low, high)
            last = t
            displaced.append((t, mapping.norm().item()))
            slopes.append(v.norm().item())
        else:
            x = ahead
        step(method, **data)
        torch.testing.assert_close(gradient(problem), v, rtol=1e-9, atol=1e-9)  # .grad is the hypergradient again
        torch.testing.assert_close(flat(problem.x), x, rtol=1e-9, atol=1e-9)
        assert flat(problem.x).abs().max() <= high
    assert (x.abs() == high).any() and len(displaced) >= 2
    assert min(slopes) > 10 * eps  # the gradient itself never is small
    assert [e.step for e in method.events] == [t for t, _ in displaced]
    assert [e.value for e in method.events] == pytest.approx([size for _, size in displaced], rel=1e-4, abs=1e-9)


def test_a_box_that_never_binds_changes_nothing() -> None:
    problem, data, q = boxed(-100.0, 100.0)
    solver = GD(lr=0.4, steps=3)
    method = PerturbedAID(problem, 0.05, radius=0.1, grad_tol=1.0, lower_solver=solver, escape_steps=4)
    free = PerturbedAID(q.problem, 0.05, radius=0.1, grad_tol=1.0, lower_solver=solver, escape_steps=4)
    for _ in range(15):
        step(method, **data)
        step(free, **data)
        torch.testing.assert_close(flat(problem.x), flat(free.problem.x), rtol=1e-12, atol=1e-12)
    assert [e.step for e in method.events] == [e.step for e in free.events]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("point", [-0.3, 0.3])
def test_a_box_with_lr_per_group_and_a_group_at_rest(point: float, maximize: bool) -> None:
    problem, data, q = boxed(-0.5, 0.5)
    assign(problem.upper, torch.full_like(q.x0, point))
    first, second = problem.upper_parameters
    groups = [{"params": [first], "lr": 0.5}, {"params": [second], "lr": 0.0}]
    rule = optim.PerturbedGD(groups, 0.1, radius=0.1, grad_tol=0.0, maximize=maximize)
    method = Method(problem, Implicit(GD(lr=0.9, steps=30)), rule)
    start = [p.detach().clone() for p in (first, second)]
    step(method, **data)
    assert first.grad is not None and first.detach().abs().max() == 0.5
    torch.testing.assert_close(first.detach(), (start[0] - (-0.5 if maximize else 0.5) * first.grad).clamp(-0.5, 0.5))
    assert torch.equal(second.detach(), start[1])


def test_a_rule_that_searches_for_curvature_needs_a_free_x() -> None:
    class Searching(optim.PerturbedGD):
        needs_probe = True

    problem, _, q = boxed(-1.0, 1.0)
    settings: dict[str, Any] = {"lr": 0.1, "radius": 0.1, "grad_tol": 0.1}
    with pytest.raises(ValueError, match="Searching searches for negative curvature, .* leave out upper_projection"):
        Method(problem, Implicit(None), Searching(problem.upper_parameters, **settings))
    Method(q.problem, Implicit(None), Searching(q.problem.upper_parameters, **settings))


def test_plain_rules_see_the_gradient_and_are_projected() -> None:
    problem, data, q = boxed(-0.4, 0.4)
    method = Method(problem, Implicit(GD(lr=0.9, steps=5)), torch.optim.Adam(problem.upper_parameters, 0.3))
    free = q.problem
    optimizer, estimator = torch.optim.Adam(free.upper_parameters, 0.3), Implicit(GD(lr=0.9, steps=5)).bind(free)
    for _ in range(10):
        optimizer.zero_grad()
        estimator.backward(**data)
        optimizer.step()
        assign(free.upper, flat(free.x).clamp(-0.4, 0.4))
        step(method, **data)
        assert torch.equal(flat(problem.x), flat(free.x))
    assert flat(problem.x).abs().max() == 0.4


# --- bad arguments ---------------------------------------------------------------------------------------------------


def aid(problem: Any = None, **changes: Any) -> PerturbedAID:
    settings = {"lr": 0.1, "radius": 0.1, "grad_tol": 0.1, "lower_solver": GD(lr=0.1, steps=5), **changes}
    return PerturbedAID(octopus.bilevel(d=2, L=1.0) if problem is None else problem, **settings)


def gdmax(problem: Any = None, **changes: Any) -> PerturbedGDmax:
    settings = {"lr": 0.1, "radius": 0.1, "grad_tol": 0.1, "lower_solver": GD(lr=0.1, steps=5), **changes}
    return PerturbedGDmax(octopus.minimax(d=2, L=1.0) if problem is None else problem, **settings)


TESTED = {"value_test": True, "value_tol": 1e-3}
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    *(({"lr": v}, ValueError, f"lr must be a non-negative, finite number, got {v!r}") for v in (-1, math.nan, "1")),
    *(({"grad_tol": v}, ValueError, f"grad_tol must be .*, got {v!r}") for v in (-0.5, math.nan, "1e-3")),
    *(({"radius": v}, ValueError, f"radius must be non-negative and finite, got {v}") for v in (-1, math.inf)),
    *(({"escape_steps": v}, ValueError, f"escape_steps must be a positive integer, got {v}") for v in (0, 1.5)),
    ({"value_test": True}, ValueError, "value_tol must be positive .* got None"),
    ({"value_test": True, "value_tol": 0.0}, ValueError, r"value_tol must be positive .* got 0\.0"),
    ({"value_tol": 0.1}, ValueError, r"value_tol must be None without value_test=True, got 0\.1"),
    ({"stop": True}, ValueError, "stop must be False without value_test=True, got True"),
    (TESTED, ValueError, r"lower solver a tol below value_tol=0\.001, .*steps enough to reach it, got tol=None"),
    ({**TESTED, "lower_solver": GD(0.1, 5, tol=1e-2)}, ValueError, r"below value_tol=0\.001, .*got tol=0\.01"),
    ({**TESTED, "lower_solver": None}, ValueError, r"below value_tol=0\.001, .*got tol=None"),
    ({"seed": 0.5}, ValueError, r"seed must be an integer, got 0\.5"),
    ({"lower_solver": 5}, TypeError, "lower_solver must be .* got int"),
    ({"problem": torch.nn.Linear(1, 1)}, TypeError, "problem must be .* got Linear"),
]


@pytest.mark.parametrize("make", [aid, gdmax])
@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_arguments_are_named_with_what_would_work(
    make: Callable[..., Any], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(**changes)


def test_each_is_for_its_kind_of_problem() -> None:
    with pytest.raises(ValueError, match="Implicit is for bilevel problems; .*use Danskin"):
        aid(octopus.minimax(d=2, L=1.0))
    with pytest.raises(ValueError, match="Danskin is for minimax problems; .*use Implicit"):
        gdmax(octopus.bilevel(d=2, L=1.0))
    with pytest.raises(TypeError, match=r"linear_solver must be .*CG.* got GD"):
        aid(linear_solver=GD(lr=0.1, steps=5))
    assert isinstance(gdmax().problem, MinimaxProblem)
