"""Hybrid variance-reduced methods against hand-written loops, and where their answer is known."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.problems import Split, assign, flat, generator, quadratic_minimax
from torchbilevel import (
    GD,
    Danskin,
    HybridGDA,
    HybridVRSGD,
    Method,
    MinimaxProblem,
    NonconvexLinearProblem,
    certify,
    projections,
    sample,
)
from torchbilevel.optim import NEON

DX, P, Q, LR = 3, 5, 4, 0.1
Batch = tuple[Tensor, ...]


def H(x: Tensor, batch: Batch) -> Tensor:
    w, s = batch
    return (torch.einsum("kpi,i->kp", w, x).tanh() + s * x[0]).mean(0)


def rows(seed: int = 1, n: int = 10) -> Batch:
    normal = generator(seed)
    return normal(n, P, DX), normal(n, P)


def mapping(upper: Split, batch: Batch) -> Tensor:
    return H(upper.flat(), batch)


A = generator(3)(P, Q)
CENTER = torch.full((Q,), 1 / Q, dtype=torch.float64)


def problem(**options: Any) -> NonconvexLinearProblem:
    x0 = torch.tensor([0.4, -0.3, 0.7], dtype=torch.float64)
    defaults = {"center": CENTER, "curvature": 2.0, "matrix": A, "projection": projections.simplex()}
    return NonconvexLinearProblem(Split(x0, ((2,), ())), mapping, **{**defaults, **options})


def to_simplex(t: Tensor) -> Tensor:
    ordered = t.sort(descending=True).values
    sizes = torch.arange(1, len(t) + 1, dtype=t.dtype)
    return (t - ((ordered.cumsum(0) - 1) / sizes).max()).clamp(min=0)


def response(h: Tensor) -> Tensor:
    return to_simplex(CENTER + A.T @ h / 2)


class Recorder:
    """A source of random rows that keeps what it gave."""

    def __init__(self, batch: Any, seed: int) -> None:
        self.source, self.given = sample(batch, seed), []

    def __call__(self, n: int | None) -> Any:
        self.given.append(self.source(n))
        return self.given[-1]


def run(method: Method, steps: int, batch: Any) -> Tensor:
    """(x, v, y) after each step, one row each."""
    path = []
    for _ in range(steps):
        method.zero_grad()
        method.backward(batch)
        v = flat(p.grad for p in method.problem.upper_parameters)
        method.step()
        path.append(torch.cat([flat(method.problem.x), v, flat(method.problem.y)]))
    return torch.stack(path)


def jacobian(x: Tensor, batch: Batch) -> Tensor:
    return torch.autograd.functional.jacobian(lambda x: H(x, batch), x)


def loop(
    x: Tensor, given: Iterator[Batch], steps: int, a: float, b: float, theta: float, project: Callable[[Tensor], Tensor]
) -> Tensor:
    h = J = x_old = torch.empty(0)
    path = []
    for t in range(steps):
        if t == 0:
            h, J = H(x, next(given)), jacobian(x, next(given))
        else:
            fresh, fresh_J = H(x, next(given)), jacobian(x, next(given))
            if a < 1:
                S = next(given)
                h = (1 - a) * (h + H(x, S) - H(x_old, S)) + a * fresh
            else:
                h = fresh
            S = next(given)
            J = (1 - b) * (J + jacobian(x, S) - jacobian(x_old, S)) + b * fresh_J
        y = response(h)
        v = J.T @ A @ y
        x_old, x = x, (1 - theta) * x + theta * project(x - LR * v)
        path.append(torch.cat([x, v, y]))
    return torch.stack(path)


def hybrid(q: NonconvexLinearProblem, weight: float = 0.3, **options: Any) -> HybridVRSGD:
    return HybridVRSGD(q, LR, weight=weight, **{"batch_size": 2, "jvp_batch_size": 3, "anchor_size": 6, **options})


@pytest.mark.parametrize(("a", "b", "theta"), [(0.3, 0.3, 1.0), (0.2, 0.5, 0.6), (1.0, 0.5, 0.6)])
@pytest.mark.parametrize("bounded", [False, True])
def test_is_its_loop(a: float, b: float, theta: float, bounded: bool) -> None:
    box = projections.box(-0.45, 0.6)
    q = problem(upper_projection=box) if bounded else problem()
    if bounded:
        assign(q.upper, flat(q.x).clamp(-0.45, 0.6))
    x, source = flat(q.x), Recorder(rows(), 1)
    path = run(hybrid(q, a, jacobian_weight=None if a == b else b, averaging=theta), 7, source)
    sizes = [len(s[1]) for s in source.given]
    assert sizes == [6, 6] + ([2, 3, 2, 3] if a < 1 else [2, 3, 3]) * 6
    project = box if bounded else (lambda t: t)
    expected = loop(x, iter(source.given), 7, a, b, theta, project)
    torch.testing.assert_close(path, expected, rtol=1e-12, atol=1e-13)
    assert bounded == bool((path[:, :DX].abs() == 0.45).any() or (path[:, :DX] == 0.6).any()) or theta < 1


@pytest.mark.parametrize("weight", [0.2, 1.0])
def test_without_noise_it_is_gradient_descent_on_phi(weight: float) -> None:
    q, batch = problem(), rows()
    x = flat(q.x)
    method = hybrid(q, weight, reuse_batch=True)
    for _ in range(4):
        leaf = x.clone().requires_grad_()
        h = H(leaf, batch)
        y = response(h.detach())
        phi = y @ (A.T @ h) - (y - CENTER).square().sum()
        (v,) = torch.autograd.grad(phi, leaf)
        torch.testing.assert_close(run(method, 1, batch)[0], torch.cat([x - LR * v, v, y]), rtol=1e-12, atol=1e-13)
        assert method.estimator.last is not None
        torch.testing.assert_close(method.estimator.last.value, phi.detach(), rtol=1e-12, atol=1e-13)
        x = x - LR * v


def test_refresh_brings_y_to_the_best_response_on_all_data() -> None:
    method = hybrid(problem())
    run(method, 3, sample(rows(), 1))
    method.refresh()
    q = method.problem
    torch.testing.assert_close(flat(q.y), response(H(flat(q.x), rows())), rtol=1e-12, atol=1e-13)


def test_the_general_minimax_methods_agree() -> None:
    """y in closed form is what ascent converges to, so Danskin and the certificate see the same problem."""
    q, twin, batch = problem(), problem(), rows()
    v = run(hybrid(q, reuse_batch=True), 1, batch)[0, DX : 2 * DX]
    Danskin(GD(lr=0.3, steps=200)).bind(twin).backward(batch)
    torch.testing.assert_close(flat(p.grad for p in twin.upper_parameters), v, rtol=1e-10, atol=1e-11)
    certificate = certify(twin, batch, grad_tol=1e-3, curvature_tol=1e-2)
    assert abs(certificate.grad_norm - v.norm()) < 1e-6


def test_a_search_sees_the_curvature_of_phi() -> None:
    """y is the best response at trial points too, so that differences of v there are those of grad Phi."""
    q, batch, w = problem(projection=None), rows(), 1e-5 * torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    options = {"radius": 1e-3, "probe_lr": 0.2, "grad_tol": 9.0, "curvature_tol": 0.1, "step_length": 0.1}
    estimator = hybrid(q, reuse_batch=True).estimator
    Method(q, estimator, NEON(q.upper_parameters, 0.02, search_steps=3, **options)).backward(batch)
    probe, x = estimator.probe(), flat(q.x)
    probe()
    v = flat(p.grad.clone() for p in q.upper_parameters)
    assign(q.upper, x + w)
    probe()
    change = flat(p.grad for p in q.upper_parameters) - v

    def phi(x: Tensor) -> Tensor:
        s = A.T @ H(x, batch)
        return CENTER @ s + s @ s / 4

    torch.testing.assert_close(change, torch.autograd.functional.hessian(phi, x) @ w, rtol=1e-4, atol=1e-10)


def log_sum_exp(y: Tensor) -> Tensor:
    return (y * y.clamp(min=1e-300).log()).sum()


def test_another_psi() -> None:
    """The entropy on the simplex: Phi is the log of the sum of the exponentials of A'h."""
    q, batch = problem(argmax=partial(torch.softmax, dim=0), psi=log_sum_exp), rows()
    x = flat(q.x).requires_grad_()
    phi = (A.T @ H(x, batch)).exp().sum().log()
    (v,) = torch.autograd.grad(phi, x)
    method = hybrid(q, reuse_batch=True)
    torch.testing.assert_close(run(method, 1, batch)[0, DX : 2 * DX], v, rtol=1e-12, atol=1e-13)
    assert method.estimator.last is not None
    torch.testing.assert_close(method.estimator.last.value, phi.detach(), rtol=1e-12, atol=1e-13)


