"""Projections against their optimality conditions and against scipy, then what optimisers need of them."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from torchbilevel import projections as P


def points(*shape: int, seed: int = 0) -> Tensor:
    """Points inside and outside of all sets below."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-2, 1, shape[0], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
    return scale * torch.randn(*shape, generator=g, dtype=torch.float64)


LOW = torch.tensor([-1.0, -math.inf, 0.2, -0.5], dtype=torch.float64)
HIGH = torch.tensor([0.5, 0.3, 0.2, math.inf], dtype=torch.float64)

# name -> (projection, one set per row of four numbers, constraints of that set for scipy)
CASES = {
    "box": (P.box(-0.3, 0.8), {"bounds": [(-0.3, 0.8)] * 4}),
    "box of tensors": (P.box(LOW, HIGH), {"bounds": list(zip(LOW.tolist(), HIGH.tolist(), strict=True))}),
    "linf_ball": (P.linf_ball(0.4), {"bounds": [(-0.4, 0.4)] * 4}),
    "l2_ball": (
        P.l2_ball(0.7, dims=-1),
        {"constraints": {"type": "ineq", "fun": lambda s: 0.49 - s @ s, "jac": lambda s: -2 * s}},
    ),
    "simplex": (
        P.simplex(),
        {"bounds": [(0, None)] * 4, "constraints": {"type": "eq", "fun": lambda s: s.sum() - 1}},
    ),
    "scaled simplex": (
        P.simplex(2.5),
        {"bounds": [(0, None)] * 4, "constraints": {"type": "eq", "fun": lambda s: s.sum() - 2.5}},
    ),
}


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest):
    return CASES[request.param]


def test_nearest_point_by_scipy(case) -> None:
    project, constraints = case
    t = points(8, 4)
    for row, got in zip(t.numpy(), project(t).numpy(), strict=True):
        best = minimize(
            lambda s, row=row: 0.5 * ((s - row) ** 2).sum(),
            got * 0 + 0.25,
            jac=lambda s, row=row: s - row,
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
            **constraints,
        )
        assert abs(got - best.x).max() < 1e-6


def test_obtuse_angle_with_every_point_of_the_set(case) -> None:
    # p = P(t) exactly if <t - p, q - p> <= 0 for all q of the set; the q are projections of other points.
    project, _ = case
    t, q = points(20, 4), project(points(50, 4, seed=1))
    p = project(t)
    inner = torch.einsum("id,ijd->ij", t - p, q[None] - p[:, None])
    assert inner.max() < 1e-12


