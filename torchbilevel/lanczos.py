"""Smallest eigenpair of a symmetric operator by Lanczos with full reorthogonalisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Eigenpair:
    """An approximate smallest eigenpair (theta, v) of A.

    Attributes:
        value: theta = <v, A v>, an upper bound of the smallest eigenvalue.
        vector: v, of unit length, shape (n,).
        residual: |A v - theta v|; some eigenvalue lies within this distance of theta.
        largest: the largest Ritz value, a lower bound of the largest eigenvalue.
        error: with probability 1 - failure_probability over the random start, the smallest eigenvalue is at least
            value - error.
        products: products with A.
        exact: whether the Krylov space was exhausted, so that theta is an eigenvalue up to round-off.
    """

    value: float
    vector: Tensor
    residual: float
    largest: float
    error: float
    products: int
    exact: bool


def probability_bound(n: int, steps: int, failure_probability: float) -> float:
    """Relative error of the largest Ritz value of a positive semidefinite matrix, random start, k Lanczos steps.

    P( (lambda_1 - theta) / lambda_1 > eps ) <= 1.648 sqrt(n) exp(-sqrt(eps) (2 k - 1)), solved for eps. Applied to
    lambda_max I - A it bounds the error of the smallest Ritz value relative to the spread lambda_max - lambda_min.

    Args:
        n: dimension.
        steps: k, at least 1.
        failure_probability: in (0, 1).

    Returns:
        eps, at most 1.

    Reference: Kuczynski and Wozniakowski, SIAM J. Matrix Anal. Appl. 13, 1992, Theorem 4.2.

    >>> round(probability_bound(10_000, 100, 1e-6), 4)
    0.0089
    """
    return min(1.0, (math.log(1.648 * math.sqrt(n) / failure_probability) / (2 * steps - 1)) ** 2)


@torch.no_grad()
def smallest_eigenpair(
    operator: Operator,
    start: Tensor,
    *,
    max_basis: int = 300,
    tol: float | None = None,
    failure_probability: float = 1e-6,
    enough: Callable[[float, float, float], bool] | None = None,
) -> Eigenpair:
    """Lanczos on A from ``start``, which should be drawn at random (standard normal).

    The basis is kept and every new vector is orthogonalised against all of it twice, so Ritz values have no ghosts.

    Args:
        operator: v -> A v, A symmetric of order n.
        start: shape (n,), its length does not matter. For an operator on a subspace, a vector of that subspace.
        max_basis: cap on the basis, which takes max_basis * n numbers of memory.
        tol: without ``enough``: stop when the residual is at most tol times the largest Ritz value in modulus; default
            1e3 eps.
        failure_probability: of the bound ``error``.
        enough: stop as soon as ``enough(value, residual, error)`` holds, in place of ``tol``.

    Returns:
        The eigenpair. Cost: one product per basis vector and one for the final residual; O(k^2 n) arithmetic.

    Reference: Lanczos, 1950; Parlett, The Symmetric Eigenvalue Problem, SIAM, 1998, chapter 13.

    >>> pair = smallest_eigenpair(lambda v: torch.tensor([3.0, -1.0, 2.0]) * v, torch.ones(3))
    >>> round(pair.value, 5), pair.exact
    (-1.0, True)
    """
    n, eps = start.numel(), torch.finfo(start.dtype).eps
    tol = 1e3 * eps if tol is None else tol
    limit = min(n, max_basis)
    basis = torch.zeros(limit, n, dtype=start.dtype, device=start.device)
    basis[0] = start / start.norm()
    alphas: list[float] = []
    betas: list[float] = []
    for k in range(1, limit + 1):
        w = operator(basis[k - 1])
        alphas.append(float(basis[k - 1] @ w))
        for _ in range(2):
            w = w - basis[:k].T @ (basis[:k] @ w)
        beta = float(w.norm())
        invariant = k == n or beta <= 10 * eps * math.sqrt(k) * max(map(abs, alphas + betas))
        if not (invariant or k < 20 or k % (k // 10) == 0 or k == limit):  # the small eigenproblem is not free
            betas.append(beta)
            basis[k] = w / beta
            continue
        ritz, vectors = _tridiagonal(alphas, betas)
        value, largest, coefficients = float(ritz[0]), float(ritz[-1]), vectors[:, 0]
        size = max(abs(value), abs(largest))
        residual = beta * abs(float(coefficients[-1]))
        # The spread lambda_max - lambda_min exceeds that of the Ritz values by at most the relative error at either end.
        # Both ends of the spectrum must be met, so each gets half of the failure probability.
        relative = probability_bound(n, k, failure_probability / 2)
        error = 0.0 if invariant else math.inf if relative >= 0.5 else (largest - value) * relative / (1 - 2 * relative)
        satisfied = residual <= tol * size if enough is None else enough(value, residual, error)
        if invariant or satisfied or k == limit:
            break
        betas.append(beta)
        basis[k] = w / beta
    v = basis[:k].T @ coefficients.to(start)
    v = v / v.norm()
    image = operator(v)
    value = float(v @ image)
    residual = float((image - value * v).norm())
    return Eigenpair(value, v, residual, largest, residual if invariant else error, k + 1, invariant)


def _tridiagonal(alphas: list[float], betas: list[float]) -> tuple[Tensor, Tensor]:
    diagonal, off = torch.tensor(alphas, dtype=torch.float64), torch.tensor(betas, dtype=torch.float64)
    ritz, vectors = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
    return ritz, vectors
