"""The same answers on a GPU: estimators, methods, replay, certificates, checkpoints that change device."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import torchbilevel as tb
from benchmarks import octopus
from tests.problems import FACTORIES
from torchbilevel.tensors import ball, norm, sub

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BILEVEL = ("quadratic", "ridge", "logistic")


class Weights(nn.Module):
    def __init__(self, *tensors: torch.Tensor) -> None:
        super().__init__()
        self.values = nn.ParameterList([nn.Parameter(t) for t in tensors])


def regression(upper_device: str, lower_device: str, dropout: float = 0.0) -> tb.BilevelProblem:
    """Ridge regression with one penalty per feature; upper and lower may live on different devices."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 6, generator=generator, dtype=torch.float64).to(lower_device)
    targets = torch.randn(40, generator=generator, dtype=torch.float64).to(lower_device)
    drop = nn.Dropout(dropout)

    def lower_loss(upper: Any, lower: Any, batch: Any) -> torch.Tensor:
        penalty = upper.values[0].exp().to(lower_device) * lower.values[0] ** 2
        return (drop(inputs[:20]) @ lower.values[0] - targets[:20]).square().mean() + penalty.sum()

    def upper_loss(upper: Any, lower: Any, batch: Any) -> torch.Tensor:
        return (inputs[20:] @ lower.values[0] - targets[20:]).square().mean()

    upper = Weights(torch.linspace(-2, 0, 6, dtype=torch.float64, device=upper_device))
    lower = Weights(torch.zeros(6, dtype=torch.float64, device=lower_device))
    return tb.BilevelProblem(upper, lower, upper_loss, lower_loss)


def estimators() -> list[tb.Estimator]:
    return [
        tb.Implicit(tb.GD(0.1, 30), tb.CG(6, None)),
        tb.Implicit(tb.Adam(0.1, 30), tb.Direct()),
        tb.Implicit(tb.TorchOptim(torch.optim.LBFGS, 3, lr=1.0), tb.Neumann(20, 0.1)),
        tb.Unrolled(tb.GD(0.1, 30, momentum=0.5)),
        tb.Unrolled(tb.Adam(0.1, 30), recompute=True, truncate=20),
    ]


def hypergradient(problem: tb.BilevelProblem, estimator: tb.Estimator) -> torch.Tensor:
    estimator.bind(problem).backward()
    gradient = problem.upper_parameters[0].grad
    assert gradient is not None
    return gradient


@pytest.mark.parametrize("index", range(len(estimators())))
@pytest.mark.parametrize("devices", [("cuda", "cuda"), ("cpu", "cuda")])
def test_hypergradients_equal_those_on_the_cpu(index: int, devices: tuple[str, str]) -> None:
    there = hypergradient(regression(*devices), estimators()[index])
    assert there.device.type == devices[0]
    here = hypergradient(regression("cpu", "cpu"), estimators()[index])
    torch.testing.assert_close(there.cpu(), here, rtol=1e-9, atol=1e-11)


def test_a_linear_solve_of_fixed_length_never_waits_for_the_device() -> None:
    matrix = torch.diag(torch.linspace(1, 2, 50, device="cuda", dtype=torch.float64))
    b = (torch.ones(50, device="cuda", dtype=torch.float64),)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = tb.CG(30, None).solve(lambda s: (matrix @ s[0],), b)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.z[0], b[0] / matrix.diagonal())


def test_dropout_is_replayed_and_the_global_state_put_back() -> None:
    problem = regression("cuda", "cuda", dropout=0.5)
    before = torch.cuda.get_rng_state()
    values = [problem.lower_value(problem.x, tuple(t + 1 for t in problem.y), None, seed) for seed in (3, 3, 4)]
    assert torch.equal(before, torch.cuda.get_rng_state())
    assert values[0] == values[1] != values[2]


