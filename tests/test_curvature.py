"""The Hessian of Phi: closed forms, central differences, faces, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import octopus
from tests.problems import FACTORIES, Split, assign, constrained_minimax, flat, generator, spd, unflat
from torchbilevel import Batches, BilevelProblem, HessianOperator, MinimaxProblem, hessian_operator, projections
from torchbilevel.lanczos import smallest_eigenpair
from torchbilevel.problem import Problem
from torchbilevel.samples import Sample, Samples
from torchbilevel.verdict import obstacle

Data = dict[str, Any]


def data_of(p: Any) -> Data:
    return {"batch": p.batch} if p.problem.minimax else {"lower": p.lower_batch, "upper": p.upper_batch}


# --- closed forms ---


@pytest.mark.parametrize("name", FACTORIES)
def test_closed_form(name: str) -> None:
    p = FACTORIES[name]()
    operator = hessian_operator(p.problem, **data_of(p))
    n = len(p.x0)
    assert operator.shape == (n, n)
    torch.testing.assert_close(operator.dense(), p.hess_phi(p.x0), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(flat(operator.gradient), p.grad_phi(p.x0), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(operator.value, p.phi(p.x0), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(flat(operator.response.y), p.y_star(p.x0), atol=1e-9, rtol=1e-9)
    assert operator.gradient_error <= 1e-9
    assert operator.solve_error <= 1e-11


@pytest.mark.parametrize("name", ["curved quadratic", "simplex"])
def test_any_x_can_be_given_and_the_modules_stay(name: str) -> None:
    p = FACTORIES[name]()
    x = p.x0 + 0.05 * generator(4)(len(p.x0))
    data = data_of(p)
    operator = HessianOperator(p.problem, p.problem.sample(*map(data.get, ("batch", "lower", "upper")), seed=0))
    for there in (
        operator.at(unflat(x, p.problem.x)),
        HessianOperator(p.problem, operator._samples, x=unflat(x, p.problem.x)),
    ):
        torch.testing.assert_close(there.dense(), p.hess_phi(x), atol=1e-9, rtol=1e-9)
    assert torch.equal(flat(p.problem.x), p.x0)
    assert torch.equal(flat(p.problem.y), p.y0)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("theta", [1.0, 0.3])
@pytest.mark.parametrize("d", [5, 20])
def test_octopus_at_a_point_between_saddles(d: int, theta: float, rotated: bool) -> None:
    x = octopus.saddle(2, d) + 0.3 * generator(d)(d)
    hessian = torch.autograd.functional.hessian(lambda t: octopus.octopus(t, 2.0), x)
    problem = octopus.bilevel(d, 2.0, theta=theta, rotated=rotated, start=x)
    torch.testing.assert_close(hessian_operator(problem).dense(), hessian, atol=1e-9, rtol=1e-9)
    if theta == 1.0:
        problem = octopus.minimax(d, 2.0, rotated=rotated, start=x)
        torch.testing.assert_close(hessian_operator(problem).dense(), hessian, atol=1e-9, rtol=1e-9)


# --- non-quadratic problems, against central differences of grad Phi ---


def network(seed: int = 0) -> tuple[Problem, Data]:
    """A tanh network below; above a log penalty for each tensor and a weight for each row."""
    normal = generator(seed)
    lower = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    assign(lower, 0.5 * normal(sum(p.numel() for p in lower.parameters())))
    upper = Split(0.3 * normal(10), ((4,), (6,)))
    train, val = ((normal(6, 2), torch.randint(2, (6,), generator=torch.Generator().manual_seed(i))) for i in (1, 2))

    def lower_loss(upper: Split, lower: nn.Module, batch: Any) -> Tensor:
        losses = F.cross_entropy(lower(batch[0]), batch[1], reduction="none")
        penalty = sum(s.exp() * w.square().sum() for s, w in zip(upper.p0, lower.parameters(), strict=True))
        return (upper.p1.sigmoid() * losses).mean() + penalty

    def upper_loss(upper: Split, lower: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(lower(batch[0]), batch[1]) + (upper.p0[0] * upper.p1).sin().mean()

    return BilevelProblem(upper, lower, upper_loss, lower_loss), {"lower": train, "upper": val}


def adversary(projection: Any, shape: tuple[int, ...], seed: int = 0) -> tuple[Problem, Data]:
    """A tanh network above, a perturbation below that gains by a linear and loses by a quartic term."""
    normal = generator(seed)
    upper = nn.Sequential(nn.Linear(shape[-1], 3), nn.Tanh(), nn.Linear(3, 1)).double()
    assign(upper, 0.7 * normal(sum(p.numel() for p in upper.parameters())))
    lower = Split(0.1 * normal(torch.Size(shape).numel()), (shape,))
    batch = 2.0 * normal(*shape)

    def loss(upper: nn.Module, lower: Split, batch: Tensor) -> Tensor:
        y = lower.p0
        return upper(y).sum() + (batch * y).sum() - y.square().sum() - 0.25 * y.pow(4).sum()

    return MinimaxProblem(upper, lower, loss, projection=projection), {"batch": batch}


CURVED: dict[str, Callable[[], tuple[Problem, Data]]] = {
    "network": network,
    "another network": lambda: network(1),
    "free": lambda: adversary(None, (2, 3)),
    "box": lambda: adversary(projections.linf_ball(0.4), (2, 3)),
    "half-open box": lambda: adversary(projections.box(0.0, float("inf")), (2, 3)),
    "simplex": lambda: adversary(projections.simplex(), (2, 5)),
    "ball": lambda: adversary(projections.l2_ball(0.5), (2, 3)),
    "balls, some active": lambda: adversary(projections.l2_ball(0.9, (1,)), (4, 2)),
    "everything active": lambda: adversary(projections.linf_ball(0.01), (2, 3)),
}


@pytest.mark.parametrize("name", CURVED)
def test_central_differences_of_the_gradient(name: str) -> None:
    problem, data = CURVED[name]()
    operator = hessian_operator(problem, **data, tol=1e-13)
    x, step = flat(operator.x), 1e-5
    for seed in range(2):
        d = generator(seed)(len(x))
        d /= d.norm()
        ends = [flat(operator.at(unflat(x + s * step * d, operator.x)).gradient) for s in (1, -1)]
        torch.testing.assert_close(operator.matvec(d), (ends[0] - ends[1]) / (2 * step), atol=1e-6, rtol=1e-6)
    matrix = operator.matvec(torch.eye(len(x), dtype=torch.float64))
    torch.testing.assert_close(matrix, matrix.T, atol=1e-9, rtol=1e-9)


def test_the_faces_above_are_what_their_names_say() -> None:
    for name, low, high in (("box", 1, 5), ("simplex", 1, 8), ("half-open box", 1, 5), ("everything active", 6, 6)):
        problem, data = CURVED[name]()
        y = hessian_operator(problem, **data).response.y[0]
        bound = {"box": y.abs() == 0.4, "everything active": y.abs() == 0.01}.get(name, y == 0)
        assert low <= int(bound.sum()) <= high, name
    for name, active in (("ball", [True]), ("balls, some active", None)):
        problem, data = CURVED[name]()
        y = hessian_operator(problem, **data).response.y[0]
        if active is None:
            on = (y.norm(dim=1) - 0.9).abs() < 1e-9
            assert 0 < int(on.sum()) < 4
        else:
            assert abs(float(y.norm()) - 0.5) < 1e-12


def test_round_face_closed_form() -> None:
    """Y the ball of radius r, f = 1/2 x'Px + y'(Bx + c) - q/2 |y|^2: Phi = 1/2 x'Px + r |Bx + c| - q r^2 / 2."""
    normal = generator(0)
    P, B, c, r, q = spd(normal, 3, -1.0, 2.0), normal(4, 3), 2 * normal(4), 0.7, 0.4
    upper, lower = Split(normal(3), ((3,),), P=P, B=B, c=c), Split(torch.zeros(4).double(), ((4,),))

    def loss(upper: Split, lower: Split, batch: Any) -> Tensor:
        x, y = upper.p0, lower.p0
        return 0.5 * x @ upper.P @ x + y @ (upper.B @ x + upper.c) - 0.5 * q * y.square().sum()

    operator = hessian_operator(MinimaxProblem(upper, lower, loss, projection=projections.l2_ball(r)))
    w = B @ flat(operator.x) + c
    n = w / w.norm()
    exact = P + r * B.T @ (torch.eye(4, dtype=torch.float64) - torch.outer(n, n)) @ B / w.norm()
    torch.testing.assert_close(operator.dense(), exact, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(operator.response.y[0], r * n, atol=1e-10, rtol=0)


def test_random_numbers_and_statistics_are_replayed() -> None:
    """Dropout and batch statistics are part of Phi, the same in every product, and buffers stay."""
    torch.manual_seed(0)
    layers = (nn.BatchNorm1d(3), nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.4), nn.Linear(4, 1))
    lower = nn.Sequential(*layers).double()
    upper = Split(torch.zeros(2).double(), ((2,),))

    def loss(upper: Split, lower: nn.Module, batch: Any) -> Tensor:
        ridge = sum(p.square().sum() for p in lower.parameters())
        return F.mse_loss(lower(batch[0])[:, 0], batch[1] + upper.p0[1]) + upper.p0[0].exp() * ridge

    problem = BilevelProblem(upper, lower, upper_loss=loss, lower_loss=loss)
    normal = generator(0)
    data = {"lower": (normal(12, 3), normal(12)), "upper": (normal(12, 3), normal(12))}
    before, state = copy.deepcopy(lower.state_dict()), torch.get_rng_state()
    operator = hessian_operator(problem, **data)
    step, d = 1e-5, torch.tensor([0.6, -0.8], dtype=torch.float64)
    ends = [flat(operator.at((s * step * d,)).gradient) for s in (1, -1)]
    torch.testing.assert_close(operator.matvec(d), (ends[0] - ends[1]) / (2 * step), atol=1e-6, rtol=1e-6)
    assert torch.equal(operator.matvec(d), operator.matvec(d))
    assert all(torch.equal(v, lower.state_dict()[k]) for k, v in before.items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in (*lower.parameters(), *upper.parameters()))


