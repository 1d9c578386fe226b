"""Matrix sensing, stochastic and hyper-representation: closed forms, what is invariant, the studies in small."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import torchbilevel as tb
from benchmarks.bands import band, quantile
from benchmarks.experiments import representation as hyper
from benchmarks.experiments import stochastic_sensing as stochastic
from benchmarks.matrix_sensing import Matrix, upper_loss
from benchmarks.representation import Representation, loss, representation

# Early on g_yy is indefinite at y.
pytestmark = pytest.mark.filterwarnings("ignore::torchbilevel.LinearSolveWarning")

# --- hyper-representation ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Representation:
    return representation(3, d=8)


def by_hand(data: Representation, side: str, x: Tensor, y: Tensor) -> Tensor:
    """Mean of L_i / 2, with U whole."""
    U = torch.cat((x, y[:, None]), 1)
    A, b = getattr(data, side)
    return 0.5 * (torch.einsum("nij,ik,jk->n", A.view(-1, 8, 8), U, U) - b).square().mean()


def test_the_losses_are_those_of_the_paper(small: Representation) -> None:
    assert small.upper[0].shape == (112, 64) and small.lower[0].shape == (48, 64)
    swapped = representation(3, d=8, swap=True)
    assert torch.equal(swapped.lower[0], small.upper[0]) and torch.equal(swapped.upper[1], small.lower[1])
    problem = small.problem(0, noise=0.1, length=0.5)
    x, y = problem.upper.value, problem.lower.value
    assert y.norm().item() == pytest.approx(0.5) and x[:, 1].norm() > 0
    torch.testing.assert_close(loss(problem.upper, problem.lower, small.upper), by_hand(small, "upper", x, y))
    torch.testing.assert_close(loss(problem.upper, problem.lower, small.lower), by_hand(small, "lower", x, y))
    assert torch.linalg.eigvalsh(small.M)[-1].item() == pytest.approx(small.x[:, 0].norm().item())
    assert not small.x[:, 1].any() and torch.linalg.matrix_rank(small.M) == 3


def test_both_losses_vanish_at_the_truth(small: Representation) -> None:
    values, vectors = torch.linalg.eigh(small.M)
    U = vectors[:, -3:] * values[-3:].sqrt()
    x, y = U[:, 1:], U[:, 0]
    problem = small.at(x, y)
    for batch in (small.upper, small.lower):
        assert abs(loss(problem.upper, problem.lower, batch).item()) < 1e-25
    assert small.distance(x, y) < 1e-25 and small.distance(x, -y) < 1e-25
    zero = torch.zeros_like
    assert small.distance(zero(x), zero(y)) == pytest.approx(1.0)
    certificate = tb.certify(problem, lower=small.lower, upper=small.upper, grad_tol=1e-6, curvature_tol=1e-6)
    assert certificate.verdict == "epsilon-local minimum"


def test_the_hypergradient_by_the_implicit_function_theorem(small: Representation) -> None:
    """y* by Newton's method and grad Phi = f_x - g_xy g_yy^-1 f_y, all dense, against the package."""
    problem = small.problem(0, noise=0.3, length=0.8)
    x, y = problem.upper.value.detach(), problem.lower.value.detach()

    def g(x: Tensor, y: Tensor) -> Tensor:
        return by_hand(small, "lower", x, y)

    for _ in range(200):
        leaf = y.clone().requires_grad_()
        y = y - 0.3 * torch.autograd.grad(g(x, leaf), leaf)[0]
    for _ in range(4):
        leaf = y.clone().requires_grad_()
        (slope,) = torch.autograd.grad(g(x, leaf), leaf)
        y = y - torch.linalg.solve(torch.autograd.functional.hessian(lambda t: g(x, t), y), slope)
    blocks = torch.autograd.functional.hessian(g, (x, y))
    xs, ys = x.clone().requires_grad_(), y.clone().requires_grad_()
    f_x, f_y = torch.autograd.grad(by_hand(small, "upper", xs, ys), (xs, ys))
    want = f_x - blocks[0][1] @ torch.linalg.solve(blocks[1][1], f_y)
    operator = tb.hessian_operator(small.at(x, y), lower=small.lower, upper=small.upper)
    torch.testing.assert_close(operator.response.y[0], y, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(operator.gradient[0], want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", list(hyper.METHODS))
def test_no_method_moves_y_from_zero(small: Representation, name: str) -> None:
    """Both derivatives of g that move y vanish there on every sample, and so do those of f that z comes from."""
    problem = small.problem(0, noise=1e-3, length=0.0)
    method = hyper.METHODS[name](problem, 0.01, 2, 0.1)
    sources = small.sources(0)
    for _ in range(3):
        method.zero_grad()
        method.backward(**sources)
        method.step()
    assert torch.equal(problem.lower.value, torch.zeros(8, dtype=torch.float64))
    assert not torch.equal(problem.upper.value, small.problem(0, noise=1e-3).upper.value)


@pytest.mark.parametrize("name", ["StocBiO", "MRBO", "VRBO"])
def test_a_zero_column_stays_zero(small: Representation, name: str) -> None:
    problem = small.problem(0, noise=0.0)
    method = hyper.METHODS[name](problem, 0.1, 2, 0.1)
    sources = small.sources(0)
    for _ in range(6):
        method.zero_grad()
        method.backward(**sources)
        method.step()
    assert not problem.upper.value[:, 1].any() and not torch.equal(problem.upper.value[:, 0], small.x[:, 0])


@pytest.mark.parametrize("name", ["StocBiO", hyper.OURS])
def test_data_that_are_not_scaled_are_a_change_of_units(name: str) -> None:
    """Both losses are d times as large: with every rate divided by d the iterates are the same."""
    ends = []
    for scaled in (True, False):
        data = representation(1, d=8, scaled=scaled)
        problem = data.problem(1, noise=1e-2)
        method = hyper.METHODS[name](problem, 0.2, 2, 0.2 * data.unit)
        sources = data.sources(1)
        for _ in range(5):
            method.zero_grad()
            method.backward(**sources)
            method.step()
        ends.append((problem.upper.value.detach(), problem.lower.value.detach()))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_argmin_keeps_y_at_the_maximiser_of_g() -> None:
    """Along y = s q, q the most negative direction, |g_y| grows with s: the first of the K points has the least."""
    data = representation(1000, d=20)
    lengths = {}
    for selects in ("argmin", "last"):
        problem = data.problem(1000, noise=0.0)
        method = tb.PRGDA(
            problem, 1e-6, escape_lr=0.1, radius=0.0, grad_tol=0.0, escape_steps=1, mean_movement=1.0, period=1,
            lower_solver=tb.GD(2.0, 5), linear_solver=tb.Neumann(2, 1.0), selects=selects,
        )  # fmt: skip
        for _ in range(30):
            method.zero_grad()
            method.backward(**data.sources(0))
            method.step()
        lengths[selects] = problem.lower.value.norm().item()
    assert lengths["argmin"] < 0.05 < 0.5 < lengths["last"]


# --- stochastic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["all", "first"])
def test_the_closed_forms_of_phi(columns: str) -> None:
    """y*(X) = X under both noises; gradient and Hessian against autograd and against the package."""
    data = stochastic.sensing(2, 6, 3, n=30)
    Z = stochastic.noise_of(data, columns, 2)
    assert Z.shape == (30, 6, 3 if columns == "all" else 1) and Z.mean(0).abs().max() < 1e-15
    g = torch.Generator().manual_seed(0)
    x = data.start + 0.1 * torch.randn(data.start.shape, generator=g, dtype=torch.float64)

    def phi(columns: Tensor) -> Tensor:
        X = columns.view(3, 6).T
        return 0.5 * ((data.A * (X @ X.T)).sum((1, 2)) - data.b).square().mean()

    stacked = x.T.flatten()
    torch.testing.assert_close(
        stochastic.gradient(data, x).T.flatten(), torch.autograd.functional.jacobian(phi, stacked)
    )
    torch.testing.assert_close(stochastic.hessian(data, x), torch.autograd.functional.hessian(phi, stacked))
    problem = tb.BilevelProblem(
        Matrix(x, data.H), Matrix(x + 1), upper_loss=upper_loss, lower_loss=stochastic.lower_loss
    )
    operator = tb.hessian_operator(problem, lower=Z, upper=(data.A, data.b))
    order = torch.arange(18).view(6, 3).T.flatten()  # the package stacks rows
    torch.testing.assert_close(operator.dense()[order][:, order], stochastic.hessian(data, x), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(operator.gradient[0], stochastic.gradient(data, x), rtol=1e-8, atol=1e-10)
    assert stochastic.judge(data, x, 1e-3) == "not stationary"
    truth = torch.linalg.eigh(data.M)
    best = truth.eigenvectors[:, -3:] * truth.eigenvalues[-3:].sqrt()
    assert stochastic.judge(data, best, 1e-3) == "epsilon-local minimum"


@pytest.mark.parametrize(("columns", "stays"), [("first", True), ("all", False)])
def test_noise_on_every_column_leaves_the_stable_set(columns: str, stays: bool) -> None:
    data, _ = stochastic.instance(5, 20)
    problem = tb.BilevelProblem(
        Matrix(data.start, data.H), Matrix(data.start), upper_loss=upper_loss, lower_loss=stochastic.lower_loss
    )
    method = stochastic.build("StocBiO", problem, 8, 1.0, 0)
    sources: dict[str, Any] = {
        "lower": tb.sample(stochastic.noise_of(data, columns, 5), seed=0),
        "upper": tb.sample((data.A, data.b), seed=1),
    }
    for _ in range(3):
        method.zero_grad()
        method.backward(**sources)
        method.step()
    off = problem.upper.value[:, 1:]
    assert bool((off == 0).all()) is stays and (stays or 1e-7 < off.norm().item() < 1e-2)


# --- both studies -----------------------------------------------------------------------------------------------------


def test_bands() -> None:
    assert quantile([1.0], 0.9) == 1.0 and quantile([1.0, 2.0, 4.0], 0.75) == 3.0
    grid, low, middle, high = band([[(0, 9.0), (1, 3.0)], [(0, 9.0), (1, 5.0), (100, 1.0)]], n=3)
    assert grid == pytest.approx([1.0, 10.0, 100.0])
    assert middle == pytest.approx([4.0, 4.0, 2.0]) and low[0] == pytest.approx(3.2) and high[-1] == pytest.approx(2.8)


def test_the_grid_goes_on_while_its_last_value_is_the_best() -> None:
    rows: list[dict[str, Any]] = []
    for _ in range(20):
        wanted = hyper.settings(rows, 1, False)
        missing = [s for s in wanted if s not in [row["setting"] for row in rows]]
        if not missing:
            break
        for s in missing:  # cheapest: lr = 0.1, of those scanned 0.3, and depth 2
            calls = None if s["lr"] < 0.02 else 1000 * (1 + abs(math.log(s["lr"] / 0.1 if s["lr"] else 1)) + s["depth"])
            rows.append({"setting": s, "result": {"calls": calls, "ratio": 1 / (1 + s["lr"])}})
    scanned = {s["lr"] for s in wanted if s["stage"] == "scan"}
    assert scanned == {1e-4, 3e-4, 1e-3, 3e-3, 0.03, 0.3, 3.0}  # 3 shows that 0.3 is the best
    chosen = {(s["lr"], s["depth"]) for s in wanted if s["stage"] == "main" and s["method"] in hyper.BASELINES}
    assert chosen == {(0.3, 2)}


@pytest.mark.parametrize("name", ["representation", "stochastic_sensing"])
def test_reports_are_drawn_from_rows(name: str, tmp_path: Path) -> None:
    """Two runs each, cut as short as can be."""
    module = {"representation": hyper, "stochastic_sensing": stochastic}[name]
    wanted = [s | {"budget": 300, "d": 10, "steps": 2} for s in module.settings([], 1, True)]
    wanted = [s for s in wanted if s["method"] in ("StocBiO", hyper.OURS, "StocBiOiNEON")][:6]
    rows = [json.loads(json.dumps({"setting": s, "result": module.run(s, "cpu")})) for s in wanted]
    assert all(row["result"]["curve"][0][-1] > 0.1 and row["result"]["spent"] > 0 for row in rows)
    text = module.report(rows, tmp_path)
    assert "StocBiO" in text and (tmp_path / f"{name}.png").stat().st_size > 10_000