# --- robust matrix sensing ------------------------------------------------------------------------


class Factor(nn.Module):
    def __init__(self, u: Tensor) -> None:
        super().__init__()
        self.u = nn.Parameter(u)


N = 20


def sparse_losses(upper: Factor, batch: Batch) -> tuple[Tensor, Tensor]:
    i, a, b = batch
    return i, N / len(i) * 0.5 * (torch.einsum("kij,ir,jr->k", a, upper.u, upper.u) - b).square()


def dense_losses(upper: Factor, batch: Batch) -> Tensor:
    i, values = sparse_losses(upper, batch)
    return values.new_zeros(N).index_add(0, i, values)


def sensing(losses: Any) -> tuple[NonconvexLinearProblem, Batch]:
    normal, d, rank = generator(2), 4, 2
    truth, a = normal(d, rank) / 2, normal(N, d, d)
    batch = torch.arange(N), a, torch.einsum("kij,ir,jr->k", a, truth, truth)
    center = torch.full((N,), 1 / N, dtype=torch.float64)
    start = 0.3 * normal(d, rank)
    return NonconvexLinearProblem(Factor(start), losses, center=center, projection=projections.simplex()), batch


def test_rows_and_values_are_the_dense_map_with_fewer_products() -> None:
    paths = []
    for losses in (sparse_losses, dense_losses):
        q, batch = sensing(losses)
        method = HybridVRSGD(q, 0.01, weight=0.2, batch_size=4)
        paths.append(run(method, 6, sample(batch, 3)))
    torch.testing.assert_close(paths[0], paths[1], rtol=1e-12, atol=1e-13)
    (x_old,) = q.x
    h = 0.5 * (torch.einsum("kij,ir,jr->k", batch[1], x_old, x_old) - batch[2]).square()
    value, y = q.upper_value(q.x, q.y, batch, 0), q.y[0]
    torch.testing.assert_close(value, y @ h - 0.5 * (y - 1 / N).square().sum(), rtol=1e-12, atol=0.0)


