"""``certify``: is this point a local minimum of Phi, a saddle, or not even stationary?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from torchbilevel.curvature import HessianOperator
from torchbilevel.derivatives import Counts, Oracle
from torchbilevel.lanczos import Eigenpair, smallest_eigenpair
from torchbilevel.problem import Problem
from torchbilevel.samples import Samples
from torchbilevel.tensors import Tensors, dot, flatten, mix_seed, norm, scale, unflatten

Verdict = Literal["epsilon-local minimum", "strict saddle", "not stationary", "undecided"]


@dataclass(frozen=True, eq=False)
class Certificate:
    """What is known about x. The verdict speaks about the data that ``certify`` was given.

    Attributes:
        verdict: ``"epsilon-local minimum"``: |grad Phi| <= grad_tol and lambda_min >= -curvature_tol; ``"strict saddle"``:
            |grad Phi| <= grad_tol and lambda_min < -curvature_tol; ``"not stationary"``: |grad Phi| > grad_tol;
            ``"undecided"``: the numbers do not allow any of these.
        reason: the verdict in words.
        value: Phi(x).
        grad_norm: |grad Phi(x)|.
        grad_error: first-order estimate of what the residuals of y and z do to the gradient.
        grad_tol: as given.
        lambda_min: smallest Ritz value of hess Phi, an upper bound of its smallest eigenvalue.
        lambda_min_error: with probability 1 - failure_probability over the random start of Lanczos, the smallest eigenvalue
            is at least lambda_min - lambda_min_error.
        eigenvector: of unit length over all tensors, shapes of x, on the descent side (<grad Phi, v> <= 0).
        curvature_tol: as given, or sqrt(rho * grad_tol).
        curvature_tol_from: ``"given"``, ``"rho given"`` or ``"rho estimated"``.
        rho: Lipschitz constant of hess Phi, given or estimated from below; ``None`` where curvature_tol was given.
        lower_residual: |g_y| at the y used (|y - P(y - g_y)| with a projection).
        lower_tol: what the residual was asked to meet.
        adjoint_residual: |f_y - g_yy z| (bilevel), 0 for minimax.
        lower_lambda_min: smallest eigenvalue of g_yy at y, on the active face; ``inf`` at a vertex.
        local_minimax: minimax: whether (x, y*(x)) is a strict local minimax point; ``None`` for bilevel or where undecided.
        local_nash: minimax: whether it is a strict local Nash equilibrium (f_xx positive definite besides).
        failure_probability: of ``lambda_min_error``.
        counts: oracle calls spent.
    """

    verdict: Verdict
    reason: str
    value: float
    grad_norm: float
    grad_error: float
    grad_tol: float
    lambda_min: float
    lambda_min_error: float
    eigenvector: Tensors
    curvature_tol: float
    curvature_tol_from: str
    rho: float | None
    lower_residual: float
    lower_tol: float
    adjoint_residual: float
    lower_lambda_min: float
    local_minimax: bool | None
    local_nash: bool | None
    failure_probability: float
    counts: Counts

    def __str__(self) -> str:
        """The certificate as a short table."""
        rows = [
            ("Phi", f"{self.value:.6g}", ""),
            ("|grad Phi|", f"{self.grad_norm:.2e} +- {self.grad_error:.0e}", f"tolerance {self.grad_tol:.2e}"),
            (
                "lambda_min",
                f"{self.lambda_min:+.3e} - {self.lambda_min_error:.0e}",
                f"tolerance {-self.curvature_tol:.2e} ({self.curvature_tol_from})",
            ),
            ("|g_y|", f"{self.lower_residual:.1e}", f"tolerance {self.lower_tol:.0e}"),
            ("lambda_min of g_yy", f"{self.lower_lambda_min:.3e}", "must be positive"),
        ]
        if self.local_minimax is not None:
            rows.append(
                (
                    "local minimax point",
                    "yes" if self.local_minimax else "no",
                    "local Nash equilibrium: " + ("yes" if self.local_nash else "no"),
                )
            )
        c = self.counts
        gradients = c.upper_gradients + c.lower_gradients
        products = c.hessian_products + c.jacobian_products + c.lagrangian_products
        lines = [f"  {name:<20}{number:<24}{note}".rstrip() for name, number, note in rows]
        return "\n".join(
            [f"{self.verdict}: {self.reason}", *lines, f"  {'cost':<20}{gradients} gradients, {products} products"]
        )


def certify(
    problem: Problem,
    batch: Any = None,
    *,
    lower: Any = None,
    upper: Any = None,
    grad_tol: float,
    curvature_tol: float | None = None,
    rho: float | None = None,
    tol: float | None = None,
    max_basis: int | None = None,
    failure_probability: float = 1e-3,
    seed: int = 0,
) -> Certificate:
    """Decide whether the current x is an epsilon-local minimum of Phi on the data given.

    y is brought to y*(x) on a copy; then the gradient is exact up to round-off, the Hessian of Phi is available through
    products, and Lanczos finds its smallest eigenvalue, or as much of it as the verdict needs. Modules, gradients and
    random state are left as they are.

    Args:
        problem: a ``BilevelProblem`` or ``MinimaxProblem``.
        batch: minimax: the data, one batch or ``Batches``.
        lower: bilevel: the data of the lower loss, one batch or ``Batches``.
        upper: bilevel: the data of the upper loss, one batch or ``Batches``.
        grad_tol: epsilon, positive.
        curvature_tol: epsilon_H, positive; default sqrt(rho * grad_tol).
        rho: Lipschitz constant of hess Phi; estimated, from below, where neither it nor ``curvature_tol`` is given.
        tol: accuracy asked of y; default 1e-10 in float64, 1e-5 in float32.
        max_basis: cap on the Lanczos basis of max_basis copies of x; default: what fits in 1 GiB, at most 600.
        failure_probability: of the random start of Lanczos; default 1e-3.
        seed: of that start, and of the random numbers inside the losses.

    Returns:
        The certificate; ``print`` shows it as a table.

    Raises:
        ValueError: if a tolerance is not positive, or the problem constrains x.

    Cost: a few Newton steps for y; per Lanczos step one product with hess Phi (two linear solves and three reverse sweeps;
    minimax one and two). Memory: the basis.

    Reference: Xian, Huang and Huang, definitions 1 and 2 (local Nash equilibria and minimax points); Kuczynski and
    Wozniakowski, 1992 (the probability bound); Nesterov and Polyak, 2006 (epsilon_H = sqrt(rho epsilon)).
    """
    for name, number in (("grad_tol", grad_tol), ("curvature_tol", curvature_tol), ("rho", rho), ("tol", tol)):
        if number is not None and not (number > 0 and math.isfinite(number)):
            raise ValueError(f"{name} must be positive and finite, got {number}")
    if not 0 < failure_probability < 1:
        raise ValueError(f"failure_probability must be between 0 and 1, got {failure_probability}")
    return certify_samples(
        problem, problem.sample(batch, lower, upper, seed=mix_seed(seed, 0)), None,
        grad_tol=grad_tol, curvature_tol=curvature_tol, rho=rho, tol=tol, max_basis=max_basis,
        failure_probability=failure_probability, seed=seed,
    )  # fmt: skip


def certify_samples(
    problem: Problem,
    samples: Samples,
    x: Tensors | None,
    *,
    grad_tol: float,
    curvature_tol: float | None = None,
    rho: float | None = None,
    tol: float | None = None,
    max_basis: int | None = None,
    failure_probability: float = 1e-3,
    seed: int = 0,
) -> Certificate:
    """``certify`` on samples that are drawn already, at any x (``None``: the current one)."""
    oracle = Oracle(problem)
    operator = HessianOperator(problem, samples, x=x, tol=tol, oracle=oracle, strict=False)
    n = operator.shape[0]
    vector = flatten(operator.x)
    basis = min(n, 600, max(20, 2**30 // (n * vector.element_size()))) if max_basis is None else max_basis
    generator = torch.Generator(vector.device).manual_seed(mix_seed(seed, 1))
    source = "given"
    if curvature_tol is None:
        source = "rho estimated" if rho is None else "rho given"
        rho = _estimate_rho(problem, samples, operator, generator) if rho is None else rho
        curvature_tol = math.sqrt(rho * grad_tol)
    y_pair = operator.response.smallest_eigenvalue(generator, 600)
    pair = smallest_eigenpair(
        operator.matvec,
        torch.randn(vector.shape, generator=generator, dtype=vector.dtype, device=vector.device),
        max_basis=basis,
        failure_probability=failure_probability,
        enough=lambda value, residual, error: (
            residual <= 0.1 * max(abs(value), curvature_tol)
            and (value < -curvature_tol or value - error >= -curvature_tol)
        ),
    )
    direction = unflatten(pair.vector, operator.x)
    if float(dot(operator.gradient, direction)) > 0:
        direction = scale(-1.0, direction)
    grad_norm = float(norm(operator.gradient))
    positive = y_pair is None or y_pair.value - y_pair.residual > 1e4 * torch.finfo(vector.dtype).eps * abs(
        y_pair.largest
    )
    verdict, reason = _judge(operator, grad_norm, grad_tol, pair, curvature_tol, y_pair, positive)
    minimax = nash = None
    if problem.minimax and verdict != "undecided":
        decided = verdict != "not stationary" and positive
        minimax = decided and pair.value - pair.error > 0
        nash = minimax and _smallest_upper(operator, basis, failure_probability, generator) > 0
    return Certificate(
        verdict, reason, float(operator.value), grad_norm, operator.gradient_error, grad_tol,
        pair.value, pair.error, direction, curvature_tol, source, rho,
        operator.response.residual, operator.tol, operator.adjoint_residual,
        math.inf if y_pair is None else y_pair.value, minimax, nash, failure_probability, oracle.counts,
    )  # fmt: skip


def _judge(
    operator: HessianOperator, grad_norm: float, grad_tol: float, pair: Eigenpair, curvature_tol: float,
    y_pair: Eigenpair | None, positive: bool,
) -> tuple[Verdict, str]:  # fmt: skip
    """The verdict and its reason."""
    response, worst = operator.response, operator.worst_solve
    if not positive and y_pair is not None:
        return "undecided", (
            f"g_yy is not shown to be positive definite at y (smallest eigenvalue {y_pair.value:.2e} +- {y_pair.residual:.0e}), so y "
            f"need not be a strict minimiser of the lower loss"
        )
    if operator.ambiguous:
        return (
            "undecided",
            f"{operator.ambiguous} bounds on y are active with a multiplier of zero: Phi has no second derivative here",
        )
    if not all(math.isfinite(t) for t in (grad_norm, operator.gradient_error, pair.value)):
        return "undecided", "a number is not finite"
    if worst is not None and worst.status == "non-positive curvature":
        return "undecided", "a linear solve with g_yy met non-positive curvature"
    if grad_norm - operator.gradient_error > grad_tol:
        return "not stationary", f"|grad Phi| = {grad_norm:.2e} exceeds {grad_tol:.2e}"
    if grad_norm + operator.gradient_error > grad_tol:
        return "undecided", (
            f"|grad Phi| = {grad_norm:.2e} is known to {operator.gradient_error:.0e} only (|g_y| = {response.residual:.1e}), too "
            f"coarse for {grad_tol:.2e}"
        )
    if pair.value < -curvature_tol:
        return "strict saddle", f"a direction of curvature {pair.value:.2e} below {-curvature_tol:.2e} exists"
    if pair.value - pair.error >= -curvature_tol:
        return "epsilon-local minimum", f"no curvature below {-curvature_tol:.2e}"
    return "undecided", (
        f"no curvature below {-curvature_tol:.2e} was found in {pair.products - 1} Lanczos steps, but it could go down to "
        f"{pair.value - pair.error:.2e}; raise max_basis"
    )


def _smallest_upper(
    operator: HessianOperator, basis: int, failure_probability: float, generator: torch.Generator
) -> float:
    """A lower bound of the smallest eigenvalue of f_xx at fixed y."""
    vector = flatten(operator.x)

    def matvec(v: Tensor) -> Tensor:
        return flatten(operator.upper_block(unflatten(v, operator.x)))

    start = torch.randn(vector.shape, generator=generator, dtype=vector.dtype, device=vector.device)
    pair = smallest_eigenpair(
        matvec, start, max_basis=basis, failure_probability=failure_probability,
        enough=lambda value, residual, error: value - error > 0 or (value < 0 and residual <= 0.1 * abs(value)),
    )  # fmt: skip
    return pair.value - pair.error


def _estimate_rho(problem: Problem, samples: Samples, operator: HessianOperator, generator: torch.Generator) -> float:
    """A lower estimate of the Lipschitz constant of hess Phi: the largest of three difference quotients along random lines."""
    vector, best = flatten(operator.x), 0.0
    step = 1e-3 * max(1.0, float(vector.norm()))
    for _ in range(3):
        d, v = (
            torch.randn(vector.shape, generator=generator, dtype=vector.dtype, device=vector.device) for _ in range(2)
        )
        d, v = d / d.norm(), v / v.norm()
        moved = HessianOperator(
            problem,
            samples,
            x=unflatten(vector + step * d, operator.x),
            tol=operator.tol,
            oracle=operator.oracle,
            strict=False,
        )
        best = max(best, float((moved.matvec(v) - operator.matvec(v)).norm()) / step)
    return max(best, torch.finfo(vector.dtype).eps)
