"""One descent of the octopus: the methods with the parameters of the paper, and what is worth knowing of a run.

x starts uniform in [-1, 1]^d, the step size is 1/(4L), displacements have radius gamma e/100 and come where the
hypergradient is within four fifths of epsilon = gamma e/100, at most every eleventh step (Du et al., 2017; Huang et
al., 2025).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

import torchbilevel as tb
from benchmarks import octopus
from benchmarks.experiments.study import rounded, thin

GAMMA, KAPPA = 1.0, 10.0
EPSILON = RADIUS = GAMMA * math.e / 100
WAIT = 10
INNER = 20  # steps on y and terms of the Neumann series: 2 kappa, which warm starts make enough
CURVATURE_TOL = 0.1
CURVATURES = (1.0, 1.5, 2.0, 3.0)
METHODS = ("AIDBiO", "ITDBiO", "PerturbedAID", "GDmax", "PerturbedGDmax")
PERTURBED = ("PerturbedAID", "PerturbedGDmax")


def value_tol(L: float) -> float:
    """f_thres: the most that descent in a bowl of curvature 2L can gain where the gradient is 4/5 epsilon."""
    return (0.8 * EPSILON) ** 2 / (4 * L)


def build(
    name: str,
    d: int,
    L: float,
    seed: int,
    *,
    rotated: bool = False,
    kappa: float = KAPPA,
    radius: float = RADIUS,
    start: Tensor | None = None,
    steps: int = INNER,
    lower_tol: float = 1e-12,
    linear: tb.LinearSolver | None = None,
    device: str = "cpu",
    **warm: bool,
) -> tb.Method:
    """A method on its problem.

    The perturbed methods test their displacements, which needs a tolerance of y. It is so small that it matters only to
    coordinates that are far smaller than a displacement; with radius 0, where it would matter, there is none.
    """
    upper, lower = octopus.modules(d, L, GAMMA, kappa, rotated=rotated, start=start, seed=seed)
    options: dict[str, Any] = {"lr": 1 / (4 * L), "lower_solver": tb.GD(lr=1.0, steps=steps), **warm}
    if name in PERTURBED:
        options |= {"radius": radius, "grad_tol": EPSILON, "escape_steps": WAIT, "seed": seed}
    if name in PERTURBED and radius > 0:
        options |= {"value_test": True, "value_tol": value_tol(L)}
        options["lower_solver"] = tb.GD(lr=1.0, steps=steps, tol=lower_tol)
    if name in ("AIDBiO", "PerturbedAID"):
        options["linear_solver"] = linear or tb.Neumann(steps=steps, lr=1.0)
    upper, lower = upper.to(device), lower.to(device)
    if name.endswith("GDmax"):
        problem: Any = tb.MinimaxProblem(upper, lower, loss=octopus.saddle_loss)
    else:
        problem = tb.BilevelProblem(upper, lower, upper_loss=octopus.upper_loss, lower_loss=octopus.lower_loss)
    method: tb.Method = getattr(tb, name)(problem, **options)
    return method


class Descent(NamedTuple):
    """A run."""

    points: Tensor  # x_0, x_1, ..., of shape (steps + 1, d), on the CPU
    errors: list[float]  # of the hypergradients, relative to epsilon / 5: at displacements, else at the last step
    claims: list[Tensor]  # the points that passed an escape test
    arrived: bool  # at a minimum; the run ends there


def descend(method: tb.Method, steps: int) -> Descent:
    """Run until a minimum is reached or the steps are used up.

    A minimum is reached where all saddles are behind and the method's own test says that x is one; for a method
    without displacements, where the hypergradient is within 4/5 epsilon.
    """
    upper: Any = method.problem.upper
    x, displaces = upper.x, getattr(method.rule, "radius", 0.0) > 0
    points, errors, claims = [x.detach().clone()], [], []
    arrived = False
    while len(points) <= steps and not arrived:
        seen = len(method.events)
        method.zero_grad()
        try:
            method.backward()
            method.step()
        except FloatingPointError:
            break
        news = {event.kind for event in method.events[seen:]}
        if "escape test passed" in news:
            claims.append(method.result().x[0])
        small = bool(x.grad.norm() <= 0.8 * EPSILON)
        beyond = _all_behind(points[-1]) and (not displaces or "escape test passed" in news)
        arrived = beyond and (_all_behind(claims[-1]) if displaces else small)
        if "perturbation" in news or arrived or len(points) == steps:
            errors.append(float((x.grad - _gradient(upper, points[-1])).norm()) / (EPSILON / 5))
        points.append(x.detach().clone())
    return Descent(torch.stack(points).cpu(), errors, claims, arrived)


def _all_behind(x: Tensor) -> bool:
    return bool((x.abs() > 2 * octopus.TAU).all())


def _gradient(upper: Any, x: Tensor) -> Tensor:
    """grad Phi, which is the gradient of the octopus."""
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(upper.value(point), point)
    return gradient


def summary(method: tb.Method, run: Descent, L: float) -> dict[str, Any]:
    """The numbers to keep, as JSON has them."""
    d, c = run.points.shape[1], method.estimator.counts
    times = octopus.left_behind(run.points)
    taken = len(run.points) - 1
    result = method.result()
    answer = certificate(method, result.x[0])
    claims = [certificate(method, x).verdict for x in run.claims]
    values = octopus.octopus(run.points, L, GAMMA) / octopus.drop(L, GAMMA)
    before = [run.points[: t + 1, k].abs().min().item() for k, t in enumerate(times)]
    distance = (run.points[-1].abs() - octopus.minimum(d)).norm().item()
    return rounded(
        {
            "left": len(times),
            "times": times,
            "steps": taken,
            "arrived": run.arrived,
            "calls": c.upper_gradients + c.lower_gradients + c.hessian_products + c.jacobian_products,
            "upper_gradients": c.upper_gradients,
            "lower_gradients": c.lower_gradients,
            "hessian_products": c.hessian_products,
            "jacobian_products": c.jacobian_products,
            "distance": distance,
            "claim": result.claim,
            "verdict": answer.verdict,
            "lambda_min": answer.lambda_min,
            "claims": len(claims),
            "false_claims": sum(verdict != "epsilon-local minimum" for verdict in claims),
            "first_claim_false": bool(claims) and claims[0] != "epsilon-local minimum",
            "displacements": sum(event.kind == "perturbation" for event in method.events),
            "error": max(run.errors, default=None),
            "closest": before,
            "curve": curve(values.tolist()),
        }
    )  # type: ignore[no-any-return]


def certificate(method: tb.Method, x: Tensor) -> tb.Certificate:
    """The certificate of a point, which takes the place of the method's x."""
    with torch.no_grad():
        method.problem.upper.x.copy_(x)
    return tb.certify(method.problem, grad_tol=EPSILON, curvature_tol=CURVATURE_TOL)


