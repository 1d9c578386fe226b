"""SARAH with restarts: a solution of the lower problem under noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torchbilevel.linear_solve.base import positive_int
from torchbilevel.lower.base import Gradient, LowerResult, LowerSolver
from torchbilevel.lower.hyperparameters import check_range, descend
from torchbilevel.tensors import Tensors, add, detach, sub


class PiSARAH(LowerSolver):
    """Projected inexact SARAH: each restart rests on a large sample, and small ones carry its gradient along.

    J times, from w_0 = y, with P the projection of y:

        v_0 = g_y(w_0; A),   v_k = v_{k-1} + g_y(w_k; S_k) - g_y(w_{k-1}; S_k),   w_{k+1} = P(w_k - lr v_k),

    k = 0, ..., m - 1, and y = w_m. Every restart shrinks the error by a factor, down to what the noise of A leaves;
    stochastic gradient descent on the S_k alone would stop at their noise. It serves as ``initial_solver``, and as a
    ``lower_solver`` where no recursion moves y.

    Args:
        lr: gamma, positive; in theory of the order of 1 / L.
        steps: m, steps of one restart; in theory of the order of kappa.
        restarts: J, the number of large samples; in theory of the order of log(1 / accuracy).

    Raises:
        TypeError: if ``lr`` is no number.
        ValueError: if an argument is out of range.

    Cost: per restart one gradient on A and 2 (m - 1) on the S_k. A has the method's anchor size, S_k its size for
    gradients of g; on a single sample for all uses this is ``GD`` with J m steps, at nearly twice the cost. Keeps two
    copies of y, and v.

    Reference: Nguyen, Liu, Scheinberg and Takac, ICML 2017 (SARAH); with projections as the start of SREDA in Luo, Ye,
    Huang and Zhang, NeurIPS 2020.

    Differs from the paper: a restart ends at w_m, there at one of w_1, ..., w_m drawn at random.
    """

    def __init__(self, lr: float, steps: int, restarts: int) -> None:
        super().__init__(steps, None)
        if callable(lr):
            raise TypeError(f"lr must be a number, got {lr}; GD(lr=...) can learn one")
        check_range("lr", lr, 0.0, float("inf"))
        self.lr, self.restarts = lr, positive_int("restarts", restarts)

    @torch.no_grad()
    def run(
        self,
        gradient: Gradient,
        y: Tensors,
        state: Any,
        project: Callable[[Tensors], Tensors],
        tasks: int | None = None,
    ) -> LowerResult:
        """Restart and take the steps; see ``LowerSolver.run``."""
        y = detach(y)
        for first in range(0, self.restarts * self.steps, self.steps):
            v = gradient.at(y, first, anchor=True)
            for k in range(first + 1, first + self.steps):
                last, y = y, project(descend(y, v, self.lr))
                v = add(v, sub(gradient.at(y, k), gradient.at(last, k)))
            y = project(descend(y, v, self.lr))
        return LowerResult(y, None, self.restarts * self.steps, None)