# --- data, dtypes ---


@pytest.mark.parametrize("name", ["ridge", "minimax"])
def test_batches_equal_the_joined_batch(name: str) -> None:
    p = FACTORIES[name]()
    rows = (slice(0, 3), slice(3, 4), slice(4, None))
    parts = {k: Batches([tuple(t[r] for t in batch) for r in rows]) for k, batch in data_of(p).items()}
    torch.testing.assert_close(hessian_operator(p.problem, **parts).dense(), p.hess_phi(p.x0), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["logistic", "minimax", "box"])
def test_float32(name: str) -> None:
    p = FACTORIES[name]()
    hessian, problem = p.hess_phi(p.x0), p.problem
    problem.upper.float(), problem.lower.float()
    batches = {
        k: tuple(t.float() if t.is_floating_point() else t for t in batch) if isinstance(batch, tuple) else batch
        for k, batch in data_of(p).items()
    }
    operator = hessian_operator(problem, **batches)
    dense = operator.dense()
    assert dense.dtype == torch.float32
    torch.testing.assert_close(dense.double(), hessian, atol=1e-4, rtol=1e-4)


# --- the operator's other forms ---


def test_several_vectors_at_once() -> None:
    p = FACTORIES["curved quadratic"]()
    operator = hessian_operator(p.problem, **data_of(p))
    u = generator(1)(4, 3)
    torch.testing.assert_close(operator.matvec(u), p.hess_phi(p.x0) @ u)
    torch.testing.assert_close(operator.matvec(u[:, 1]), p.hess_phi(p.x0) @ u[:, 1])
    assert operator.matvec(u[:, :0]).shape == (4, 0)
    for wrong in (u.T, u[:2], u[None], torch.ones(())):
        with pytest.raises(ValueError, match=r"u must have shape \(4,\) or \(4, k\), got"):
            operator.matvec(wrong)


