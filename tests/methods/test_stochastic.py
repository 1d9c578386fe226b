"""StocBiO, BSA, TTSA and AmIGO against loops of ten lines; what they share with the methods of momentum.py."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods import noisy
from tests.methods.noisy import LOWER, SERIES, SIZES, UPPER, X0, Y0, close, d_f, feeds, g_y, run, second
from tests.problems import flat, quadratic_minimax
from torchbilevel import (
    BSA,
    CG,
    GD,
    MRBO,
    SUSTAIN,
    TTSA,
    VRBO,
    AmIGO,
    Decay,
    Implicit,
    LinearSolveWarning,
    Method,
    Neumann,
    RandomTruncation,
    SGDSolve,
    StocBiO,
    TorchOptim,
    sample,
)
from torchbilevel.projections import box

# --- step for step --------------------------------------------------------------------------------


@pytest.mark.parametrize(("resample", "shrink"), [(True, None), (True, 0.4), (False, None)])
@pytest.mark.parametrize("warm", [True, False])
def test_stocbio_step_for_step(warm: bool, resample: bool, shrink: float | None) -> None:
    data, twin = feeds(), feeds()
    linear = Neumann(steps=3, lr=0.4, resample=resample, shrink=shrink)
    method = StocBiO(noisy.problem(), 0.2, lower_solver=GD(0.3, 2), linear_solver=linear, warm_start=warm, **SIZES)
    xs, ys, _ = run(method, data, 8)
    lower, upper, x, y = twin["lower"], twin["upper"], X0, Y0
    for t in range(8):
        y = y if warm else Y0
        for _ in range(2):
            y = y - 0.3 * g_y(x, y, lower(4))
        f_x, f_y = d_f(x, y, upper(5))
        r = z = f_y
        # |B_{Q+1-j}| = B Q (1 - alpha mu)^(j-1), the factor B_Q, j = 1, next to f_y
        sizes = [3, 3, 3] if shrink is None else [math.ceil(3 * 3 * 0.6 ** (j - 1)) for j in (1, 2, 3)]
        batch = lower(sizes[0])
        for i in range(3):
            batch = lower(sizes[i]) if resample and i else batch
            r = r - 0.4 * second(x, y, r, batch)[1]
            z = z + r
        x = x - 0.2 * (f_x - second(x, y, 0.4 * z, lower(6))[0])
        close([xs[t]], [x])
        close([ys[t]], [y])
    assert twin["lower"].asked == data["lower"].asked and twin["upper"].asked == data["upper"].asked
    assert shrink is None or sizes == [9, 6, 4]


@pytest.mark.parametrize("decay", ["default", None])
@pytest.mark.parametrize(("kind", "steps", "powers"), [(BSA, 3, (1 / 2, 1 / 2)), (TTSA, 1, (3 / 5, 2 / 5))])
def test_bsa_and_ttsa_step_for_step(kind: Any, steps: int, powers: tuple[float, float], decay: Any) -> None:
    data, twin = feeds(), feeds()
    options = {} if decay == "default" else {"decay": decay}
    linear = RandomTruncation(steps=4, lr=0.4)
    method = kind(noisy.problem(), 0.1, lower_solver=GD(0.5, steps), linear_solver=linear, seed=3, **SIZES, **options)
    xs, ys, products = run(method, data, 12)
    assert set(products) == {0, 1, 2, 3}
    lower, upper, x, y = twin["lower"], twin["upper"], X0, Y0
    for t, p in enumerate(products):
        lr, lam = (c * (1 if decay is None else (1 + t) ** -power) for c, power in zip((0.1, 0.5), powers, strict=True))
        for _ in range(steps):
            y = y - lam * g_y(x, y, lower(4))
        f_x, r = d_f(x, y, upper(5))
        for _ in range(p):
            r = r - 0.4 * second(x, y, r, lower(3))[1]
        x = x - lr * (f_x - second(x, y, 4 * 0.4 * r, lower(6))[0])
        close([xs[t]], [x])
        close([ys[t]], [y])
    assert twin["lower"].asked == data["lower"].asked and twin["upper"].asked == data["upper"].asked


def test_amigo_step_for_step() -> None:
    data, twin = feeds(), feeds()
    method = AmIGO(noisy.problem(), 0.2, lower_solver=GD(0.3, 2), linear_solver=SGDSolve(3, 0.4), **SIZES)
    xs, ys, products = run(method, data, 8)
    lower, upper, x, y, z = twin["lower"], twin["upper"], X0, Y0, None
    for t in range(8):
        for _ in range(2):
            y = y - 0.3 * g_y(x, y, lower(4))
        f_x, f_y = d_f(x, y, upper(5))
        for _ in range(3):
            z = 0.4 * f_y if z is None else z - 0.4 * (second(x, y, z, lower(3))[1] - f_y)
        assert z is not None
        x = x - 0.2 * (f_x - second(x, y, z, lower(6))[0])
        close([xs[t]], [x])
        close([ys[t]], [y])
    assert twin["lower"].asked == data["lower"].asked and twin["upper"].asked == data["upper"].asked
    assert products == [2] + [3] * 7


# --- what the series estimate ---------------------------------------------------------------------


def terms(linear_solver: Any) -> list[Tensor]:
    """The terms z_i = lr (I - lr g_yy)^i f_y of the series at (X0, Y0) on all rows, and what they give: -g_xy z_i."""
    lr, f_y = linear_solver.lr, d_f(X0, Y0, UPPER)[1]
    step = torch.stack([e - lr * second(X0, Y0, e, LOWER)[1] for e in torch.eye(len(Y0), dtype=Y0.dtype)])
    powers = [torch.linalg.matrix_power(step, i) for i in range(linear_solver.steps + 1)]
    return [-second(X0, Y0, lr * power @ f_y, LOWER)[0] for power in powers]


def deviations(estimates: Tensor, mean: Tensor) -> Tensor:
    """By how many standard errors the averages of the rows miss ``mean``."""
    return ((estimates.mean(0) - mean) / (estimates.std(0) / len(estimates) ** 0.5)).abs()


def draws_of(linear_solver: Any, runs: int, **sizes: Any) -> tuple[Tensor, int]:
    """Independent hypergradients at (X0, Y0), on all rows where no size is given; the number of products."""
    problem = noisy.problem(runs)
    method = StocBiO(problem, 0.0, lower_solver=None, linear_solver=linear_solver, **sizes)  # type: ignore[arg-type]
    _, _, (products,) = run(method, feeds(runs), 1)
    (gradient,) = (p.grad for p in problem.upper_parameters)
    assert gradient is not None
    return gradient, products


ONE = dict.fromkeys(SIZES, 1)


def test_neumann_with_independent_factors_averages_to_the_closed_form() -> None:
    """Three coordinates, 20000 independent draws: 4.5 standard errors are exceeded once in 50000 trials."""
    series = Neumann(4, 0.7)
    expected = d_f(X0, Y0, UPPER)[0] + sum(terms(series))
    assert deviations(draws_of(series, 20_000, **ONE)[0], expected).max() < 4.5
    assert deviations(draws_of(series, 20_000, hvp_batch_size=1)[0], expected).max() < 4.5
    # One sample for all factors does not: E (I - alpha H)^i is not (I - alpha E H)^i.
    biased, _ = draws_of(Neumann(4, 0.7, resample=False), 20_000, hvp_batch_size=1)
    assert deviations(biased, expected).max() > 10


def test_random_truncation_averages_to_the_same() -> None:
    """Given p it averages to Q times term p, and p is uniform: so it averages to the sum of the first Q terms."""
    series, identity = RandomTruncation(4, 0.3), (torch.ones(1),)
    seen: set[int] = set()
    ps = [series.drawn(seed).solve(lambda s: s, identity).iterations for seed in range(4000)]
    assert all(abs(ps.count(p) - 1000) < 4.5 * (4000 * 1 / 4 * 3 / 4) ** 0.5 for p in range(4))
    f_x, each, seed = d_f(X0, Y0, UPPER)[0], terms(series), 0
    while len(seen) < 4:
        found, p = draws_of(series, 20_000, seed=seed, lower_batch_size=1)
        assert deviations(found, f_x + 4 * each[p]).max() < 4.5
        assert deviations(found, f_x + 4 * each[p + 1]).max() > 10
        seen, seed = seen | {p}, seed + 1


# --- all seven ------------------------------------------------------------------------------------

TRUNCATED = RandomTruncation(steps=4, lr=0.4)
MAKE: dict[str, Callable[..., Method]] = {
    "StocBiO": lambda p, **o: StocBiO(p, 0.3, lower_solver=GD(0.4, 3), linear_solver=SERIES, **SIZES, **o),
    "BSA": lambda p, **o: BSA(p, 0.5, lower_solver=GD(0.6, 3), linear_solver=TRUNCATED, **SIZES, **o),
    "TTSA": lambda p, **o: TTSA(p, 1.0, lower_solver=GD(0.6, 1), linear_solver=TRUNCATED, **SIZES, **o),
    "AmIGO": lambda p, **o: AmIGO(p, 0.3, lower_solver=GD(0.4, 3), linear_solver=SGDSolve(3, 0.4), **SIZES, **o),
    "MRBO": lambda p, **o: MRBO(p, 0.5, weight=0.6, lower_solver=GD(0.6, 1), linear_solver=SERIES, **SIZES, **o),
    "SUSTAIN": lambda p, **o: SUSTAIN(
        p, 0.5, weight=0.6, lower_solver=GD(0.6, 1), linear_solver=TRUNCATED, **SIZES, **o
    ),
    "VRBO": lambda p, **o: VRBO(
        p, 0.4, period=4, lower_solver=GD(0.6, 2), linear_solver=SERIES, anchor_size=30, **SIZES, **o
    ),
}


@pytest.mark.parametrize("name", MAKE)
def test_a_resumed_run_equals_an_uninterrupted_one(name: str) -> None:
    def start() -> tuple[Method, dict[str, Any]]:
        return MAKE[name](noisy.problem(), seed=5), {"lower": sample(LOWER, 1), "upper": sample(UPPER, 2)}

    method, data = start()
    run(method, data, 7)
    first, early = start()
    run(first, early, 3)
    parts = {
        "x": first.problem.upper.state_dict(),
        "method": first.state_dict(),
        "sources": {side: source.state_dict() for side, source in early.items()},
    }
    file = io.BytesIO()
    torch.save(parts, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second_half, late = start()
    second_half.problem.upper.load_state_dict(saved["x"])
    second_half.load_state_dict(saved["method"])
    for side, source in late.items():
        source.load_state_dict(saved["sources"][side])
    run(second_half, late, 4)
    assert torch.equal(flat(method.problem.x), flat(second_half.problem.x))
    assert torch.equal(flat(method.problem.y), flat(second_half.problem.y))
    assert method.estimator.counts == second_half.estimator.counts


@pytest.mark.parametrize("name", MAKE)
def test_phi_goes_down_under_noise(name: str) -> None:
    method = MAKE[name](noisy.problem())
    run(method, feeds(), 40)
    before, after = noisy.phi(X0), noisy.phi(flat(method.problem.x))
    assert after < before - 0.4  # Phi falls from 1.61 to 0.91 in its minimum nearby


# per step: gradients of g and f, products with g_yy and g_xy; in the first step
COSTS = {
    "StocBiO": ((3, 1, 3, 1), (3, 1, 3, 1)),
    "BSA": ((3, 1, None, 1), (3, 1, None, 1)),
    "TTSA": ((1, 1, None, 1), (1, 1, None, 1)),
    "AmIGO": ((3, 1, 3, 1), (3, 1, 2, 1)),
    "MRBO": ((2, 2, 6, 2), (1, 1, 3, 1)),
    "SUSTAIN": ((2, 2, None, 2), (1, 1, None, 1)),
    "VRBO": ((4, 4, 12, 4), (1, 1, 3, 1)),
}


@pytest.mark.parametrize("name", MAKE)
def test_a_step_costs_what_the_docstring_says(name: str) -> None:
    method, data = MAKE[name](noisy.problem()), feeds()
    counts = method.estimator.counts
    seen = [0, 0, 0, 0]
    for t in range(6):
        _, _, (products,) = run(method, data, 1)
        if COSTS[name][0][2] is None:
            products *= 2 if name == "SUSTAIN" and t else 1
        total = [counts.lower_gradients, counts.upper_gradients, counts.hessian_products, counts.jacobian_products]
        step = [a - b for a, b in zip(total, seen, strict=True)]
        seen = total
        expected = [products if c is None else c for c in COSTS[name][t == 0]]
        if name == "VRBO" and t == 4:  # an anchor
            expected = [a + b for a, b in zip(*COSTS[name], strict=True)]
        assert step == expected
    if name != "VRBO":
        assert counts.lower_gradient_samples == 4 * counts.lower_gradients
        assert counts.upper_gradient_samples == 5 * counts.upper_gradients
        assert counts.hessian_product_samples == 3 * counts.hessian_products
        assert counts.jacobian_product_samples == 6 * counts.jacobian_products


@pytest.mark.parametrize("name", MAKE)
def test_x_stays_in_its_set(name: str) -> None:
    problem = noisy.problem()
    problem = type(problem)(
        problem.upper,
        problem.lower,
        upper_loss=lambda upper, lower, batch: noisy.f(upper.flat(), lower.flat(), batch),
        lower_loss=lambda upper, lower, batch: noisy.g(upper.flat(), lower.flat(), batch),
        upper_projection=box(-1.0, 1.0),
    )
    xs, _, _ = run(MAKE[name](problem), feeds(), 20)
    assert max(float(x.abs().max()) for x in xs) == 1.0  # the minimum is outside


@pytest.mark.parametrize("name", MAKE)
def test_what_cannot_work_is_refused(name: str) -> None:
    method, before = MAKE[name](noisy.problem()), Y0
    with pytest.raises(ValueError, match=r"lower= got one batch \(tuple\), and .* or set reuse_batch=True"):
        method.backward(lower=LOWER, upper=UPPER)
    assert torch.equal(flat(method.problem.y), before)
    MAKE[name](noisy.problem(), reuse_batch=True).backward(lower=LOWER, upper=UPPER)
    with pytest.raises(ValueError, match="Implicit is for bilevel problems"):
        MAKE[name](quadratic_minimax().problem)
    kind: Any = type(method)
    extra = {"MRBO": {"weight": 0.5}, "SUSTAIN": {"weight": 0.5}, "VRBO": {"period": 2}}.get(name, {})
    with pytest.raises(ValueError, match="lr must be a non-negative, finite number, got -1"):
        kind(noisy.problem(), -1, lower_solver=GD(0.1, 1 + (name == "VRBO")), linear_solver=SERIES, **extra)
    with pytest.raises(TypeError, match="linear_solver must be a linear solver"):
        kind(noisy.problem(), 0.1, lower_solver=GD(0.1, 1 + (name == "VRBO")), linear_solver=0.1, **extra)
    with pytest.raises(ValueError, match=r"batch_size \(upper\) must be a positive integer or None, got 0"):
        kind(noisy.problem(), 0.1, lower_solver=GD(0.1, 2), linear_solver=SERIES, batch_size=0, **extra)


def test_a_decay_needs_a_step_to_scale() -> None:
    solver = TorchOptim(torch.optim.SGD, steps=1, lr=0.1)
    with pytest.raises(ValueError, match="decay= scales the lr of the lower solver: use GD"):
        TTSA(noisy.problem(), 0.1, lower_solver=solver, linear_solver=TRUNCATED)
    TTSA(noisy.problem(), 0.1, lower_solver=solver, linear_solver=TRUNCATED, decay=None)


# --- reductions -----------------------------------------------------------------------------------


def test_without_noise_stocbio_is_aid() -> None:
    """All rows in every sample: the independent draws are one, and so is the deterministic estimator with them."""
    lower, linear = GD(0.3, 2), Neumann(5, 0.4)
    stochastic = StocBiO(noisy.problem(), 0.2, lower_solver=lower, linear_solver=linear)
    xs, ys, _ = run(stochastic, feeds(), 10)
    problem = noisy.problem()
    plain = Implicit(lower, linear, warm_start_adjoint=False)
    method = Method(problem, plain, torch.optim.SGD(problem.upper_parameters, lr=0.2))
    expected_x, expected_y, _ = run(method, {"lower": LOWER, "upper": UPPER}, 10)
    close(xs, expected_x)
    close(ys, expected_y)


def test_bsa_and_ttsa_are_one_method_with_two_decays() -> None:
    decay = Decay(power=0.7, offset=5, lower_power=0.3)
    options: dict[str, Any] = {"lower_solver": GD(0.5, 1), "linear_solver": TRUNCATED, "decay": decay, **SIZES}
    runs = [run(kind(noisy.problem(), 0.2, **options), feeds(), 6)[0] for kind in (BSA, TTSA)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    options |= {"decay": None, "linear_solver": SERIES}
    constant = run(TTSA(noisy.problem(), 0.2, **options), feeds(), 6)[0]
    stocbio = StocBiO(noisy.problem(), 0.2, lower_solver=GD(0.5, 1), linear_solver=SERIES, **SIZES)
    close(run(stocbio, feeds(), 6)[0], constant)


def test_amigo_with_exact_solves_follows_the_gradient_of_phi() -> None:
    method = AmIGO(noisy.problem(), 0.3, lower_solver=GD(0.9, 300), linear_solver=CG(max_iter=10, tol=1e-14))
    xs, _, _ = run(method, feeds(), 6)
    x = X0
    for t in range(6):
        x = x - 0.3 * noisy.grad_phi(x)
        close([xs[t]], [x])


def test_amigo_tells_divergence_from_noise() -> None:
    """With lr < 2 / L the residual may rise, and no warning is given in any other test; with lr > 2 / mu it is one."""
    method = AmIGO(noisy.problem(), 0.1, lower_solver=GD(0.3, 1), linear_solver=SGDSolve(8, 4.5), **SIZES)
    with pytest.warns(LinearSolveWarning, match="the linear solve ended with diverged: its lr exceeds 2 / L"):
        method.backward(**feeds())