def test_idempotent(case) -> None:
    project, _ = case
    p = project(points(20, 4))
    torch.testing.assert_close(project(p), p, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept_and_half_precision_is_computed_in_float32(case, dtype: torch.dtype) -> None:
    project, _ = case
    t = points(8, 4).to(dtype)
    assert project(t).dtype == dtype
    tolerance = {torch.float64: 0.0, torch.float32: 1e-6}.get(dtype, 2.0**-7)
    torch.testing.assert_close(project(t).double(), project(t.double()), rtol=tolerance, atol=tolerance)


def test_pickles(case) -> None:
    project, _ = case
    t = points(8, 4)
    assert torch.equal(pickle.loads(pickle.dumps(project))(t), project(t))


def test_derivative_is_the_projection_on_the_active_face() -> None:
    g = torch.Generator().manual_seed(2)
    t = torch.randn(6, generator=g, dtype=torch.float64)

    # Simplex: on the support K = I - 1 1' / |K|, zero elsewhere.
    free = (P.simplex()(t) > 0).double()
    assert 1 < free.sum() < 6
    want = torch.diag(free) - torch.outer(free, free) / free.sum()
    torch.testing.assert_close(torch.autograd.functional.jacobian(P.simplex(), t), want)

    # Ball: r (I - u u') / |t| outside, I inside.
    u = t / t.norm()
    eye = torch.eye(6, dtype=torch.float64)
    want = 0.5 * (eye - torch.outer(u, u)) / t.norm()
    torch.testing.assert_close(torch.autograd.functional.jacobian(P.l2_ball(0.5), t), want)
    torch.testing.assert_close(torch.autograd.functional.jacobian(P.l2_ball(50.0), t), eye)

    # Box: the entries strictly inside.
    inside = (t.abs() < 0.5).double()
    torch.testing.assert_close(torch.autograd.functional.jacobian(P.linf_ball(0.5), t), torch.diag(inside))


@pytest.mark.parametrize(
    "t", [torch.zeros(3), torch.full((3,), 1 / 3), torch.tensor([0.0, 0.0, 1.0]), torch.full((3,), 1e6)]
)
def test_derivatives_are_finite_at_special_points(case, t: Tensor) -> None:
    project, _ = case
    t = torch.cat((t.double(), t.new_zeros(1))).requires_grad_()
    (first,) = torch.autograd.grad(project(t).square().sum(), t, create_graph=True)
    assert first.isfinite().all()
    if first.requires_grad:
        assert torch.autograd.grad(first.sum(), t)[0].isfinite().all()


def test_l2_ball_over_chosen_dimensions() -> None:
    t = points(3, 2, 4)
    each = P.l2_ball(0.5, dims=(1, 2))(t)
    for one, whole in zip(each, t, strict=True):
        torch.testing.assert_close(one, whole * min(1.0, 0.5 / whole.norm().item()))
    torch.testing.assert_close(P.l2_ball(0.5)(t), t * (0.5 / t.norm()))


def test_zero_dimensional_tensors() -> None:
    t = torch.tensor(-3.0, dtype=torch.float64)
    assert P.l2_ball(2.0)(t).item() == P.linf_ball(2.0)(t).item() == P.box(-2.0, 1.0)(t).item() == -2.0
    with pytest.raises(ValueError, match="no dimension"):
        P.simplex()(t)


def test_points_on_the_set_are_left_alone_bitwise() -> None:
    inside = torch.tensor([0.1, -0.2, 0.3])
    for project in (P.box(-1.0, 1.0), P.linf_ball(1.0), P.l2_ball(1.0)):
        assert torch.equal(project(inside), inside)


def test_simplex_far_away_keeps_its_digits() -> None:
    # Subtracting a threshold from entries of size 1e20 would cancel all digits of the result.
    t = torch.tensor([1e20, 1e20, 0.0])
    torch.testing.assert_close(P.simplex()(t), torch.tensor([0.5, 0.5, 0.0]))
    torch.testing.assert_close(P.simplex()(t.new_tensor([1e6, 1e6 + 0.5])), torch.tensor([0.25, 0.75]))


def test_simplex_of_many_entries_in_half_precision() -> None:
    # bfloat16 has no integers between 256 and 258, so ranks and sums must not be formed in it.
    t = torch.linspace(0, 0.01, 602).bfloat16()
    torch.testing.assert_close(P.simplex()(t), P.simplex()(t.double()).bfloat16())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_entries_come_out_and_do_not_crash(bad: float) -> None:
    # An index error here (a device assertion on a GPU) would hide that a step size was too large.
    for project in (P.simplex(), P.l2_ball(1.0)):
        assert not project(torch.tensor([0.0, bad, 1.0])).isfinite().all()


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("make", [P.l2_ball, P.linf_ball, P.simplex])
def test_bad_radius_is_refused(make, value: float) -> None:
    with pytest.raises(ValueError, match=r"(radius|total) must be positive and finite, got"):
        make(value)


def test_box_upside_down_is_refused() -> None:
    with pytest.raises(ValueError, match="low must not exceed high"):
        P.box(torch.tensor([0.0, 1.0]), 0.5)
    with pytest.raises(ValueError, match="low must not exceed high"):
        P.box(math.nan, 1.0)
