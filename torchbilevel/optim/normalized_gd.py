"""Gradient descent with steps of a given length."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchbilevel.optim.base import Closure, Loss, Rule
from torchbilevel.tensors import norm


class NormalizedGD(Rule):
    r"""Gradient descent whose steps have a given length, whatever the length of the gradient.

    With v_t the gradient over all parameters together:

        x_{t+1} = x_t - (eta / |v_t|) v_t
        x_{t+1} = x_t - min(eta / |v_t|, eta_max) v_t   with ``max_rate``

    Where the gradient is zero nothing moves.

    Args:
        params: as for every torch optimizer.
        lr: eta >= 0, the *length* of a step, per group (a group moves by lr |v_g| / |v|); schedulers may drive it.
            A group with ``lr = 0`` does not move and does not count in |v|.
        max_rate: eta_max > 0, an ordinary learning rate, per group: near a stationary point, |v| < eta / eta_max, steps
            are those of gradient descent and shrink with v. ``None``, the default, is no bound.

    Raises:
        ValueError: if an argument is out of its range.

    Cost:
        One gradient per step and one pass over it for its norm. No copies.

    Reference:
        Luo, Ye, Huang, Zhang, Stochastic Recursive Gradient Descent Ascent for Stochastic Nonconvex-Strongly-Concave
        Minimax Problems, NeurIPS 2020 (SREDA): ``lr`` = epsilon / (5 kappa L), ``max_rate`` =
        1 / (10 kappa L). Without ``max_rate``: Fang, Li, Lin, Zhang, SPIDER, NeurIPS 2018, Algorithm 1.

    Differs from the paper:
        nothing.

    >>> x = torch.tensor([30.0, 40.0], requires_grad=True)
    >>> optimizer = NormalizedGD([x], lr=5.0)
    >>> (x**2).sum().backward()
    >>> optimizer.step()
    >>> x
    tensor([27., 36.], requires_grad=True)
    """

    def __init__(self, params: ParamsT, lr: float | Tensor, max_rate: float | None = None) -> None:
        _check(options := {"lr": lr, "max_rate": max_rate})
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Loss:  # type: ignore[override]
        """Move the parameters once; nothing has moved when the loss or a gradient is refused.

        Args:
            closure: torch's own: clears the gradients, computes them and returns the loss. Called exactly once.

        Returns:
            What ``closure`` returned, ``None`` without one.
        """
        loss, _ = self._evaluate(closure)
        points, gradients, size = self._gradients()
        if not points:
            return loss
        if overflow := math.isinf(size):
            # The squares of finite entries overflow; the direction of the shrunk gradient is the same.
            largest = max(float(g.abs().max()) for g in gradients if g.numel())
            gradients = tuple(g / largest for g in gradients)
            size = float(norm(gradients))
        groups = {p: group for group in self.param_groups for p in group["params"]}
        for p, g in zip(points, gradients, strict=True) if size > 0 else ():
            rate, bound = float(groups[p]["lr"]) / size, groups[p]["max_rate"]
            p.sub_(g, alpha=rate if bound is None or overflow else min(rate, bound))
        self.steps += 1
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with an ``lr`` and a ``max_rate`` of its own if it has them."""
        _check(param_group)
        super().add_param_group(param_group)


def _check(options: dict[str, Any]) -> None:
    """Refuse options out of range, those of the constructor and those of a group."""
    if not 0 <= options.get("lr", 0.0) < math.inf:
        raise ValueError(f"lr must be non-negative and finite, got {options['lr']}")
    bound = options.get("max_rate")
    if bound is not None and not 0 < bound < math.inf:
        raise ValueError(f"max_rate must be positive and finite, or None for no bound, got {bound}")
