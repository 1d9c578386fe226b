"""Gradient descent with noise at small gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchbilevel.optim.perturbed import Perturbed


class PerturbedGD(Perturbed):
    r"""Gradient descent, with a random displacement whenever the gradient is small.

    With v_t the gradient and m the step of the last displacement, over all parameters together:

        x_{t+1} = x_t + xi_t,  xi_t uniform in the ball of radius r  if |v_t| <= epsilon and t - m > t_thres
        x_{t+1} = x_t - eta v_t                                      otherwise

    It is ``Perturbed`` around ``torch.optim.SGD``, whose foreach code and group options it so has. See there
    for the window of t_thres steps, the value test and ``result()``.

    Args:
        params: as for every torch optimizer.
        lr: eta >= 0, per group; schedulers may drive it. A group with ``lr = 0`` does not move.
        radius: r >= 0, length in units of x. With 0 the run is that of ``torch.optim.SGD``, bitwise, at every
            step.
        grad_tol: epsilon >= 0, compared with the norm as it is.
        escape_steps: t_thres >= 1, default 50.
        value_test: compare losses t_thres steps after a displacement; ``step`` then needs a closure.
        value_tol: f_thres > 0, the drop that counts as an escape; required with ``value_test``.
        stop: end the run at the first test passed, at the point before the displacement.
        seed: seed of the displacements.
        maximize: ascend instead.

    Raises:
        ValueError: if an argument is out of its range.

    Cost:
        One gradient per step, one pass over it for its norm, and one copy of x after a displacement; with
        ``value_test`` up to two.

    Reference:
        Jin, Netrapalli, Ge, Kakade, Jordan, On Nonconvex Optimization for Machine Learning, JACM 2021,
        Algorithm 1. With ``value_test``: Jin, Ge, Netrapalli, Kakade, Jordan, How to Escape Saddle Points
        Efficiently, ICML 2017, Algorithm 2.

    Differs from the paper:
        The displacement is the whole step, where the papers add a gradient step to it (a difference of eta
        epsilon); the loss is therefore tested one gradient step earlier. ``radius`` is the length of the
        displacement of x, where JACM 2021 multiplies it by eta. A test passed ends the run with ``stop``
        only. The constants of the theory are left to the user.

    >>> x = torch.zeros(2, requires_grad=True)  # exactly at the saddle of x1^2 - x2^2 + x2^4 / 4
    >>> optimizer = PerturbedGD([x], lr=0.1, radius=1e-2, grad_tol=1e-3)
    >>> for _ in range(100):
    ...     optimizer.zero_grad()
    ...     (x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4).backward()
    ...     optimizer.step()
    >>> [round(abs(t), 3) for t in x.tolist()]
    [0.0, 1.414]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        radius: float,
        grad_tol: float,
        escape_steps: int = 50,
        value_test: bool = False,
        value_tol: float | None = None,
        stop: bool = False,
        seed: int = 0,
        maximize: bool = False,
    ) -> None:
        _check_lr(lr)
        super().__init__(
            torch.optim.SGD(params, lr, maximize=maximize),
            radius=radius,
            grad_tol=grad_tol,
            escape_steps=escape_steps,
            value_test=value_test,
            value_tol=value_tol,
            stop=stop,
            seed=seed,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with an ``lr`` of its own if it has one."""
        if "lr" in param_group:
            _check_lr(param_group["lr"])
        super().add_param_group(param_group)


def _check_lr(lr: float | Tensor) -> None:
    if not 0 <= lr < math.inf:
        raise ValueError(f"lr must be non-negative and finite, got {lr}")
