"""Gradient descent on the linear system."""

from __future__ import annotations

import torch

from torchbilevel.blocks import norms
from torchbilevel.linear_solve.base import LinearSolver, MatVec, SolveResult, positive, positive_int
from torchbilevel.tensors import Tensors, axpy, sub, zeros


class SGDSolve(LinearSolver):
    """Stochastic gradient descent on 1/2 <z, A z> - <b, z>: z <- z - lr (A_i z - b), A_i from a sample of its own.

    Args:
        steps: N, the number of steps.
        lr: at most 1 / L.

    Raises:
        ValueError: if ``steps`` is not a positive integer or ``lr`` not positive.

    Cost: one product per step, none for the first where z0 is ``None`` and so zero; one vector. The residual reported
    is |A_i z - b| before the last step.

    Reference: Arbel and Mairal, ICLR 2022 (AmIGO); Dagreou, Ablin, Vaiter and Moreau, NeurIPS 2022.

    Differs from the paper: nothing.

    >>> SGDSolve(steps=2, lr=0.5).solve(lambda s: s, (torch.ones(1),)).z  # 1 - 1/4
    (tensor([0.7500]),)
    """

    resamples = True

    def __init__(self, steps: int, lr: float) -> None:
        self.steps, self.lr = positive_int("steps", steps), positive("lr", lr)

    def __repr__(self) -> str:
        return f"SGDSolve(steps={self.steps}, lr={self.lr})"

    @torch.no_grad()
    def solve(self, matvec: MatVec, b: Tensors, z0: Tensors | None = None, tasks: int | None = None) -> SolveResult:
        """Take the steps; see the class."""
        z, size = z0, norms(b, tasks)
        start, residual = torch.zeros_like(size) if z0 is None else norms(z0, tasks), size
        for _ in range(self.steps):
            g = tuple(-t for t in b) if z is None else sub(matvec(z), b)
            residual = norms(g, tasks)
            z = axpy(-self.lr, g, zeros(b) if z is None else z)
        assert z is not None
        never = torch.zeros_like(size, dtype=torch.bool)
        # Noise alone may raise the residual. But if 0 <= A_i <= 2 / lr, no step lengthens z by more than lr |b|, so
        # that |A_i z - b| <= 2 / lr (|z_0| + (N - 1) lr |b|) + |b| before the last one.
        diverged = residual > 2.0 / self.lr * start + (2.0 * self.steps - 1.0) * size
        return SolveResult(z, residual, size, self.steps - (z0 is None), None, never, diverged)
