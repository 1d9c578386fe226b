"""Conjugate gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchbilevel.blocks import BlockLayout, choose, norms
from torchbilevel.linear_solve.base import LinearSolver, MatVec, SolveResult, positive_int
from torchbilevel.tensors import Layout, Scalar, Tensors, add_scaled_, clone, scale_add_, sub, zeros


class CG(LinearSolver):
    """Conjugate gradients.

    From r = p = b - A z:   alpha = <r, r> / <p, A p>,   z += alpha p,   r' = r - alpha A p,
    p = r' + (<r', r'> / <r, r>) p.

    After k steps the error in the A-norm is at most 2 ((sqrt(kappa) - 1) / (sqrt(kappa) + 1))^k times that of the
    start. A direction with <p, A p> <= 0, up to round-off, ends the solve: z is what was found so far, and the result
    says ``"non-positive curvature"``.

    Args:
        max_iter: products at most (not counting the first residual of a warm start); N of the papers.
        tol: stop when |r| <= tol |b|. ``None`` takes exactly ``max_iter`` steps and never waits for the device.

    Raises:
        ValueError: if ``max_iter`` is not a positive integer or ``tol`` not positive.

    Cost: one product per iteration, one more when ``z0`` is given; three vectors of the size of b besides z.

    Reference: Hestenes and Stiefel, Journal of Research of the National Bureau of Standards, 1952.

    Differs from the paper: stops at non-positive curvature, and at round-off (|r| <= eps |b|) also without ``tol``.

    >>> result = CG(max_iter=3).solve(lambda s: (2 * s[0],), (torch.ones(3),))
    >>> result.z, result.status
    ((tensor([0.5000, 0.5000, 0.5000]),), 'converged')
    """

    def __init__(self, max_iter: int = 20, tol: float | None = 1e-6) -> None:
        self.max_iter, self.tol = positive_int("max_iter", max_iter), tol
        if tol is not None and not tol > 0:
            raise ValueError(f"tol must be positive or None, got {tol}")

    def __repr__(self) -> str:
        return f"CG(max_iter={self.max_iter}, tol={self.tol})"

    @torch.no_grad()
    def solve(self, matvec: MatVec, b: Tensors, z0: Tensors | None = None, tasks: int | None = None) -> SolveResult:
        """Solve A z = b; see the class."""
        layout, size = Layout(b) if tasks is None else BlockLayout(b, tasks), norms(b, tasks)
        rhs = layout.pack(b)
        bb = layout.dot(rhs, rhs)
        tol = max(self.tol or 0.0, *(torch.finfo(t.dtype).eps for t in b))
        limit, eps = tol**2 * bb, torch.finfo(size.dtype).eps
        if z0 is not None and self.tol is not None:
            # b = 0 has the solution 0, and no residual but 0 would meet the tolerance.
            z0 = None if not _any(bb > 0) else z0 if tasks is None else choose(size > 0, z0, None)
        z = zeros(rhs) if z0 is None else clone(layout.pack(z0))
        r = clone(rhs) if z0 is None else sub(rhs, layout.pack(matvec(z0)))
        products = int(z0 is not None)
        p, rr = clone(r), layout.dot(r, r)
        direction = layout.unpack(p)
        zero = torch.zeros_like(rr) if isinstance(rr, Tensor) else 0.0
        pp, largest, alive = rr, zero, rr > limit
        del rhs  # a copy of b where there are several tensors
        for _ in range(self.max_iter):
            if self.tol is not None and not _any(alive):
                break
            product = layout.pack(matvec(direction))
            products += 1
            # What is not finite becomes NaN, which fails every test below and passes into z, r and the residual.
            curvature = _finite_or_nan(layout.dot(p, product))
            # <p, A p> / <p, p> lies between the extreme eigenvalues of A. Within the round-off of the largest such
            # value met so far, A is singular to working precision, and a step along p would only amplify round-off.
            quotient = _ratio(curvature, pp)
            largest = _maximum(largest, quotient)
            alive = alive > (quotient <= eps * largest)  # alive, and p not flat
            alpha = _where(alive, _ratio(rr, curvature), zero)
            add_scaled_(z, alpha, p)
            add_scaled_(r, alpha, product, sign=-1)
            del product  # so that it is not in memory beside the next one
            rr, previous = layout.dot(r, r), rr
            beta = _where(alive, _ratio(rr, previous), zero)
            scale_add_(p, beta, r)
            pp = rr + beta * beta * pp  # r is orthogonal to the last p
            alive = alive & (rr > limit)
        nonpositive = (rr > limit) > alive  # only a flat p ends a solve above the limit, and r stays as it was then
        residual, failed = _fill(size, rr).sqrt(), _fill(size, nonpositive, torch.bool)
        return SolveResult(layout.unpack(z), residual, size, products, tol, failed, torch.zeros_like(failed))


def _any(condition: bool | Tensor) -> bool:
    return bool(condition.any() if isinstance(condition, Tensor) and condition.dim() else condition)


def _fill(like: Tensor, value: bool | Scalar, dtype: torch.dtype | None = None) -> Tensor:
    return value.reshape(like.shape) if isinstance(value, Tensor) else torch.full_like(like, value, dtype=dtype)


def _finite_or_nan(a: Scalar) -> Scalar:
    if isinstance(a, Tensor):
        return a.nan_to_num(math.nan, math.nan, math.nan)
    return a if math.isfinite(a) else math.nan


def _ratio(a: Scalar, b: Scalar) -> Scalar:
    return a / b if isinstance(b, Tensor) or b else math.nan


def _where(condition: bool | Tensor, a: Scalar, b: Scalar) -> Scalar:
    return torch.where(condition, a, b) if isinstance(condition, Tensor) else a if condition else b


def _maximum(a: Scalar, b: Scalar) -> Scalar:
    return torch.maximum(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else max(a, b)
