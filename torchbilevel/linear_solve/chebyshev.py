"""Chebyshev's semi-iteration."""

from __future__ import annotations

import torch

from torchbilevel.blocks import norms
from torchbilevel.linear_solve.base import LinearSolver, MatVec, SolveResult, positive, positive_int
from torchbilevel.tensors import Tensors, axpy, clone, scale, sub, zeros


class Chebyshev(LinearSolver):
    """Chebyshev's semi-iteration for a spectrum within [mu, L]: the error of CG's bound without inner products.

    With theta = (L + mu) / 2, delta = (L - mu) / 2, rho_0 = delta / theta, p_0 = r_0 / theta:   z += p, r -= A p,
    rho' = 1 / (2 theta / delta - rho), p = rho' rho p + (2 rho' / delta) r.

    After k steps the error is at most 2 ((sqrt(kappa) - 1) / (sqrt(kappa) + 1))^k times that of the start.

    Args:
        steps: products.
        mu: a positive lower bound of the eigenvalues of A.
        smoothness: L, an upper bound.

    Raises:
        ValueError: if an argument is out of range.

    Cost: ``steps`` products, one more when ``z0`` is given; two vectors besides z. Never waits for the device.

    Reference: Golub and Varga, Numerische Mathematik, 1961; used by Luo, Li and Chen, NeurIPS 2022 (IMCN).

    Differs from the paper: nothing.

    >>> Chebyshev(steps=1, mu=2.0, smoothness=2.0).solve(lambda s: (2 * s[0],), (torch.ones(1),)).z
    (tensor([0.5000]),)
    """

    def __init__(self, steps: int, mu: float, smoothness: float) -> None:
        self.steps, self.mu = positive_int("steps", steps), positive("mu", mu)
        self.smoothness = positive("smoothness", smoothness)
        if smoothness < mu:
            raise ValueError(f"smoothness must be at least mu={mu}, got {smoothness}")

    def __repr__(self) -> str:
        return f"Chebyshev(steps={self.steps}, mu={self.mu}, smoothness={self.smoothness})"

    @torch.no_grad()
    def solve(self, matvec: MatVec, b: Tensors, z0: Tensors | None = None, tasks: int | None = None) -> SolveResult:
        """Iterate; see the class."""
        theta, delta = (self.smoothness + self.mu) / 2, (self.smoothness - self.mu) / 2
        z, r = (zeros(b), clone(b)) if z0 is None else (z0, sub(b, matvec(z0)))
        start, rho, p = norms(r, tasks), delta / theta, scale(1 / theta, r)
        for k in range(self.steps):
            z, r = axpy(1.0, p, z), sub(r, matvec(p))
            if k < self.steps - 1:
                # With one eigenvalue, delta = 0, the limit of the recursion is a step 1 / theta.
                ahead = 1 / (2 * theta / delta - rho) if delta else 0.0
                p = axpy(ahead * rho, p, scale(2 * ahead / delta if delta else 1 / theta, r))
                rho = ahead
        residual, never = norms(r, tasks), torch.zeros_like(start, dtype=torch.bool)
        return SolveResult(
            z, residual, norms(b, tasks), self.steps + (z0 is not None), None, never, residual > 2 * start
        )
