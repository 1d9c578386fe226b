"""The closed forms are right: by finite differences, by definition, and by the octopus' piecewise table."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import octopus as octo
from tests.problems import (
    FACTORIES,
    assign,
    constrained_minimax,
    flat,
    generator,
    quadratic_bilevel,
    quadratic_minimax,
    unflat,
)

LS = (1.0, 1.5, 2.0, 3.0, math.e)


@pytest.fixture(params=list(FACTORIES))
def case(request: pytest.FixtureRequest) -> Any:
    return FACTORIES[request.param]()


def differences(function: Callable[[Tensor], Tensor], x: Tensor, h: float = 2e-3) -> Tensor:
    """Derivatives by central differences of sixth order, the last dimension running over the entries of x."""
    weights = {1: 3 / 4, 2: -3 / 20, 3: 1 / 60}
    columns = []
    for e in torch.eye(len(x), dtype=x.dtype) * h:
        pairs = ((w, function(x + k * e) - function(x - k * e)) for k, w in weights.items())
        columns.append(sum(w * change for w, change in pairs) / h)
    return torch.stack(columns, -1)


def points(case: Any, count: int = 3) -> list[Tensor]:
    normal = generator(7)
    return [case.x0 + 0.1 * normal(len(case.x0)) for _ in range(count)]


def losses(case: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """f and g at (x, y), through the modules, with the parameters of both."""
    upper, lower = case.modules()
    assign(upper, x)
    assign(lower, y)
    if hasattr(case, "batch"):
        f = case.loss(upper, lower, case.batch)
        g = -f
    else:
        f = case.upper_loss(upper, lower, case.upper_batch)
        g = case.lower_loss(upper, lower, case.lower_batch)
    return f, g, tuple(upper.parameters()), tuple(lower.parameters())


# --- the test problems ---------------------------------------------------------------------------


def test_gradient_and_hessian_of_phi(case: Any) -> None:
    for x in points(case):
        torch.testing.assert_close(case.grad_phi(x), differences(case.phi, x), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(case.hess_phi(x), differences(case.grad_phi, x), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(case.hess_phi(x), case.hess_phi(x).T, rtol=0, atol=1e-12)


def test_phi_is_the_upper_loss_at_the_lower_optimum(case: Any) -> None:
    for x in points(case):
        y = case.y_star(x)
        f, g, _, lower = losses(case, x, y)
        torch.testing.assert_close(f.detach(), case.phi(x), rtol=1e-13, atol=1e-13)
        g_y = torch.autograd.grad(g, lower)
        if hasattr(case, "simplex"):
            moved = case.problem.project_y(tuple(p.detach() - d for p, d in zip(lower, g_y, strict=True)))
            torch.testing.assert_close(flat(moved), y, rtol=0, atol=1e-13)
        else:
            assert flat(g_y).norm() <= 1e-13


def test_parameters_are_split_and_in_order(case: Any) -> None:
    problem = case.problem
    assert problem is case.problem
    torch.testing.assert_close(flat(problem.x), case.x0, rtol=0, atol=0)
    torch.testing.assert_close(flat(problem.y), case.y0, rtol=0, atol=0)
    assert len(problem.x) > 1 and any(t.dim() == 0 for t in problem.x)
    assert len(problem.y) > 1 or case.simplex
    for tensors in (problem.x, problem.y):
        again = unflat(flat(tensors), tensors)
        assert all(torch.equal(s, t) for s, t in zip(again, tensors, strict=True))


def test_problems_pass_their_own_check_and_copy(case: Any) -> None:
    problem = case.problem
    if problem.minimax:
        problem.check(case.batch)
    else:
        problem.check(lower=case.lower_batch, upper=case.upper_batch)
    twins = [copy.deepcopy(problem)]
    if not problem.constrains_y:
        twins.append(pickle.loads(pickle.dumps(problem)))
    for twin in twins:
        assert flat(twin.x).equal(case.x0) and twin.x[0].data_ptr() != problem.x[0].data_ptr()


def test_what_the_problems_are_made_for() -> None:
    """Phi is nonconvex, g_yy depends on x where it should, and faces are active."""
    for curved in (False, True):
        case = quadratic_bilevel(curved=curved)
        matrices = [case.response.matrix(x) for x in points(case, 2)]
        assert torch.equal(*matrices) is not curved
        assert torch.linalg.eigvalsh(matrices[0]).min() > 0.1
    for simplex, count in ((True, 3), (False, 3)):
        case = constrained_minimax(simplex=simplex)
        assert all(case.free(x).sum() == count for x in points(case))
        assert torch.linalg.eigvalsh(case.hess_phi(case.x0)).min() < -0.1


def test_quadratic_minimax_has_a_saddle_at_zero_and_two_minima() -> None:
    case = quadratic_minimax()
    zero, low = torch.zeros_like(case.x0), case.minimum
    torch.testing.assert_close(torch.linalg.eigvalsh(case.hess_phi(zero)), case.spectrum)
    assert flat(case.grad_phi(zero)).norm() == 0
    # The closed form does not see P, C and Q: at 0 the loss itself must be stationary in x as well.
    f, _, upper, _ = losses(case, zero, case.y_star(zero))
    assert flat(torch.autograd.grad(f, upper)).norm() <= 1e-14
    for x in (low, -low):
        assert case.grad_phi(x).norm() <= 1e-14
        assert torch.linalg.eigvalsh(case.hess_phi(x)).min() > 0.4
        drop = case.spectrum[0] ** 2 / (4 * case.q)
        torch.testing.assert_close(case.phi(zero) - case.phi(x), drop)


def test_rows_of_the_batches_average_to_the_whole() -> None:
    """Mini-batches of the quadratics are unbiased, which stochastic methods will be held to."""
    case = quadratic_bilevel()
    upper, lower = case.modules()
    rows = [case.lower_loss(upper, lower, (row[None],)) for row in case.lower_batch[0]]
    torch.testing.assert_close(torch.stack(rows).mean(), case.lower_loss(upper, lower, case.lower_batch))
    rows = [case.upper_loss(upper, lower, (row[None],)) for row in case.upper_batch[0]]
    torch.testing.assert_close(torch.stack(rows).mean(), case.upper_loss(upper, lower, case.upper_batch))


# --- octopus -------------------------------------------------------------------------------------


def g1(a: float, L: float, gamma: float, tau: float) -> float:
    cubic, quartic = (-14 * L + 10 * gamma) / (3 * tau), (5 * L - 3 * gamma) / (2 * tau**2)
    return -gamma * a**2 + cubic * (a - tau) ** 3 + quartic * (a - tau) ** 4


def g2(a: float, L: float, gamma: float, tau: float) -> float:
    s, c = (a - 2 * tau) / tau, L + gamma
    return -gamma - 10 * c * s**3 - 15 * c * s**4 - 6 * c * s**5


def table(x: Tensor, L: float, gamma: float, tau: float) -> float:
    """The piecewise function of Du et al. at a point of the tube, line by line."""
    a, d = [abs(t) for t in x.tolist()], len(x)
    nu = 4 * L * tau**2 - g1(2 * tau, L, gamma, tau)
    i = next((j for j in range(d) if a[j] < 2 * tau), d)
    value = sum(L * (t - 4 * tau) ** 2 for t in a[:i]) - i * nu
    if i == d:
        return value
    if a[i] <= tau:
        return value - gamma * a[i] ** 2 + sum(L * t**2 for t in a[i + 1 :])
    value += g1(a[i], L, gamma, tau)
    if i == d - 1:
        return value
    return value + g2(a[i], L, gamma, tau) * a[i + 1] ** 2 + sum(L * t**2 for t in a[i + 2 :])


def tube_points(count: int, d: int, tau: float) -> Tensor:
    """Random points of the tube, mirrored at random; all regions and parts are drawn equally often."""
    g = torch.Generator().manual_seed(3)
    draw = torch.rand(count, d, generator=g, dtype=torch.float64)
    x = draw * tau
    for n in range(count):
        i = n % (d + 1)
        x[n, :i] = (2 + 4 * draw[n, :i]) * tau
        if i < d and n // (d + 1) % 2:
            x[n, i] += tau
    return x * (torch.rand(count, d, generator=g) < 0.5).double().mul(2).sub(1)


def octopus_gradient(x: Tensor, *constants: float) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(octo.octopus(x, *constants), x)[0]


def octopus_derivatives(x: Tensor, *constants: float) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(octo.octopus(x, *constants), x, create_graph=True)
    rows = [torch.autograd.grad(g, x, retain_graph=True)[0] for g in gradient]
    return gradient.detach(), torch.stack(rows)


@pytest.mark.parametrize("d", [1, 5])
@pytest.mark.parametrize(("L", "gamma", "tau"), [*((L, 1.0, octo.TAU) for L in LS), (1.0, 0.5, 1.0), (0.7, 0.7, 2.0)])
def test_octopus_equals_the_table_on_the_tube(d: int, L: float, gamma: float, tau: float) -> None:
    x = tube_points(600, d, tau)
    expected = torch.tensor([table(row, L, gamma, tau) for row in x], dtype=torch.float64)
    torch.testing.assert_close(octo.octopus(x, L, gamma, tau), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("L", LS)
@pytest.mark.parametrize("d", [1, 2, 5, 10])
def test_octopus_critical_points(d: int, L: float) -> None:
    gamma, tau = 1.0, octo.TAU
    for k in range(d + 1):
        x = octo.saddle(k, d)
        gradient, hessian = octopus_derivatives(x, L, gamma, tau)
        diagonal = torch.full((d,), 2 * L, dtype=torch.float64)
        diagonal[k : k + 1] = -2 * gamma
        assert torch.equal(hessian, torch.diag(diagonal))
        assert torch.count_nonzero(gradient) == 0
        assert octo.octopus(x, L).item() == pytest.approx(-k * octo.drop(L, gamma), rel=1e-15, abs=0)
        assert torch.equal(octo.octopus(-x, L), octo.octopus(x, L))
        # Under vmap cumprod takes another branch of its derivative.
        functional = torch.func.jacrev(torch.func.jacrev(lambda x: octo.octopus(x, L)))
        assert torch.equal(functional(x), hessian)
    assert torch.equal(octo.minimum(d), octo.saddle(d, d))


@pytest.mark.parametrize("L", [1.0, 3.0])
def test_octopus_is_twice_continuously_differentiable(L: float) -> None:
    """Across the joints value, gradient and Hessian change by no more than the step explains."""
    d, tau = 4, octo.TAU
    for k, joint in itertools.product(range(d), (tau, 2 * tau)):
        x = octo.saddle(k, d) + 0.3
        sides = []
        for shift in (-1e-9, 0.0, 1e-9):
            x[k] = joint + shift
            sides.append((octo.octopus(x, L), *octopus_derivatives(x, L)))
        for one, other in itertools.pairwise(sides):
            for s, t in zip(one, other, strict=True):
                torch.testing.assert_close(s, t, rtol=0, atol=1e-6)


@pytest.mark.parametrize("L", [1.0, 3.0])
def test_octopus_derivatives_in_the_whole_box(L: float) -> None:
    """Off the tube too, and with entries that are exactly 0, where |x| is not differentiable."""
    g = torch.Generator().manual_seed(5)
    box = (torch.rand(25, 5, generator=g, dtype=torch.float64) * 2 - 1) * 6 * octo.TAU
    box[::2] *= (torch.rand(13, 5, generator=g) < 0.6).double()
    for x in (*box, *tube_points(12, 5, octo.TAU)):
        gradient, hessian = octopus_derivatives(x, L)
        value = differences(lambda x: octo.octopus(x, L), x, h=1e-3)
        torch.testing.assert_close(gradient, value, rtol=1e-8, atol=1e-8)
        slope = differences(lambda x: octopus_gradient(x, L), x, h=1e-3)
        torch.testing.assert_close(hessian, slope, rtol=1e-7, atol=1e-7)


def test_octopus_shapes_and_dtypes() -> None:
    x = tube_points(24, 5, octo.TAU).reshape(4, 6, 5)
    value = octo.octopus(x, 2.0)
    assert value.shape == (4, 6)
    assert torch.equal(value[1, 2], octo.octopus(x[1, 2], 2.0))
    single = octo.octopus(x.float(), 2.0)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), value, rtol=1e-5, atol=1e-3)
    gradient, hessian = octopus_derivatives(octo.saddle(2, 5, dtype=torch.float32), 2.0)
    assert hessian.dtype == torch.float32 and torch.equal(hessian.diag(), torch.tensor([4.0, 4, -2, 4, 4]))
    assert gradient.abs().max() <= 1e-5


def test_left_behind() -> None:
    x = torch.tensor([[0.0, 0, 0], [6, 0, 0], [-6, -6, 0], [0, 6, 0]])
    assert octo.left_behind(x) == octo.left_behind(list(x)) == [1, 2]
    assert octo.left_behind(x, tau=3.0) == octo.left_behind(x[:1]) == []
    assert octo.left_behind(x[:, [2, 0]]) == []


def test_gradient_descent_takes_geometrically_growing_times() -> None:
    """The times of the specification's table (which counts from 0), and the ratio behind them."""
    for L, expected in ((1.0, [7, 25, 71, 197, 538]), (2.0, [12, 60, 255, 1053])):
        x, history = octo.random_start(5, seed=0), []
        for _ in range(1 + expected[-1] + 1):
            history.append(x)
            x = x - octopus_gradient(x, L) / (4 * L)
        times = octo.left_behind(history)
        assert [t - 1 for t in times] == expected
        assert times[-1] / times[-2] == pytest.approx(octo.time_ratio(L), rel=0.05)