def test_ball_draws_on_the_device_without_touching_the_global_state() -> None:
    like = (torch.zeros(1000, device="cuda"), torch.zeros(3))
    before = torch.cuda.get_rng_state()
    first, again = ball(like, 0.5, seed=1), ball(like, 0.5, seed=1)
    assert [t.device.type for t in first] == ["cuda", "cpu"]
    assert float(norm(first)) <= 0.5
    assert float(norm(sub(first, again))) == 0.0
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_sample_draws_on_the_device() -> None:
    source = tb.sample((torch.arange(100, device="cuda"), torch.arange(100, device="cuda")), seed=0)
    first, second = source(10)
    assert first.is_cuda
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", BILEVEL)
def test_closed_forms_on_the_device(name: str) -> None:
    case = FACTORIES[name]()
    try:
        problem = case.problem
        problem.upper.to("cuda")
        problem.lower.to("cuda")
        move = lambda batch: None if batch is None else tuple(t.cuda() for t in batch)  # noqa: E731
        operator = tb.hessian_operator(problem, lower=move(case.lower_batch), upper=move(case.upper_batch))
        hessian = operator.dense().cpu()
    except RuntimeError as error:
        if "same device" in str(error):
            pytest.skip("the problem holds constants on the CPU")
        raise
    torch.testing.assert_close(hessian, case.hess_phi(case.x0), rtol=1e-9, atol=1e-9)


def escape(device: str, steps: int) -> tuple[tb.Method, tb.BilevelProblem]:
    problem = octopus.bilevel(5, 1.0, kappa=2.0, start=octopus.saddle(1, 5, octopus.TAU, torch.float64))
    problem = to(problem, device)
    method = tb.PerturbedAID(
        problem, 0.25, radius=1e-2, grad_tol=1e-2, lower_solver=tb.GD(1.0, 20), linear_solver=tb.CG(5), escape_steps=10
    )
    for _ in range(steps):
        method.zero_grad()
        method.backward()
        method.step()
    return method, problem


def to(problem: tb.BilevelProblem, device: str) -> tb.BilevelProblem:
    problem.upper.to(device)
    problem.lower.to(device)
    return problem


def test_perturbed_aid_escapes_and_the_certificate_agrees() -> None:
    method, problem = escape("cuda", 300)
    certificate = tb.certify(problem, grad_tol=1e-2, curvature_tol=1e-1)
    assert certificate.verdict == "epsilon-local minimum"
    assert certificate.eigenvector[0].is_cuda
    _, start = escape("cuda", 0)
    assert tb.certify(start, grad_tol=1e-2, curvature_tol=1e-1).verdict == "strict saddle"
    assert any(event.kind == "perturbation" for event in method.events)


@pytest.mark.parametrize(("source", "target"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_checkpoint_changes_device(source: str, target: str) -> None:
    method, problem = escape(source, 5)
    buffer = io.BytesIO()
    torch.save({"method": method.state_dict(), "upper": problem.upper.state_dict()}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True, map_location="cpu")
    resumed, moved = escape(target, 0)
    moved.upper.load_state_dict(loaded["upper"])
    resumed.load_state_dict(loaded["method"])
    assert all(t.device.type == target for t in resumed.estimator.memory.z or ())
    for one in (method, resumed):  # inside the escape window, where no noise is drawn
        one.zero_grad()
        one.backward()
        one.step()
    torch.testing.assert_close(moved.x[0].cpu(), problem.x[0].cpu(), rtol=1e-9, atol=1e-12)


def test_deepcopy_on_the_device() -> None:
    method, problem = escape("cuda", 3)
    twin = copy.deepcopy(method)
    before = problem.x[0].clone()
    twin.zero_grad()
    twin.backward()
    twin.step()
    assert torch.equal(before, problem.x[0])
    assert twin.problem.x[0].is_cuda


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_lower_precision_run(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net, weights = nn.Linear(8, 3).cuda(), Weights(torch.zeros(64, device="cuda"))
    inputs, labels = torch.randn(64, 8, device="cuda"), torch.randint(0, 3, (64,), device="cuda")

    def lower_loss(upper: Any, lower: Any, batch: Any) -> torch.Tensor:
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            losses = nn.functional.cross_entropy(lower(inputs).float(), labels, reduction="none")
        return (upper.values[0].sigmoid() * losses).mean() + 1e-2 * sum(p.square().sum() for p in lower.parameters())

    def upper_loss(upper: Any, lower: Any, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(lower(inputs), labels)

    problem = tb.BilevelProblem(weights, net, upper_loss, lower_loss)
    method = tb.AIDBiO(problem, 1.0, lower_solver=tb.GD(0.5, 20), linear_solver=tb.CG(10))
    losses = []
    for _ in range(10):
        method.zero_grad()
        losses.append(float(method.backward()))
        method.step()
    assert losses[-1] < losses[0]
