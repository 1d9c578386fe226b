"""Smallest eigenpair of a symmetric operator by Lanczos with full reorthogonalisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
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


def distance_below(ritz: Tensor, betas: list[float], overlap: float) -> float:
    """How far below the smallest Ritz value the smallest eigenvalue can lie.

    Lanczos from b gives p(A) b = (beta_1 ... beta_k) q with |q| = 1 and p the monic polynomial whose roots are the Ritz
    values theta_j. Taking the component along the eigenvector v of the smallest eigenvalue lambda,

        prod_j (theta_j - lambda) |<v, b>| <= beta_1 ... beta_k.

    The left side grows as lambda goes down from theta_1, so |<v, b>| >= t bounds theta_1 - lambda. This holds for all k
    at once, so that one may stop whenever the bound suffices.

    Args:
        ritz: Ritz values in ascending order, shape (k,), float64.
        betas: beta_1, ..., beta_k, positive.
        overlap: t.

    Returns:
        The largest s with prod_j (theta_j - theta_1 + s) <= beta_1 ... beta_k / t.

    Reference: Van Dorsselaer, Hochstenbach and Van der Vorst, SIAM J. Matrix Anal. Appl. 22, 2000, section 3.

    >>> round(distance_below(torch.tensor([0.0, 3.0]).double(), [1.0, 1.0], 0.25), 5)  # s (3 + s) = 4
    1.0
    """
    shifts = ritz - ritz[0]
    target = sum(map(math.log, betas)) - math.log(overlap)
    # In u = log s the logarithm of the left side is convex and grows at least as fast as u, so Newton's iteration from
    # the right of the root, where each factor is s alone, goes down to it without passing it.
    u = min(target / len(betas), 700.0)
    for _ in range(50):
        factors = shifts + math.exp(u)
        excess, slope = torch.stack([factors.log().sum() - target, (math.exp(u) / factors).sum()]).tolist()
        u = max(u - max(excess, 0.0) / slope, -700.0)
        if excess <= 1e-3:
            break
    return math.exp(u)


@torch.no_grad()
def smallest_eigenpair(
    operator: Operator,
    start: Tensor,
    *,
    max_basis: int = 300,
    tol: float | None = None,
    failure_probability: float = 1e-6,
    enough: Callable[[float, float, float], bool] | None = None,
    redraw: Callable[[], Tensor] | None = None,
) -> Eigenpair:
    """Lanczos on A from ``start``, which should be drawn at random (standard normal).

    The basis is kept and every new vector is orthogonalised against all of it twice, so Ritz values have no ghosts.
    For a direction b that is uniform on the sphere and any unit vector v,

        P(|<v, b>| < t) <= t sqrt(2 n / pi),

    which turns ``distance_below`` into a bound that fails with a stated probability. What the orthogonalisation finds
    beside the tridiagonal matrix measures how far the computed operator is from a symmetric one; it is added.

    Args:
        operator: v -> A v, A symmetric of order n.
        start: shape (n,), its length does not matter. For an operator on a subspace, a vector of that subspace.
        max_basis: cap on the basis, which takes max_basis * n numbers of memory.
        tol: without ``enough``: stop when the residual is at most tol, and ``error`` at most sqrt(tol), times the
            largest Ritz value in modulus; default 1e3 eps.
        failure_probability: of the bound ``error``.
        enough: stop as soon as ``enough(value, residual, error)`` holds, in place of ``tol``.
        redraw: another random vector, to go on with where round-off ends the Krylov space of the first (multiple
            eigenvalues in float32); by default Lanczos stops there, with a larger ``error``.

    Returns:
        The eigenpair. Cost: one product per basis vector and one for the final residual; O(k^2 n) arithmetic.

    Reference: Lanczos, 1950; Parlett, The Symmetric Eigenvalue Problem, SIAM, 1998, chapter 13. That a random start
    makes such bounds possible: Kuczynski and Wozniakowski, SIAM J. Matrix Anal. Appl. 13, 1992; by their theorem 4.2
    a precision of eps times the spread of the spectrum takes log(1.648 sqrt(n) / failure_probability) / (2 sqrt(eps))
    products at most, and as a rule far fewer.

    >>> pair = smallest_eigenpair(lambda v: torch.tensor([3.0, -1.0, 2.0]) * v, torch.ones(3))
    >>> round(pair.value, 5), pair.exact
    (-1.0, True)
    """
    n, eps = start.numel(), torch.finfo(start.dtype).eps
    tol = 1e3 * eps if tol is None else tol
    overlap = failure_probability / math.sqrt(2 * n / math.pi)
    limit = min(n, max_basis)
    basis = torch.empty(limit, n, dtype=start.dtype, device=start.device)
    basis[0] = start / start.norm()
    alphas: list[float] = []
    betas: list[float] = []
    noise = 0.0
    for k in range(1, limit + 1):
        w = operator(basis[k - 1])
        w, along = _orthogonalise(w, basis[:k])
        beyond = along[:-1].clone()  # of an exactly symmetric A: zero but for the last entry, which repeats beta
        if k > 1:
            beyond[-1] -= betas[-1]
        alpha, beta, asymmetry = torch.stack([along[-1], w.norm(), beyond.norm()]).tolist()
        alphas.append(alpha)
        size = max(map(abs, alphas + betas))
        noise = math.hypot(noise, asymmetry)
        following: Tensor | None = w / beta
        if not beta > 100 * eps * size + 2 * noise:  # the Krylov space is invariant up to round-off
            following = None if redraw is None else _fresh(redraw(), basis[:k])
            noise = math.hypot(noise, 2 * beta)
        betas.append(max(beta, eps * size, 1e-300))
        everything = k == n or (following is None and redraw is not None)
        # The small eigenproblem is not free: it is solved at every step at first, then whenever k has grown by 1/16.
        if k == limit or following is None or k % max(1, k // 16) == 0:
            ritz, vectors = _tridiagonal(alphas, betas[:-1])
            value, largest, coefficients = float(ritz[0]), float(ritz[-1]), vectors[:, 0]
            size = max(abs(value), abs(largest))
            residual = beta * abs(float(coefficients[-1]))
            below, rounding = 0.0 if everything else distance_below(ritz, betas, overlap), k * eps * size + noise
            error = below + rounding
            if below < 0.1 * rounding:  # the operator is not known any better
                satisfied = True
            elif enough is None:
                satisfied = residual <= tol * size and error <= math.sqrt(tol) * size
            else:
                satisfied = enough(value, residual, error)
            if k == limit or following is None or satisfied:
                break
        assert following is not None  # where it is None, the loop has ended
        basis[k] = following
    v = basis[:k].T @ coefficients.to(start)
    v = v / v.norm()
    image = operator(v)
    rayleigh, off = torch.stack([v @ image, (image - (v @ image) * v).norm()]).tolist()
    return Eigenpair(rayleigh, v, off, largest, error + max(0.0, rayleigh - value), k + 1, following is None or k == n)


def _orthogonalise(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Remove what lies in the span of the rows of a basis, and return it as coefficients; twice is enough."""
    along = basis @ w
    w = w - basis.T @ along
    again = basis @ w
    return w - basis.T @ again, along + again


def _fresh(w: Tensor, basis: Tensor) -> Tensor | None:
    """A unit vector orthogonal to a basis, ``None`` if w lies in its span."""
    rest = _orthogonalise(w / w.norm(), basis)[0]
    if not bool(rest.norm() > torch.finfo(w.dtype).eps ** 0.5):
        return None
    rest = _orthogonalise(rest / rest.norm(), basis)[0]
    unit: Tensor = rest / rest.norm()
    return unit


def _tridiagonal(alphas: list[float], betas: list[float]) -> tuple[Tensor, Tensor]:
    diagonal, off = torch.tensor(alphas, dtype=torch.float64), torch.tensor(betas, dtype=torch.float64)
    if not bool(torch.isfinite(diagonal).all() & torch.isfinite(off).all()):
        return diagonal * torch.nan, torch.eye(len(alphas), dtype=torch.float64)
    ritz, vectors = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
    return ritz, vectors