def curve(values: list[float], n: int = 80) -> list[list[float]]:
    """At most n of the points (t, value_t), evenly spaced in length along a curve scaled to the unit square."""
    height = max(values) - min(values) or 1.0
    lengths = [abs(b - a) / height + 1 / len(values) for a, b in pairwise(values)]
    total, walked, kept = sum(lengths), 0.0, [0]
    for t, length in enumerate(lengths, 1):
        walked += length
        if walked >= len(kept) * total / (n - 2) or t == len(lengths):
            kept.append(t)
    kept = thin(kept, n)
    return [[float(t) for t in kept], [values[t] for t in kept]]


def estimated_gap(L: float, d: int) -> float:
    """Steps from saddle to saddle for a perturbed method: the way in, then the way out.

    In: |grad Phi| starts at 4 L tau and halves in each step until it is below 4/5 epsilon. Out: one coordinate of the
    displacement, typically radius / sqrt(d + 2), grows by the factor 1 + gamma / (2 L) per step until it passes 2 tau.

    >>> [round(estimated_gap(L, 10), 1) for L in (1.0, 3.0)]
    [25.1, 53.0]
    """
    way_in = math.log2(4 * L * octopus.TAU / (0.8 * EPSILON))
    return way_in + math.log(2 * octopus.TAU * math.sqrt(d + 2) / RADIUS) / math.log1p(GAMMA / (2 * L))


def gaps(result: dict[str, Any]) -> list[int]:
    """Steps between successive saddles."""
    return [b - a for a, b in pairwise(result["times"])]


def last_ratio(result: dict[str, Any]) -> float | None:
    """The last wait over the one before, once three saddles were left."""
    waits = gaps(result)
    return waits[-1] / waits[-2] if len(waits) > 1 else None


def calls_per_saddle(result: dict[str, Any]) -> float | None:
    """Oracle calls until the last saddle was left, over the number of saddles left."""
    if not result["times"]:
        return None
    return result["calls"] * result["times"][-1] / result["steps"] / result["left"]  # type: ignore[no-any-return]


def line_fit(values: list[float]) -> tuple[float, float]:
    """Slope and R^2 of the least-squares line through (1, v_1), (2, v_2), ..."""
    n, mean_k, mean_v = len(values), (len(values) + 1) / 2, sum(values) / len(values)
    cross = sum((k - mean_k) * (v - mean_v) for k, v in enumerate(values, 1))
    spread = sum((v - mean_v) ** 2 for v in values)
    width = (n**3 - n) / 12
    return cross / width, 1.0 if spread == 0 else cross**2 / (width * spread)
