"""Solvers for A z = b with A symmetric positive definite, given as a product s -> A s."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchbilevel.tensors import (
    Layout,
    Scalar,
    Tensors,
    accumulator,
    add_scaled_,
    axpy,
    clone,
    flatten,
    norm,
    numel,
    scale_add_,
    sub,
    unflatten,
    zeros,
)

MatVec = Callable[[Tensors], Tensors]


@dataclass(frozen=True, eq=False)
class SolveResult:
    """What a solve returns.

    Attributes:
        z: the solution found, of the shapes of b.
        residual: |b - A z| as the solver knows it without a further product (0-d tensor).
        scale: |b|, to read the residual against (0-d tensor).
        iterations: products with A.
        tol: the relative tolerance asked for, or ``None``.
        nonpositive: whether a direction s with <s, A s> <= 0 was met (0-d bool tensor).
        diverged: whether the residual ended above where it began, in a method that contracts it when its step is right.
    """

    z: Tensors
    residual: Tensor
    scale: Tensor
    iterations: int
    tol: float | None
    nonpositive: Tensor
    diverged: Tensor

    @property
    def status(self) -> str:
        """``"converged"``, ``"steps done"``, ``"non-positive curvature"``, ``"diverged"`` or ``"non-finite"``."""
        if bool(self.nonpositive):
            return "non-positive curvature"
        if not bool(torch.isfinite(self.residual)):
            return "non-finite"
        if bool(self.diverged):
            return "diverged"
        if self.tol is not None and bool(self.residual <= self.tol * self.scale):
            return "converged"
        return "steps done"


class LinearSolver(ABC):
    """A solver for A z = b: settings only, no state."""

    @abstractmethod
    def solve(self, matvec: MatVec, b: Tensors, z0: Tensors | None = None) -> SolveResult:
        """Solve A z = b.

        Args:
            matvec: the product s -> A s.
            b: right-hand side.
            z0: where to start; ``None`` starts at zero, which costs no product.

        Returns:
            The solution with its residual.
        """


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
        self.max_iter, self.tol = _positive_int("max_iter", max_iter), tol
        if tol is not None and not tol > 0:
            raise ValueError(f"tol must be positive or None, got {tol}")

    def __repr__(self) -> str:
        return f"CG(max_iter={self.max_iter}, tol={self.tol})"

    @torch.no_grad()
    def solve(self, matvec: MatVec, b: Tensors, z0: Tensors | None = None) -> SolveResult:
        """Solve A z = b; see the class."""
        layout, size = Layout(b), norm(b)
        rhs = layout.pack(b)
        bb = layout.dot(rhs, rhs)
        tol = max(self.tol or 0.0, *(torch.finfo(t.dtype).eps for t in b))
        limit, eps = tol**2 * bb, torch.finfo(size.dtype).eps
        if z0 is not None and self.tol is not None and not bool(bb > 0):
            z0 = None  # b = 0 has the solution 0, and no residual but 0 would meet the tolerance
        z = zeros(rhs) if z0 is None else clone(layout.pack(z0))
        r = clone(rhs) if z0 is None else sub(rhs, layout.pack(matvec(z0)))
        products = int(z0 is not None)
        p, rr = clone(r), layout.dot(r, r)
        direction = layout.unpack(p)
        zero = torch.zeros_like(size) if isinstance(rr, Tensor) else 0.0
        pp, largest, alive = rr, zero, rr > limit
        del rhs  # a copy of b where there are several tensors
        for _ in range(self.max_iter):
            if self.tol is not None and not bool(alive):
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
        residual = torch.as_tensor(rr, dtype=size.dtype, device=size.device).sqrt()
        failed = torch.as_tensor(nonpositive, device=size.device)
        return SolveResult(layout.unpack(z), residual, size, products, tol, failed, torch.zeros_like(failed))


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


class Neumann(LinearSolver):
    """Truncated Neumann series z = lr sum_{i=0}^{steps} (I - lr A)^i b.

    Converges if and only if 0 < lr < 2 / L, L the largest eigenvalue of A; the error after Q steps is at most
    (1 - lr mu)^(Q+1) |A^-1 b| for lr <= 1 / L. A start z0 is taken by applying the series to b - A z0.

    Args:
        steps: Q, the number of products; the series has Q + 1 terms.
        lr: alpha, at most 1 / L.

    Raises:
        ValueError: if ``steps`` is not a positive integer or ``lr`` not positive.

    Cost: ``steps`` products, one more when ``z0`` is given; one vector besides z. The residual reported is that of the
    sum without its last term, an upper bound for lr <= 1 / L.

    Reference: Ghadimi and Wang, arXiv 1802.02246, 2018; Ji, Yang and Liang, ICML 2021 (StocBiO).

    Differs from the paper: nothing; one operator serves all factors here.

    >>> Neumann(steps=2, lr=0.5).solve(lambda s: s, (torch.ones(1),)).z  # 0.5 (1 + 0.5 + 0.25)
    (tensor([0.8750]),)
    """

    def __init__(self, steps: int, lr: float) -> None:
        self.steps, self.lr = _positive_int("steps", steps), lr
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")

    def __repr__(self) -> str:
        return f"Neumann(steps={self.steps}, lr={self.lr})"

    @torch.no_grad()
    def solve(self, matvec: MatVec, b: Tensors, z0: Tensors | None = None) -> SolveResult:
        """Sum the series; see the class."""
        z, r = (zeros(b), clone(b)) if z0 is None else (z0, sub(b, matvec(z0)))
        start = norm(r)
        z = axpy(self.lr, r, z)
        for _ in range(self.steps):
            torch._foreach_sub_(r, matvec(r), alpha=self.lr)
            torch._foreach_add_(z, r, alpha=self.lr)
        residual, products = norm(r), self.steps + (z0 is not None)
        nonpositive = torch.zeros_like(residual, dtype=torch.bool)
        return SolveResult(z, residual, norm(b), products, None, nonpositive, residual > start)


class Direct(LinearSolver):
    """Exact solve by forming A column by column and factorising it: for small problems and for reference.

    Args:
        max_size: largest number of unknowns accepted, default 2000.

    Raises:
        ValueError: from ``solve``, if b has more unknowns than ``max_size``.

    Cost: one product per unknown and O(n^3) arithmetic; n^2 numbers of memory. A warm start is of no use and ignored.

    Reference: Cholesky factorisation of the symmetrised matrix; where it fails, A is not positive definite, and the
    least-squares solution of least norm is returned under the status ``"non-positive curvature"``.

    >>> Direct().solve(lambda s: (2 * s[0],), (torch.ones(2),)).z
    (tensor([0.5000, 0.5000]),)
    """

    def __init__(self, max_size: int = 2000) -> None:
        self.max_size = _positive_int("max_size", max_size)

    def __repr__(self) -> str:
        return f"Direct(max_size={self.max_size})"

    @torch.no_grad()
    def solve(self, matvec: MatVec, b: Tensors, z0: Tensors | None = None) -> SolveResult:
        """Form A and solve; see the class."""
        n = numel(b)
        if n > self.max_size:
            raise ValueError(
                f"Direct forms a matrix with {n} rows, more than max_size={self.max_size}; use CG, or raise max_size"
            )
        matrix, rhs = accumulator(dense(matvec, b)), accumulator(flatten(b))
        factor, info = torch.linalg.cholesky_ex(matrix)
        nonpositive = (info > 0) & torch.isfinite(matrix).all()
        if bool(nonpositive):
            solution = torch.linalg.pinv(matrix, hermitian=True) @ rhs
        else:
            solution = torch.cholesky_solve(rhs[:, None], factor)[:, 0]
        residual, tol = (rhs - matrix @ solution).norm(), torch.finfo(b[0].dtype).eps ** 0.5
        return SolveResult(
            unflatten(solution, b), residual, rhs.norm(), n, tol, nonpositive, torch.zeros_like(nonpositive)
        )


def dense(matvec: MatVec, like: Tensors) -> Tensor:
    """The symmetrised matrix of a product, formed column by column."""
    basis = torch.eye(numel(like), dtype=flatten(like).dtype, device=like[0].device)
    matrix = torch.stack([flatten(matvec(unflatten(e, like))) for e in basis])
    return 0.5 * (matrix + matrix.T)


def _positive_int(name: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value}")
    return value
