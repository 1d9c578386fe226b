"""The Neumann series, whole and truncated at random."""

from __future__ import annotations

import math

import torch

from torchbilevel.blocks import norms
from torchbilevel.linear_solve.base import LinearSolver, MatVec, SolveResult, positive, positive_int
from torchbilevel.tensors import Tensors, axpy, clone, scale, sub, zeros


class Neumann(LinearSolver):
    """Truncated Neumann series z = lr sum_{i=0}^{steps} (I - lr A)^i b.

    Converges if and only if 0 < lr < 2 / L, L the largest eigenvalue of A; the error after Q steps is at most
    (1 - lr mu)^(Q+1) |A^-1 b| for lr <= 1 / L. A start z0 is taken by applying the series to b - A z0.

    Args:
        steps: Q, the number of products; the series has Q + 1 terms.
        lr: alpha, at most 1 / L.
        resample: whether every factor is from a sample of its own, where a method draws independent samples.
        shrink: alpha mu in (0, 1): factor i of i = 0, ..., Q - 1 is then from B Q (1 - alpha mu)^i data points, B the
            batch size, the factor applied first having the most; ``None`` for B each.

    Raises:
        ValueError: if an argument is out of range.

    Cost: ``steps`` products, one more when ``z0`` is given; one vector besides z. The residual reported is that of the
    sum without its last term, an upper bound for lr <= 1 / L.

    Reference: Ghadimi and Wang, arXiv 1802.02246, 2018; Ji, Yang and Liang, ICML 2021 (StocBiO).

    Differs from the paper: nothing.

    >>> Neumann(steps=2, lr=0.5).solve(lambda s: s, (torch.ones(1),)).z  # 0.5 (1 + 0.5 + 0.25)
    (tensor([0.8750]),)
    """

    def __init__(self, steps: int, lr: float, *, resample: bool = True, shrink: float | None = None) -> None:
        if shrink is not None and not 0 < shrink < 1:
            raise ValueError(f"shrink must be in (0, 1) or None, got {shrink}")
        if shrink is not None and not resample:
            raise ValueError(f"shrink={shrink} sizes the samples of the factors, which resample=False makes one")
        self.steps, self.lr = positive_int("steps", steps), positive("lr", lr)
        self.resamples, self.shrink = resample, shrink

    def __repr__(self) -> str:
        options = ("" if self.resamples else ", resample=False") + (f", shrink={self.shrink}" if self.shrink else "")
        return f"Neumann(steps={self.steps}, lr={self.lr}{options})"

    def batch_size(self, i: int, size: int | None) -> int | None:
        """The number of data points for factor i; see the class."""
        if self.shrink is None or size is None:
            return size
        return math.ceil(size * self.steps * (1.0 - self.shrink) ** i)

    @torch.no_grad()
    def solve(self, matvec: MatVec, b: Tensors, z0: Tensors | None = None, tasks: int | None = None) -> SolveResult:
        """Sum the series; see the class."""
        z, r = (zeros(b), clone(b)) if z0 is None else (z0, sub(b, matvec(z0)))
        size = norms(b, tasks)
        start = size if z0 is None else norms(r, tasks)
        z = axpy(self.lr, r, z)
        for _ in range(self.steps):
            torch._foreach_sub_(r, matvec(r), alpha=self.lr)
            torch._foreach_add_(z, r, alpha=self.lr)
        residual, products = norms(r, tasks), self.steps + (z0 is not None)
        nonpositive = torch.zeros_like(residual, dtype=torch.bool)
        return SolveResult(z, residual, size, products, None, nonpositive, residual > start)


class RandomTruncation(LinearSolver):
    """One random term of the Neumann series, z = Q lr (I - lr A)^p b, p uniform on 0, ..., Q - 1.

    Its mean is the sum of the first Q terms, lr sum_{i<Q} (I - lr A)^i b.

    Args:
        steps: Q; one more than the largest number of products.
        lr: alpha, at most 1 / L.

    Raises:
        ValueError: if ``steps`` is not a positive integer or ``lr`` not positive.

    Cost: (Q - 1) / 2 products on average; one vector. Its variance is about Q times that of ``Neumann``. A start z0 is
    of no use to it and ignored; it sees no residual, and reports |b|.

    Reference: Ghadimi and Wang, arXiv 1802.02246, 2018 (BSA, algorithm 3); Khanduri et al., NeurIPS 2021 (SUSTAIN).

    Differs from the paper: nothing.
    """

    resamples = True

    def __init__(self, steps: int, lr: float) -> None:
        self.steps, self.lr = positive_int("steps", steps), positive("lr", lr)
        self.seed = 0

    def __repr__(self) -> str:
        return f"RandomTruncation(steps={self.steps}, lr={self.lr})"

    def drawn(self, seed: int) -> RandomTruncation:
        """The solver with this seed for p."""
        solver = RandomTruncation(self.steps, self.lr)
        solver.seed = seed
        return solver

    @torch.no_grad()
    def solve(self, matvec: MatVec, b: Tensors, z0: Tensors | None = None, tasks: int | None = None) -> SolveResult:
        """Multiply b by p factors; see the class."""
        p = int(torch.randint(self.steps, (), generator=torch.Generator().manual_seed(self.seed)))
        r = clone(b)
        for _ in range(p):
            torch._foreach_sub_(r, matvec(r), alpha=self.lr)
        size = norms(b, tasks)
        never = torch.zeros_like(size, dtype=torch.bool)
        return SolveResult(scale(self.steps * self.lr, r), size, size, p, None, never, norms(r, tasks) > size)
