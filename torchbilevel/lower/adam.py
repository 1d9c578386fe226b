"""Adam and AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchbilevel.lower.base import Unrollable
from torchbilevel.lower.hyperparameters import (
    Hyperparameter,
    check_flag,
    check_number,
    check_range,
    descend,
    each,
    is_zero,
    times,
)
from torchbilevel.tensors import Tensors, zeros


class Adam(Unrollable):
    """Adam on g, and AdamW with ``decoupled_weight_decay=True``.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,
    y <- P(y - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)).

    Args:
        lr: step size, positive, or a function of the upper module as in ``GD``.
        steps: steps at most.
        betas: the two decay rates, in [0, 1).
        eps: added to the denominator, non-negative.
        weight_decay: L2 penalty, non-negative, or a function of the upper module.
        decoupled_weight_decay: shrink y by lr * weight_decay instead of adding to the gradient (AdamW).
        tol: stop when |g_y| <= tol.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if one is out of range.

    Cost: one gradient of g per step, two extra copies of y.

    Reference: Kingma and Ba, ICLR 2015; Loshchilov and Hutter, ICLR 2019 (AdamW).

    Differs from the paper: nothing; equal to ``torch.optim.Adam`` and ``AdamW`` step for step. Unrolled, the derivative
    of the square root at an entry that never had a gradient is taken as zero.
    """

    def __init__(
        self,
        lr: Hyperparameter,
        steps: int,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Hyperparameter = 0.0,
        decoupled_weight_decay: bool = False,
        tol: float | None = None,
    ) -> None:
        super().__init__(steps, tol)
        check_range("lr", lr, 0.0, float("inf"))
        check_range("weight_decay", weight_decay, 0.0, float("inf"))
        check_flag("decoupled_weight_decay", decoupled_weight_decay)
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise TypeError(f"betas must be a pair of numbers, got {betas!r}")
        for i, beta in enumerate(betas):
            check_number(f"betas[{i}]", beta, 0.0, 1.0)
        check_number("eps", eps, 0.0, float("inf"))
        self.lr, self.betas, self.eps = lr, betas, eps
        self.weight_decay, self.decoupled_weight_decay = weight_decay, decoupled_weight_decay

    def refuse_tasks(self, warm_start: bool) -> None:
        """Tasks that stop at different times would need different t later; raise a ``ValueError``."""
        if self.tol is not None and warm_start:
            raise ValueError(
                f"Adam counts steps, and the tasks of a TaskBatch would stop at different ones: with tol={self.tol} "
                f"set warm_start=False, or leave tol out"
            )

    def update(self, y: Tensors, g: Tensors, state: Any) -> tuple[Tensors, Any]:
        """One step; see the class."""
        b1, b2 = self.betas
        t, m, v = (0, zeros(g), zeros(g)) if state is None else state
        t += 1
        if not is_zero(self.weight_decay):
            decay = each(self.weight_decay, y, "weight_decay")
            if self.decoupled_weight_decay:
                rates = each(self.lr, y, "lr")
                y = tuple(times(1 - lr * w, p) for p, lr, w in zip(y, rates, decay, strict=True))
            else:
                g = tuple(s + times(w, p) for s, w, p in zip(g, decay, y, strict=True))
        m = tuple(p.lerp(s, 1 - b1) for p, s in zip(m, g, strict=True))
        v = tuple((b2 * q).addcmul(s, s, value=1 - b2) for q, s in zip(v, g, strict=True))
        correction = (1 - b2**t) ** 0.5
        direction = tuple(p / (_sqrt(q) / correction + self.eps) for p, q in zip(m, v, strict=True))
        return descend(y, direction, self.lr, 1 / (1 - b1**t)), (t, m, v)


def _sqrt(q: Tensor) -> Tensor:
    """The square root, with derivative zero at zero."""
    if not q.requires_grad:
        return q.sqrt()
    positive = q > 0
    return torch.where(positive, torch.where(positive, q, 1.0).sqrt(), 0.0)