def test_hypergradient_descent_follows_the_table_too() -> None:
    """AID-BiO by hand, aligned, y_0 = 0, 20 inner and 20 Neumann steps: the first times of the table."""
    L, expected = 1.0, [8, 28, 80, 221]
    upper, lower = octo.modules(5, L, kappa=10.0)
    x, y, history = upper.x.detach(), lower.y.detach(), []
    for _ in range(1 + expected[-1] + 1):
        history.append(x)
        for _ in range(20):
            y = y - lower.H * (y - x)
        z = r = octopus_gradient(y, L)
        for _ in range(20):
            r = r - lower.H * r
            z = z + r
        x = x - lower.H * z / (4 * L)
    assert [t - 1 for t in octo.left_behind(history)] == expected


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("coupled", [False, True])
def test_octopus_wrappers(rotated: bool, coupled: bool) -> None:
    """y* = A x, Phi = O and grad Phi = grad O for every theta, and for the minimax twin."""
    d, L, kappa = 4, 1.5, 25.0
    coupling = torch.eye(d, dtype=torch.float64) + 0.1 * generator(2)(d, d) if coupled else None
    x = tube_points(10, d, octo.TAU)[7]
    for theta in (0.25, 1.0):
        upper, lower = octo.modules(d, L, kappa=kappa, theta=theta, rotated=rotated, start=x, coupling=coupling)
        H = lower.H if rotated else torch.diag(lower.H)
        A = torch.eye(d, dtype=torch.float64) if coupling is None else coupling
        spectrum = torch.logspace(-math.log10(kappa), 0, d, dtype=torch.float64)
        torch.testing.assert_close(torch.linalg.eigvalsh(H), spectrum)
        assert torch.equal(lower.y, torch.zeros(d, dtype=torch.float64))
        assign(lower, A @ x)
        gradient = octopus_gradient(x, L)
        g = octo.lower_loss(upper, lower)
        f = octo.upper_loss(upper, lower)
        g_y, f_y = (torch.autograd.grad(loss, lower.y, retain_graph=True)[0] for loss in (g, f))
        f_x = torch.autograd.grad(f, upper.x, allow_unused=True)[0]
        assert g_y.norm() <= 1e-13 and (f_x is None) is (theta == 1.0)
        torch.testing.assert_close(f.detach(), octo.octopus(x, L))
        total = (0 if f_x is None else f_x) + A.T @ H @ torch.linalg.solve(H, f_y)
        torch.testing.assert_close(total, gradient)
        value = octo.saddle_loss(upper, lower)
        v_x, v_y = torch.autograd.grad(value, (upper.x, lower.y))
        torch.testing.assert_close(value.detach(), octo.octopus(x, L))
        torch.testing.assert_close(v_x, gradient)
        assert v_y.norm() <= 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_octopus_problems(dtype: torch.dtype) -> None:
    bilevel = octo.bilevel(5, L=2.0, theta=0.5, rotated=True, seed=3, dtype=dtype)
    bilevel.check(lower=(), upper=())
    minimax = octo.minimax(5, L=2.0, seed=3, dtype=dtype)
    minimax.check(())
    assert all(t.dtype == dtype for p in (bilevel, minimax) for t in (*p.x, *p.y))
    assert torch.equal(bilevel.x[0], minimax.x[0]) and bilevel.x[0].abs().max() < 1
    assert torch.equal(bilevel.x[0], octo.random_start(5, 3, dtype))
    assert not torch.equal(bilevel.x[0], octo.random_start(5, 4, dtype))


def test_octopus_bad_input() -> None:
    with pytest.raises(ValueError, match="L >= gamma > 0 is needed, got L = 1.0, gamma = 2.0"):
        octo.modules(3, L=1.0, gamma=2.0)
    with pytest.raises(ValueError, match="kappa must be at least 1, got 0.5"):
        octo.modules(3, L=1.0, kappa=0.5)
    with pytest.raises(ValueError, match="theta"):
        octo.modules(3, L=1.0, theta=1.5)
    with pytest.raises(ValueError, match="k must lie between 0 and d = 3, got 4"):
        octo.saddle(4, 3)
