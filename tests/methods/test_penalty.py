"""F2SA against a loop of ten lines; the penalty field against closed forms."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods import noisy
from tests.methods.noisy import LOWER, UPPER, X0, Y0, Rows, close, d_f, feeds, g_y
from tests.problems import assign, flat, quadratic_bilevel, quadratic_minimax, ridge_regression
from torchbilevel import F2SA, GD, BatchSizes, Decay, Method, Penalty, sample

XI, GAMMA, K, LAMBDA = 0.05, 0.4, 3, 6.0
SIZES: dict[str, Any] = {"batch_size": 5, "lower_batch_size": 4}


def run(method: Method, data: dict[str, Any], steps: int) -> None:
    for _ in range(steps):
        method.zero_grad()
        method.backward(**data)
        method.step()


def g_x(x: Tensor, y: Tensor, batch: Rows) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(noisy.g(x, y, batch), x)[0]


def p_of(method: Method) -> Tensor:
    return flat(method.estimator.memory.tracked["p"])


# --- step for step --------------------------------------------------------------------------------

DECAYS: dict[str, tuple[dict[str, Any], float, float]] = {
    "default": ({}, 5 / 7, 4 / 7),
    "without noise": ({"decay": Decay(1 / 3, lower_power=0.0)}, 1 / 3, 0.0),
    "None": ({"decay": None}, 0.0, 0.0),
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_f2sa_step_for_step(decay: str, shared: bool) -> None:
    """As the paper has it: z and y in the words of the paper, gamma_k, alpha_k = gamma_k / lambda_k, xi alpha_k."""
    options, a, c = DECAYS[decay]
    data, twin = feeds(), feeds()
    method = F2SA(noisy.problem(), XI, multiplier=LAMBDA, lower_solver=GD(GAMMA, K), shared=shared, **SIZES, **options)
    xi = XI * LAMBDA / GAMMA
    x, z, y = X0, Y0, Y0
    for k in range(6):
        gamma, alpha = GAMMA * (1 + k) ** -c, GAMMA / LAMBDA * (1 + k) ** -a
        lam = gamma / alpha
        phi_z = [twin["lower"](4) for _ in range(K)]
        for t in range(K):
            z = z - gamma * g_y(x, z, phi_z[t])
        for t in range(K):
            phi_y = phi_z[t] if shared else twin["lower"](4)
            y = y - alpha * (d_f(x, y, twin["upper"](5))[1] + lam * g_y(x, y, phi_y))
        zeta, phi_xy = twin["upper"](5), twin["lower"](4)
        phi_xz = phi_xy if shared else twin["lower"](4)
        h = d_f(x, y, zeta)[0] + lam * (g_x(x, y, phi_xy) - g_x(x, z, phi_xz))
        run(method, data, 1)
        x = x - xi * alpha * h
        close([flat(method.problem.x)], [x])
        close([flat(method.problem.y), p_of(method)], [z, y])
        assert method.estimator.last is not None
        close([method.estimator.last.value], [noisy.f(x + xi * alpha * h, z, zeta)])
    assert twin["lower"].asked == data["lower"].asked and twin["upper"].asked == data["upper"].asked


# --- the field ------------------------------------------------------------------------------------


def penalty_of(case: Any, multiplier: float, lr: float = 0.3) -> tuple[Penalty, Tensor]:
    """The field with y and p solved for."""
    problem = type(case.problem)(*case.modules(), upper_loss=case.upper_loss, lower_loss=case.lower_loss)
    estimator = Penalty(GD(lr, 4000, tol=1e-13), multiplier=multiplier)
    estimator.bind(problem)
    estimator.backward(lower=case.lower_batch, upper=case.upper_batch)
    return estimator, flat(p.grad for p in problem.upper_parameters)


@pytest.mark.parametrize("multiplier", [3.0, 40.0])
def test_the_field_in_closed_form(multiplier: float) -> None:
    """g = 1/2 y'H y - y'(B x + c) and f = 1/2 |y - t|^2 + ..., so that p solves (lambda H + I) p = lambda (B x + c) +
    t - C'x; and g_x = -B'y."""
    case = quadratic_bilevel()
    estimator, v = penalty_of(case, multiplier, lr=1.2)
    r, x, t = case.response, case.x0, case.upper_batch[0].mean(0)
    right = multiplier * (r.B @ x + r.c) + t - case.C.T @ x
    p = torch.linalg.solve(multiplier * r.H + torch.eye(6, dtype=x.dtype), right)
    y = case.y_star(x)
    expected = case.R @ x + case.C @ p - multiplier * r.B.T @ (p - y)
    torch.testing.assert_close(v, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(flat(estimator.problem.y), y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(flat(estimator.memory.tracked["p"]), p, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", [quadratic_bilevel(curved=True), ridge_regression()], ids=["curved", "ridge"])
def test_the_error_is_of_the_order_of_one_over_lambda(case: Any) -> None:
    exact = case.grad_phi(case.x0)
    first, second, third = (float((penalty_of(case, m)[1] - exact).norm()) * m for m in (1e2, 1e3, 1e4))
    assert first > 0.01 * exact.norm()
    assert abs(second / first - 1) < 0.1 and abs(third / second - 1) < 0.01


def test_shared_samples_keep_lambda_from_multiplying_the_noise() -> None:
    """At fixed x, y and p, over 40 draws: the noise of v grows like lambda, or not at all."""
    spread = {}
    for shared in (False, True):
        for multiplier in (10.0, 1000.0):
            estimator = Penalty(GD(1e-9, 1), multiplier=multiplier, shared=shared, batch_sizes=BatchSizes(5, 4))
            estimator.bind(noisy.problem())
            found, data = [], feeds()
            for _ in range(40):
                estimator.problem.upper.zero_grad()
                assign(estimator.problem.lower, noisy.y_star(X0))
                offset = torch.full_like(Y0, 1.0 / multiplier)  # p - y*(x) is of that order
                tracked = {"p": tuple(t + offset[0] for t in estimator.problem.y)}
                memory = estimator.memory
                estimator.memory = type(memory)(memory.calls, None, None, tracked)
                estimator.backward(**data)
                found.append(flat(p.grad for p in estimator.problem.upper_parameters).clone())
            spread[shared, multiplier] = float(torch.stack(found).std(0).norm())
    assert 30 < spread[False, 1000.0] / spread[False, 10.0] < 300
    assert 0.5 < spread[True, 1000.0] / spread[True, 10.0] < 2


def test_lambda_grows_with_the_decay() -> None:
    grown = Penalty(GD(0.1, 1), multiplier=2.0, decay=Decay(5 / 7, lower_power=4 / 7))
    assert [grown.multiplier_at(t) for t in (0, 1, 127)] == pytest.approx([2.0, 2.0 * 2 ** (1 / 7), 4.0])
    assert Penalty(GD(0.1, 1), multiplier=2.0).multiplier_at(127) == 2.0


# --- around ---------------------------------------------------------------------------------------


def test_a_resumed_run_equals_an_uninterrupted_one() -> None:
    def begin() -> tuple[Method, dict[str, Any]]:
        method = F2SA(noisy.problem(), XI, multiplier=LAMBDA, lower_solver=GD(GAMMA, K), seed=5, **SIZES)
        return method, {"lower": sample(LOWER, 1), "upper": sample(UPPER, 2)}

    method, data = begin()
    run(method, data, 7)
    first, early = begin()
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
    late, sources = begin()
    late.problem.upper.load_state_dict(saved["x"])
    late.load_state_dict(saved["method"])
    for side, source in sources.items():
        source.load_state_dict(saved["sources"][side])
    run(late, sources, 4)
    assert torch.equal(flat(method.problem.x), flat(late.problem.x))
    assert torch.equal(flat(method.problem.y), flat(late.problem.y)) and torch.equal(p_of(method), p_of(late))
    assert method.estimator.counts == late.estimator.counts


def test_costs() -> None:
    method, data = F2SA(noisy.problem(), XI, multiplier=LAMBDA, lower_solver=GD(GAMMA, K), **SIZES), feeds()
    run(method, data, 3)
    counts = method.estimator.counts
    assert (counts.lower_gradients, counts.upper_gradients, counts.upper_values) == (3 * (2 * K + 2), 3 * (K + 1), 3)
    assert counts.hessian_products == counts.jacobian_products == 0
    assert counts.lower_gradient_samples == 4 * counts.lower_gradients
    assert counts.upper_gradient_samples == 5 * counts.upper_gradients


def test_a_probe_replays_the_last_backward() -> None:
    method, data = F2SA(noisy.problem(), XI, multiplier=LAMBDA, lower_solver=GD(GAMMA, K), **SIZES), feeds()
    method.estimator.keeps_past = True
    run(method, data, 2)
    method.zero_grad()
    value = method.backward(**data)
    v, x, p, drawn = (
        flat(t.grad.clone() for t in method.problem.upper_parameters),
        flat(method.problem.x),
        p_of(method),
        list(data["lower"].asked),
    )
    probe = method.estimator.probe()
    assign(method.problem.upper, x + 0.1)
    assert probe() != value
    assign(method.problem.upper, x)
    assert torch.equal(probe(), value) and torch.equal(probe.value(), value)
    assert torch.equal(flat(t.grad for t in method.problem.upper_parameters), v)
    assert torch.equal(p_of(method), p) and data["lower"].asked == drawn


def test_p_does_not_move_with_y() -> None:
    """A solver that stops at once leaves p where y is, but in storage of its own."""
    estimator = Penalty(GD(0.1, 1, tol=1e9), multiplier=2.0)
    estimator.bind(noisy.problem())
    estimator.backward(lower=LOWER, upper=UPPER)
    assign(estimator.problem.lower, Y0 + 1)
    assert torch.equal(flat(estimator.memory.tracked["p"]), Y0)


@pytest.mark.parametrize("shared", [False, True])
def test_phi_goes_down_under_noise(shared: bool) -> None:
    solver = GD(0.2, 3)
    method = F2SA(
        noisy.problem(), 0.1, multiplier=3.0, lower_solver=solver, shared=shared, batch_size=10, lower_batch_size=40,
        decay=None,
    )  # fmt: skip
    run(method, feeds(), 100)
    assert noisy.phi(flat(method.problem.x)) < noisy.phi(X0) - 0.4


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="plain steps: use GD"):
        Penalty(GD(0.1, 1, momentum=0.9), multiplier=1.0)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="multiplier must be positive"):
            Penalty(GD(0.1, 1), multiplier=bad)
    with pytest.raises(TypeError, match="shared must be True or False, got 'yes'"):
        Penalty(GD(0.1, 1), multiplier=1.0, shared="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs no penalty"):
        Penalty(GD(0.1, 1), multiplier=1.0).bind(quadratic_minimax().problem)
    with pytest.raises(ValueError, match="several independent ones"):
        F2SA(noisy.problem(), XI, multiplier=1.0, lower_solver=GD(GAMMA, 1)).backward(lower=LOWER, upper=UPPER)


def test_a_p_that_diverges_is_refused_before_anything_changes() -> None:
    """The step suits g but not g + f / lambda."""
    estimator = Penalty(GD(0.4, 2000), multiplier=0.01).bind(noisy.problem())
    with pytest.raises(FloatingPointError, match="a larger multiplier may help"):
        estimator.backward(lower=LOWER, upper=UPPER)
    assert estimator.memory.calls == 0 and torch.equal(flat(estimator.problem.y), Y0)


def test_losses_without_x_are_refused() -> None:
    problem = noisy.problem()
    problem = type(problem)(
        problem.upper,
        problem.lower,
        upper_loss=lambda upper, lower, batch: noisy.f(X0, lower.flat(), batch),
        lower_loss=lambda upper, lower, batch: noisy.g(X0, lower.flat(), batch),
    )
    estimator = Penalty(GD(0.1, 1), multiplier=1.0).bind(problem)
    with pytest.raises(ValueError, match="zero in silence"):
        estimator.backward(lower=LOWER, upper=UPPER)
