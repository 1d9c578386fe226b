"""``certify``: is this point a local minimum of Phi, a saddle, or not even stationary?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchbilevel.constants import third_derivative_norm
from torchbilevel.counts import Counts
from torchbilevel.curvature import HessianOperator
from torchbilevel.lanczos import Eigenpair, smallest_eigenpair
from torchbilevel.oracle import Oracle
from torchbilevel.problem import Problem
from torchbilevel.problem.base import require_problem
from torchbilevel.samples import Samples
from torchbilevel.tensors import Tensors, dot, flatten, mix_seed, norm, scale, unflatten, zeros
from torchbilevel.verdict import Verdict, disagreement, judge, obstacle, positive_definite


@dataclass(frozen=True, eq=False)
class Certificate:
    """What is known about x. The verdict speaks about the data that ``certify`` was given.

    Attributes:
        verdict: ``"epsilon-local minimum"``: |grad Phi| <= grad_tol and lambda_min >= -curvature_tol; ``"strict
            saddle"``: |grad Phi| <= grad_tol and lambda_min < -curvature_tol; ``"not stationary"``: |grad Phi| >
            grad_tol; ``"undecided"``: the numbers do not allow any of these.
        reason: the verdict in words.
        value: Phi(x).
        grad_norm: |grad Phi(x)|.
        grad_error: first-order estimate of what the residuals of y and z do to the gradient.
        grad_tol: as given.
        lambda_min: smallest Ritz value of hess Phi, an upper bound of its smallest eigenvalue; NaN where Phi is not
            known to have a Hessian.
        lambda_min_error: with probability 1 - failure_probability over the random start of Lanczos, the smallest
            eigenvalue is at least lambda_min - lambda_min_error.
        eigenvector: of unit length over all tensors, shapes of x, on the descent side (<grad Phi, v> <= 0); zero where
            lambda_min is NaN.
        curvature_tol: as given, or sqrt(rho * grad_tol).
        curvature_tol_from: ``"given"``, ``"rho given"`` or ``"rho estimated"``.
        rho: Lipschitz constant of hess Phi, given or estimated from below; ``None`` where curvature_tol was given.
        lower_residual: |g_y| at the y used (|y - P(y - g_y)| with a projection).
        lower_tol: what the residual was asked to meet.
        adjoint_residual: |f_y - g_yy z| (bilevel), 0 for minimax.
        lower_lambda_min: smallest Ritz value of g_yy at y, on the active face; ``inf`` at a vertex. Not positive:
            undecided, since y is no strict minimiser then.
        lower_lambda_min_error: its error, with the same probability.
        local_minimax: minimax: whether (x, y*(x)) is a local minimax point, to the tolerances: hess Phi positive
            definite (``False``: it is not even semidefinite); ``None`` for bilevel or where this is not decided.
        local_nash: likewise a local Nash equilibrium: f_xx positive definite.
        failure_probability: of each of the error bars.
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
    lower_lambda_min_error: float
    local_minimax: bool | None
    local_nash: bool | None
    failure_probability: float
    counts: Counts

    def __str__(self) -> str:
        """The certificate as a short table."""
        c = self.counts
        products = c.hessian_products + c.jacobian_products + c.lagrangian_products
        wanted = f"at least {-self.curvature_tol:.2e} ({self.curvature_tol_from})"
        smallest = f"{self.lambda_min:+.3e} - {self.lambda_min_error:.0e}"
        lower = f"{self.lower_lambda_min:+.3e} - {self.lower_lambda_min_error:.0e}"
        rows = [
            ("Phi", f"{self.value:.6g}", ""),
            ("|grad Phi|", f"{self.grad_norm:.2e} +- {self.grad_error:.0e}", f"at most {self.grad_tol:.2e}"),
            ("lambda_min", smallest, wanted),
            ("lambda_min of g_yy", lower, "must be positive"),
            ("|g_y|", f"{self.lower_residual:.1e}", f"asked for {self.lower_tol:.0e}"),
        ]
        answers = (("local minimax point", self.local_minimax), ("local Nash point", self.local_nash))
        rows += [(name, "yes" if answer else "no", "") for name, answer in answers if answer is not None]
        rows.append(("cost", f"{c.upper_gradients + c.lower_gradients} gradients", f"{products} products"))
        lines = [f"  {name:<20}{number:<22}{note}".rstrip() for name, number, note in rows]
        return "\n".join([f"{self.verdict}: {self.reason}", *lines])


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
        problem: a ``BilevelProblem`` or ``MinimaxProblem``; of a method, ``method.problem``.
        batch: minimax: the data, one batch or ``Batches``.
        lower: bilevel: the data of the lower loss, one batch or ``Batches``.
        upper: bilevel: the data of the upper loss, one batch or ``Batches``.
        grad_tol: epsilon, positive.
        curvature_tol: epsilon_H, positive; default sqrt(rho * grad_tol).
        rho: Lipschitz constant of hess Phi; estimated, from below, where neither it nor ``curvature_tol`` is given.
        tol: accuracy asked of y; default 1e-10 in float64, 4e-5 in float32.
        max_basis: cap on the Lanczos bases, copies of x or of y; default: what fits in 1 GiB, at most 1000.
        failure_probability: of the random starts of Lanczos; default 1e-3.
        seed: of those starts, and of the random numbers inside the losses.

    Returns:
        The certificate; ``print`` shows it as a table.

    Cost: a few Newton steps for y; Lanczos on g_yy; per Lanczos step on hess Phi one product with it (two linear solves
    and three reverse sweeps; minimax one and two); two more gradients of Phi, with which one product is compared.
    Memory: the basis.

    Reference: Xian, Huang and Huang, definitions 1 and 2 (local Nash equilibria and minimax points); Jin, Netrapalli
    and Jordan, ICML 2020 (their second-order conditions); Nesterov and Polyak, 2006 (epsilon_H = sqrt(rho epsilon)).
    """
    require_problem(problem)
    problem.ranks.require_same("seed", seed, problem.x[0].device)
    return certify_samples(
        problem,
        problem.sample(batch, lower, upper, seed=mix_seed(seed, 0)),
        None,
        grad_tol=grad_tol,
        curvature_tol=curvature_tol,
        rho=rho,
        tol=tol,
        max_basis=max_basis,
        failure_probability=failure_probability,
        seed=seed,
    )


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
    for name, number in (("grad_tol", grad_tol), ("curvature_tol", curvature_tol), ("rho", rho)):
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {number}")
    if max_basis is not None and max_basis < 1:
        raise ValueError(f"max_basis must be at least 1, got {max_basis}")
    if not 0 < failure_probability < 1:
        raise ValueError(f"failure_probability must be between 0 and 1, got {failure_probability}")
    operator = HessianOperator(problem, samples, x=x, tol=tol, oracle=Oracle(problem), strict=False)
    response, like = operator.response, flatten(operator.x)
    generator = torch.Generator().manual_seed(mix_seed(seed, 1))  # on the CPU: the same start on every device

    def draw() -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)

    def lanczos(matvec: Callable[[Tensor], Tensor], enough: Callable[[float, float, float], bool]) -> Eigenpair:
        return smallest_eigenpair(
            matvec,
            draw(),
            max_basis=max_basis or _basis(like),
            failure_probability=failure_probability,
            enough=enough,
            redraw=draw,
        )

    y_basis = max_basis or _basis(flatten(response.y))
    y_pair = response.smallest_eigenvalue(generator, y_basis, failure_probability)
    grad_norm = float(norm(operator.gradient))
    reason = obstacle(operator, y_pair, grad_norm)
    source = "given" if curvature_tol else "rho given" if rho else "rho estimated"
    if curvature_tol is None:
        rho = rho or (math.nan if reason else third_derivative_norm(operator, draw()))
        curvature_tol = math.sqrt(rho * grad_tol)
    pair, minimax, nash, bound = None, None, None, curvature_tol
    if not reason:
        pair = lanczos(
            operator.matvec,
            lambda value, residual, error: (
                residual <= 0.1 * max(abs(value), bound)
                and (value < -bound or value - error >= -bound)
                and (not problem.minimax or value < 0 or value > error or error <= 0.1 * bound)
            ),
        )
        reason = obstacle(operator, y_pair, pair.value) or disagreement(operator, draw())
    verdict, reason = judge(operator, grad_norm, grad_tol, pair, curvature_tol, reason)
    if problem.minimax and verdict == "not stationary":
        minimax = nash = False
    elif problem.minimax and verdict != "undecided" and pair is not None:
        minimax = nash = positive_definite(pair)
        if minimax is not False:  # a local Nash equilibrium is a local minimax point
            own = lanczos(
                lambda v: flatten(operator.upper_block(unflatten(v, operator.x))),
                lambda value, residual, error: value < 0 or value > error or error <= 0.1 * bound,
            )
            nash = False if positive_definite(own) is False else minimax and positive_definite(own)
    vector = zeros(operator.x) if pair is None else unflatten(pair.vector, operator.x)
    return Certificate(
        verdict=verdict,
        reason=reason,
        value=float(operator.value),
        grad_norm=grad_norm,
        grad_error=operator.gradient_error,
        grad_tol=grad_tol,
        lambda_min=math.nan if pair is None else pair.value,
        lambda_min_error=math.inf if pair is None else pair.error,
        eigenvector=scale(-1.0, vector) if float(dot(operator.gradient, vector)) > 0 else vector,
        curvature_tol=curvature_tol,
        curvature_tol_from=source,
        rho=rho,
        lower_residual=response.residual,
        lower_tol=operator.tol,
        adjoint_residual=operator.adjoint_residual,
        lower_lambda_min=math.inf if y_pair is None else y_pair.value,
        lower_lambda_min_error=0.0 if y_pair is None else y_pair.error,
        local_minimax=minimax,
        local_nash=nash,
        failure_probability=failure_probability,
        counts=operator.counts,
    )


def _basis(vector: Tensor) -> int:
    """The Lanczos vectors that fit in 1 GiB, at least 20 and at most 1000."""
    return min(vector.numel(), 1000, max(20, 2**30 // (vector.numel() * vector.element_size())))