def test_scipy_finds_the_same_eigenvalues() -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    p = FACTORIES["ridge"]()
    operator = hessian_operator(p.problem, **data_of(p))
    exact = torch.linalg.eigvalsh(p.hess_phi(p.x0))
    scipy = operator.scipy()
    values, vectors = linalg.eigsh(scipy, k=2, which="SA")
    torch.testing.assert_close(torch.from_numpy(values), exact[:2], atol=1e-9, rtol=0)
    images = torch.from_numpy(scipy @ vectors)
    torch.testing.assert_close(images, torch.from_numpy(vectors * values), atol=1e-9, rtol=0)


def test_lanczos_finds_its_smallest_eigenvalue_among_300() -> None:
    """The Hessian of Phi = 1/2 x' S x, S with a multiple and a clustered smallest eigenvalue."""
    cluster = -1 + 1e-6 * torch.arange(20, dtype=torch.float64)
    spectrum = torch.cat([torch.full((20,), -1.0).double(), cluster, torch.linspace(0, 2, 260).double()])
    q, _ = torch.linalg.qr(generator(0)(300, 300))
    S = (q * spectrum) @ q.T
    upper, lower = (Split(generator(i)(300), ((290,), (10,)), S=S) for i in (1, 2))
    problem = BilevelProblem(
        upper,
        lower,
        upper_loss=lambda u, lo, b: 0.5 * u.flat() @ u.S @ lo.flat(),
        lower_loss=lambda u, lo, b: 0.5 * (lo.flat() - u.flat()).square().sum(),
    )
    pair = smallest_eigenpair(hessian_operator(problem).matvec, generator(3)(300))
    assert abs(pair.value + 1) <= 1e-8
    assert pair.value - pair.error <= -1 + 1e-12


