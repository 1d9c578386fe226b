"""Solvers for A z = b with A symmetric positive definite, given as a product s -> A s."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchbilevel.tensors import Tensors, add_scaled_, clone, dot, norm, numel, scale, sub, zeros

MatVec = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class SolveResult:
    """What a solve returns.

    Attributes:
        z: the solution found, of the shapes of b.
        residual: |b - A z| as the solver knows it without a further product (0-d tensor).
        scale: |b|, to read the residual against (0-d tensor).
        iterations: products with A.
        tol: the relative tolerance asked for, or ``None``.
        nonpositive: whether a direction s with <s, A s> <= 0 was met (0-d bool tensor).
        diverged: whether the residual ended above |b| although the method contracts it when its step is right.
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
        if not bool(torch.isfinite(self.residual)):
            return "non-finite"
        if bool(self.nonpositive):
            return "non-positive curvature"
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

    From r = p = b - A z:   alpha = <r, r> / <p, A p>,   z += alpha p,   r -= alpha A p,   p = r + (<r', r'> / <r, r>) p.

    The error in the A-norm contracts at least by (sqrt(kappa) - 1) / (sqrt(kappa) + 1) per step. A direction with
    <p, A p> <= 0 ends the solve there: z is what was found so far and the result says ``"non-positive curvature"``.

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
        bb = dot(b, b)
        floor = torch.finfo(bb.dtype).eps
        limit = bb * (max(self.tol, floor) if self.tol is not None else floor) ** 2
        if z0 is None:
            z, r, iterations = zeros(b), clone(b), 0
        else:
            z, r, iterations = clone(z0), sub(b, matvec(z0)), 1
        p, rr = clone(r), dot(r, r)
        alive, nonpositive = rr > limit, torch.zeros_like(bb, dtype=torch.bool)
        for _ in range(self.max_iter):
            if self.tol is not None and not bool(alive):
                break
            product = matvec(p)
            iterations += 1
            curvature = dot(p, product)
            nonpositive = nonpositive | (alive & ~(curvature > 0))
            alive = alive & (curvature > 0)
            alpha = torch.where(alive, rr / curvature, 0.0)
            add_scaled_(z, alpha, p)
            add_scaled_(r, -alpha, product)
            rr, previous = torch.where(alive, dot(r, r), rr), rr
            beta = torch.where(alive, rr / previous, 0.0)
            p = tuple(s.mul_(beta.to(s.device, s.dtype)).add_(t) for s, t in zip(p, r, strict=True))
            # A residual that is not finite stays alive, so that the next curvature test ends the solve.
            alive = alive & ~(rr <= limit)
        # A curvature that is NaN counts as non-finite, not as non-positive: the residual below carries it.
        residual = (
            torch.where(nonpositive & torch.isnan(curvature), torch.nan, rr.sqrt())
            if iterations > (z0 is not None)
            else rr.sqrt()
        )
        return SolveResult(
            z,
            residual,
            bb.sqrt(),
            iterations,
            max(self.tol or 0.0, floor),
            nonpositive,
            torch.zeros_like(nonpositive),
        )


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
        if z0 is None:
            r, z, first = clone(b), scale(self.lr, b), None
        else:
            r = first = sub(b, matvec(z0))
            z, r = tuple(s + self.lr * t for s, t in zip(z0, r, strict=True)), clone(r)
        for _ in range(self.steps):
            for s, t in zip(r, matvec(r), strict=True):
                s.sub_(t, alpha=self.lr)
            for s, t in zip(z, r, strict=True):
                s.add_(t, alpha=self.lr)
        residual, size = norm(r), norm(b)
        false = torch.zeros_like(size, dtype=torch.bool)
        diverged = residual > (size if first is None else norm(first))
        return SolveResult(z, residual, size, self.steps + (z0 is not None), None, false, diverged)


class Direct(LinearSolver):
    """Exact solve by forming A column by column and factorising it: for small problems and for reference.

    Args:
        max_size: largest number of unknowns accepted, default 2000.

    Raises:
        ValueError: from ``solve``, if b has more unknowns than ``max_size``.

    Cost: one product per unknown and O(n^3) arithmetic; n^2 numbers of memory. A warm start is of no use and ignored.

    Reference: Cholesky factorisation of the symmetrised matrix; where it fails, A is not positive definite and an LU
    solve is returned under the status ``"non-positive curvature"``.

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
        matrix = dense(matvec, b)
        rhs = flatten(b)
        factor, info = torch.linalg.cholesky_ex(matrix)
        indefinite = info > 0
        solution = (
            torch.linalg.solve_ex(matrix, rhs)[0]
            if bool(indefinite)
            else torch.cholesky_solve(rhs[:, None], factor)[:, 0]
        )
        residual, size = (rhs - matrix @ solution).norm(), rhs.norm()
        tol = n * torch.finfo(rhs.dtype).eps ** 0.5
        return SolveResult(unflatten(solution, b), residual, size, n, tol, indefinite, torch.zeros_like(indefinite))


def flatten(a: Tensors) -> Tensor:
    """One vector of all entries, on the device of the first tensor and in the widest dtype."""
    dtype = a[0].dtype
    for t in a[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return torch.cat([t.reshape(-1).to(a[0].device, dtype) for t in a])


def unflatten(vector: Tensor, like: Tensors) -> Tensors:
    """The inverse of ``flatten``: pieces of a vector in the shapes, dtypes and devices of ``like``."""
    pieces = vector.split([t.numel() for t in like])
    return tuple(v.reshape(t.shape).to(t.device, t.dtype) for v, t in zip(pieces, like, strict=True))


def dense(matvec: MatVec, like: Tensors) -> Tensor:
    """The symmetrised matrix of a product, formed column by column."""
    basis = torch.eye(numel(like), dtype=flatten(like).dtype, device=like[0].device)
    matrix = torch.stack([flatten(matvec(unflatten(e, like))) for e in basis])
    return 0.5 * (matrix + matrix.T)


def _positive_int(name: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value}")
    return value