def test_robust_sensing_goes_down_under_noise() -> None:
    q, batch = sensing(sparse_losses)

    def phi() -> float:
        h = q.map_value(q.x, batch, 0)[1].detach()
        y = to_simplex(1 / N + h)
        return float(y @ h - 0.5 * (y - 1 / N).square().sum())

    start = phi()
    run(HybridVRSGD(q, 0.01, weight=0.1, batch_size=8, anchor_size=N), 100, sample(batch, 3))
    assert phi() < 0.5 * start


# --- bookkeeping ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "times"), [(0.5, 3), (1.0, 1)])
def test_costs_what_it_says(weight: float, times: int) -> None:
    method, source = hybrid(problem(), weight), sample(rows(), 1)
    run(method, 1, source)
    counts = method.estimator.counts
    assert (counts.upper_values, counts.upper_gradients) == (1, 1)
    assert (counts.upper_value_samples, counts.upper_gradient_samples) == (6, 6)
    run(method, 1, source)
    assert (counts.upper_values, counts.upper_gradients) == (1 + times, 1 + times)
    assert (counts.upper_value_samples, counts.upper_gradient_samples) == (6 + 2 * times, 6 + 3 * times)


def gda(q: Any, weight: float = 0.3, **options: Any) -> HybridGDA:
    return HybridGDA(q, LR, weight=weight, lower_solver=GD(0.2, 1), **{"batch_size": 2, **options})


def general() -> MinimaxProblem:
    return quadratic_minimax().problem


MAKE: dict[str, tuple[Callable[..., Method], Callable[[], Any], Any]] = {
    "HybridVRSGD": (hybrid, problem, rows()),
    "HybridGDA": (gda, general, quadratic_minimax().batch),
}


@pytest.mark.parametrize("name", MAKE)
def test_resumed_equals_uninterrupted(name: str) -> None:
    make, new, batch = MAKE[name]
    whole = make(new())
    run(whole, 4, sample(batch, 1))
    buffer = io.BytesIO()
    torch.save([whole.state_dict(), whole.problem.upper.state_dict()], buffer)
    expected = run(whole, 4, sample(batch, 2))
    buffer.seek(0)
    state, upper = torch.load(buffer, weights_only=True)
    resumed = make(new())
    resumed.problem.upper.load_state_dict(upper)
    resumed.load_state_dict(state)
    assert torch.equal(run(resumed, 4, sample(batch, 2)), expected)


@pytest.mark.parametrize("name", MAKE)
def test_a_probe_repeats_and_commits_nothing(name: str) -> None:
    make, new, batch = MAKE[name]
    method, source = make(new()), sample(batch, 1)
    method.estimator.keeps_past = True
    run(method, 3, source)
    method.zero_grad()
    loss = method.backward(source)
    v = flat(p.grad for p in method.problem.upper_parameters)
    before = str(method.estimator.state_dict()["tracked"])
    for probe in (method.estimator.probe(), copy.deepcopy(method).estimator.probe()):
        q = probe._estimator.problem
        x = flat(q.x)
        assign(q.upper, x + 0.1)
        assert probe() == probe.value() != loss
        assign(q.upper, x)
        assert probe() == loss
        assert torch.equal(flat(p.grad for p in q.upper_parameters), v)
    assert str(method.estimator.state_dict()["tracked"]) == before


