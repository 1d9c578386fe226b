"""``verify=``: a claim at a saddle is taken back, a claim at a minimum becomes "verified"."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import torchbilevel as tb
from benchmarks import octopus


def perturbed(verify: Any, gamma: float = 0.02, stop: bool = True) -> tb.PerturbedAID:
    """A value test that is too short for so flat a saddle, started next to it."""
    start = octopus.saddle(1, 2, math.e, torch.float64) + 1e-9
    problem = octopus.bilevel(2, 1.0, gamma=gamma, kappa=2.0, start=start)
    return tb.PerturbedAID(
        problem,
        0.25,
        radius=1e-3,
        grad_tol=1e-3,
        lower_solver=tb.GD(1.0, 50, tol=1e-8),
        linear_solver=tb.CG(10),
        escape_steps=20,
        value_test=True,
        value_tol=1e-4,
        stop=stop,
        verify=verify,
    )


def run(method: tb.Method, steps: int) -> None:
    for _ in range(steps):
        method.zero_grad()
        method.backward()
        method.step()
        if method.done:
            return


def test_a_saddle_that_passed_the_test_is_left_and_the_minimum_verified() -> None:
    trusting = perturbed(None)
    run(trusting, 100)
    assert trusting.result().claim == "escape test passed"
    hessian = torch.func.jacrev(torch.func.jacrev(lambda x: octopus.octopus(x, 1.0, 0.02)))(trusting.result().x[0])
    assert float(torch.linalg.eigvalsh(hessian)[0]) == pytest.approx(-0.04, abs=1e-3)

    method = perturbed(tb.Verify(step_length=0.1, curvature_tol=1e-2))
    run(method, 800)
    assert method.done
    assert method.result().claim == "verified"
    kinds = [event.kind for event in method.events]
    assert kinds.count("saddle left") == 1
    assert kinds[-1] == "verified"
    x = method.result().x[0]
    torch.testing.assert_close(x.abs(), octopus.minimum(2), rtol=0, atol=1e-3)
    assert method.certificate is not None
    assert method.certificate.verdict == "epsilon-local minimum"
    assert method.certificate.grad_tol == 1e-3  # the epsilon asked for, not the 4/5 that the rule tests
    torch.testing.assert_close(method.problem.y[0], x, rtol=0, atol=1e-6)


def test_the_cost_of_certificates_is_counted() -> None:
    method = perturbed(tb.Verify(step_length=0.1, curvature_tol=1e-2))
    run(method, 30)
    assert [event.kind for event in method.events if event.kind == "saddle left"]
    assert method.estimator.counts.lagrangian_products > 0


def test_the_step_off_the_saddle_is_along_the_eigenvector() -> None:
    method = perturbed(tb.Verify(step_length=0.25, curvature_tol=1e-2))
    run(method, 21)
    assert method.events[-1].kind == "saddle left"
    x = method.problem.x[0]
    expected = octopus.saddle(1, 2, math.e, torch.float64)
    assert float(x[0] - expected[0]) == pytest.approx(0.0, abs=1e-6)
    assert abs(float(x[1])) == pytest.approx(0.25, abs=1e-6)


@pytest.mark.parametrize("value", [True, {"step_length": 0.1}, tb.Verify])
def test_other_settings_are_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="verify must be Verify"):
        perturbed(value)


def test_rules_without_a_claim_and_bad_numbers_are_refused() -> None:
    problem = octopus.bilevel(2, 1.0)
    rule = torch.optim.SGD(problem.upper_parameters, lr=0.1)
    with pytest.raises(ValueError, match="SGD makes none"):
        tb.Method(problem, tb.Implicit(tb.GD(1.0, 5)), rule, verify=tb.Verify(step_length=0.1))
    with pytest.raises(ValueError, match="step_length must be positive and finite, got -1"):
        tb.Verify(step_length=-1)