def test_dense_is_capped() -> None:
    p = FACTORIES["ridge"]()
    with pytest.raises(ValueError, match=r"dense\(\) takes 5 products, more than max_size=4"):
        hessian_operator(p.problem, **data_of(p)).dense(max_size=4)


def test_a_product_takes_two_solves_and_three_sweeps() -> None:
    p = FACTORIES["logistic"]()
    operator = hessian_operator(p.problem, **data_of(p))
    before = copy.copy(operator.counts)
    operator.product(p.problem.x)
    after = operator.counts
    assert after.jacobian_products - before.jacobian_products == 2
    assert after.lagrangian_products - before.lagrangian_products == 1
    assert after.upper_gradients == before.upper_gradients
    assert after.lower_gradients == before.lower_gradients
    assert 2 <= after.hessian_products - before.hessian_products <= 2 * len(p.y0) + 20


def test_a_minimax_product_takes_one_solve_and_two_sweeps() -> None:
    p = FACTORIES["minimax"]()
    operator = hessian_operator(p.problem, **data_of(p))
    before = copy.copy(operator.counts)
    operator.product(p.problem.x)
    assert operator.counts.jacobian_products - before.jacobian_products == 1
    assert operator.counts.lagrangian_products == 0
    assert operator.counts.hessian_products - before.hessian_products <= 6 + 2 + 1


# --- error estimates and refusals ---


def test_gradient_error_covers_a_sloppy_y() -> None:
    p = FACTORIES["curved quadratic"]()
    p.problem.set_y(unflat(p.y_star(p.x0) + 1e-4 * generator(0)(6), p.problem.y))
    operator = hessian_operator(p.problem, **data_of(p), tol=1.0)
    error = float((flat(operator.gradient) - p.grad_phi(p.x0)).norm())
    assert operator.response.iterations == 0
    assert error > 1e-6
    assert 0.99 * error <= operator.gradient_error <= 1.01 * error


@pytest.mark.parametrize("name", ["curved quadratic", "ridge", "logistic"])
def test_gradient_error_covers_a_sloppy_adjoint(name: str) -> None:
    p = FACTORIES[name]()
    operator = hessian_operator(p.problem, **data_of(p), solver_tol=0.03)
    error = float((flat(operator.gradient) - p.grad_phi(p.x0)).norm())
    assert operator.adjoint_residual > 1e-3
    assert error > 1e-3
    assert 0.98 * error <= operator.gradient_error <= 1.02 * error