def test_copies_are_independent_and_capture_is_refused() -> None:
    q = problem()
    twin = copy.deepcopy(q)
    assert twin.lower.value is not q.lower.value and twin.linear is twin._losses["loss"] is not q.linear
    lower = problem()
    lower._projections["projection"] = {"value": lambda t: t.clamp(max=float(lower.upper.p1))}
    with pytest.raises(ValueError, match="projection.* captures 'lower'"):
        copy.deepcopy(lower)
    with pytest.raises(ValueError, match="map captures 'upper'"):
        upper = q.upper
        copy.deepcopy(NonconvexLinearProblem(upper, lambda u, batch: H(upper.flat(), batch), center=CENTER, matrix=A))


@pytest.mark.parametrize("theta", [1.0, 0.5])
def test_the_generic_method_is_its_loop(theta: float) -> None:
    q = quadratic_minimax()
    source, loss = Recorder(q.batch, 4), q.loss
    upper, lower = q.modules()

    def gradients(x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        assign(upper, x)
        assign(lower, y)
        parameters = (*upper.parameters(), *lower.parameters())
        found = torch.autograd.grad(loss(upper, lower, batch), parameters)
        n = len(list(upper.parameters()))
        return flat(found[:n]), flat(found[n:])

    path = run(gda(q.problem, 0.3, lower_weight=0.6, averaging=theta, anchor_size=5), 6, source)
    assert [len(s[0]) for s in source.given] == [5] + [2, 2] * 5
    given, rows = iter(source.given), []
    x, y, x_old, y_old, v, u = q.x0, q.y0, *[torch.empty(0)] * 4
    for t in range(6):
        if t == 0:
            v, u = gradients(x, y, next(given))
        else:
            S, fresh = next(given), next(given)
            (n_x, n_y), (o_x, o_y) = gradients(x, y, S), gradients(x_old, y_old, S)
            f_x, f_y = gradients(x, y, fresh)
            v, u = 0.7 * (v + n_x - o_x) + 0.3 * f_x, 0.4 * (u + n_y - o_y) + 0.6 * f_y
        x_old, y_old = x, y
        x, y = x - theta * LR * v, y + 0.2 * u
        rows.append(torch.cat([x, v, y]))
    torch.testing.assert_close(path, torch.stack(rows), rtol=1e-12, atol=1e-13)


def test_refusals() -> None:
    for bad, match in (
        ({"weight": 0.0}, r"weight must be in \(0, 1\], got 0.0"),
        ({"weight": None}, r"weight must be in \(0, 1\], got None"),
        ({"jacobian_weight": 1.5}, r"jacobian_weight must be in \(0, 1\], got 1.5"),
        ({"averaging": 0.0}, r"averaging must be in \(0, 1\], got 0.0"),
        ({"max_size": 3}, r"5 x 3 entries, more than max_size\^2 with max_size=3"),
    ):
        with pytest.raises(ValueError, match=match):
            hybrid(problem(), **bad)
    hybrid(problem(), max_size=4)
    with pytest.raises(ValueError, match="HybridGDA takes any"):
        hybrid(general())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="this method draws several independent ones"):
        hybrid(problem()).backward(rows())
    with pytest.raises(ValueError, match="no path leads from the losses"):
        constant = problem()
        constant.linear.map = lambda upper, batch: batch[1].mean(0)
        hybrid(constant).backward(sample(rows(), 1))


def test_refusals_of_the_problem() -> None:
    new = partial(NonconvexLinearProblem, Split(torch.ones(3), ((3,),)), mapping)
    for error, bad, match in (
        (TypeError, {"center": torch.ones(2, 2)}, r"center must be a real tensor of 1 dimension\(s\), got \(2, 2\)"),
        (TypeError, {"center": CENTER, "matrix": [1.0]}, r"matrix must be a real tensor of 2 dimension\(s\), got list"),
        (ValueError, {"center": CENTER, "matrix": torch.ones(5, 3)}, "matrix must have 4 columns"),
        (ValueError, {"center": CENTER, "curvature": 0.0}, "curvature must be positive and finite, got 0.0"),
        (ValueError, {"center": CENTER, "psi": log_sum_exp}, "argmax and psi go together"),
        (TypeError, {"center": CENTER, "psi": 1, "argmax": log_sum_exp}, "psi must be a function, got int"),
    ):
        with pytest.raises(error, match=match):
            new(**bad)
    with pytest.raises(TypeError, match="map must be a function, got int"):
        NonconvexLinearProblem(Split(torch.ones(3), ((3,),)), 1, center=CENTER)  # type: ignore[arg-type]
    for returned, match in (
        (torch.ones(4), r"map must return a vector of 5 entries, got shape \(4,\)"),
        ((torch.arange(2), torch.ones(3)), r"rows and values of one length, got shapes \(2,\), \(3,\)"),
    ):
        q = problem()
        q.linear.map = lambda upper, batch, returned=returned: returned
        with pytest.raises(ValueError, match=match):
            hybrid(q).backward(sample(rows(), 1))
