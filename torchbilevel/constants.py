"""Constants of Phi, estimated."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchbilevel.curvature import HessianOperator
from torchbilevel.tensors import axpy, flatten, norm, numel, scale, sub, unflatten


def third_derivative_norm(operator: HessianOperator, start: Tensor, steps: int = 4) -> float:
    """The norm of the third derivative T of Phi at x, from below: the Lipschitz constant rho of hess Phi near x.

    T is symmetric, so its norm is the largest |T(v, v, .)| over unit vectors v, and v <- T(v, v, .) climbs towards it;
    T(v, v, .) comes from central differences of (hess Phi) v along v.

    Args:
        operator: hess Phi at x.
        start: v, drawn at random, shape (n,).
        steps: of that iteration, at least 1.

    Returns:
        The largest |T(v, v, .)| met, positive. Cost: two Hessians of Phi and one product with each, per step.

    Reference: Banach, Studia Mathematica 7, 1938 (the norm of a symmetric form); Kofidis and Regalia, SIAM J. Matrix
    Anal. Appl. 23, 2002 (the iteration).
    """
    x, eps = operator.x, torch.finfo(start.dtype).eps
    length = eps**0.2 * max(1.0, float(norm(x)) / numel(x) ** 0.5)
    best, t = eps, start
    for _ in range(steps):
        v = unflatten(t / t.norm(), x)
        plus, minus = (operator.at(axpy(side * length, v, x)).product(v) for side in (1.0, -1.0))
        t = flatten(scale(0.5 / length, sub(plus, minus)))
        size = float(t.norm())
        if not 0 < size < math.inf:
            break
        best = max(best, size)
    return best