def test_the_worst_solve_is_remembered() -> None:
    p = FACTORIES["curved quadratic"]()
    p.problem.set_y(unflat(p.y_star(p.x0), p.problem.y))
    operator = hessian_operator(p.problem, **data_of(p), max_iter=2)
    A, f_y = p.response.matrix(p.x0), p._f_y(p.x0, p.y_star(p.x0))
    worst = float((A @ flat(operator.z) - f_y).norm() / f_y.norm())
    assert operator.solve_error >= worst * (1 - 1e-6) > 0.01
    assert "stopped at a relative residual of" in obstacle(operator, None)
    assert obstacle(hessian_operator(p.problem, **data_of(p)), None) == ""


def test_gradient_error_on_a_round_face() -> None:
    problem, data = CURVED["ball"]()
    exact = hessian_operator(problem, **data)
    y = exact.response.y[0] + 1e-4 * generator(0)(2, 3)
    problem.set_y((0.5 * y / y.norm(),))
    sloppy = hessian_operator(problem, **data, tol=1.0)
    error = float((flat(sloppy.gradient) - flat(exact.gradient)).norm())
    assert error > 1e-6
    assert 0.9 * error <= sloppy.gradient_error <= 1.1 * error


@pytest.mark.parametrize("count", [1, 2])
def test_without_strict_complementarity_it_is_refused_with_the_count(count: int) -> None:
    p = constrained_minimax(simplex=False)
    # y* = clamp(c + l(x)): entries whose argument is 1 sit at their bound with a multiplier of zero.
    point = p.c + p.losses(p.x0)
    with torch.no_grad():
        p.problem.lower.c[:count] += 1 - point[:count]
    words = f"active with a multiplier of zero: {count}; Phi has no second derivative"
    with pytest.raises(ValueError, match=words):
        hessian_operator(p.problem, **data_of(p))
    samples = Samples(Sample(p.batch, 0), Sample(p.batch, 0))
    assert words in HessianOperator(p.problem, samples, strict=False).trouble


@pytest.mark.parametrize("minimax", [False, True])
def test_a_lower_level_that_is_not_convex_is_refused(minimax: bool) -> None:
    def lower_loss(upper: Split, lower: Split, batch: Any) -> Tensor:
        return 0.5 * (lower.p0 - upper.p0) @ (torch.tensor([1.0, -1.0]).double() * (lower.p0 - upper.p0))

    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    upper, lower = Split(x, ((2,),)), Split(x, ((2,),))
    problem = (
        MinimaxProblem(upper, lower, lambda u, lo, b: -lower_loss(u, lo, b))
        if minimax
        else BilevelProblem(upper, lower, lambda u, lo, b: lo.p0.square().sum(), lower_loss)
    )
    with pytest.raises(ValueError, match="g_yy is not positive definite"):
        hessian_operator(problem).dense()


def test_a_lower_level_without_a_minimum_is_refused() -> None:
    upper, lower = Split(torch.ones(2).double(), ((2,),)), Split(torch.ones(2).double(), ((2,),))

    def lower_loss(upper: Split, lower: Split, batch: Any) -> Tensor:
        return (-lower.p0 * upper.p0.square()).exp().sum()

    with pytest.raises(ValueError, match=r"y\*\(x\) was not found: .* bring y closer"):
        hessian_operator(BilevelProblem(upper, lower, lambda u, lo, b: lo.p0.sum(), lower_loss), tol=1e-300)


def test_bounds_on_x_are_refused() -> None:
    p = FACTORIES["minimax"]()
    problem = MinimaxProblem(*p.modules(), loss=p.loss, upper_projection=projections.box(-1.0, 1.0))
    with pytest.raises(ValueError, match="upper_projection"):
        hessian_operator(problem, p.batch)


@pytest.mark.parametrize("option", ["tol", "solver_tol"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_tolerances_are_positive(option: str, value: float) -> None:
    p = FACTORIES["minimax"]()
    with pytest.raises(ValueError, match=f"{option} must be positive, got"):
        hessian_operator(p.problem, p.batch, **{option: value})
