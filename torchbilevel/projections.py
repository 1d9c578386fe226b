"""Euclidean projections, Tensor -> Tensor, for constraints on y (minimax) and on x.

They are partials of functions of this module, so that problems that use them can be pickled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from torchbilevel.tensors import accumulator

Projection = Callable[[Tensor], Tensor]


def box(low: float | Tensor, high: float | Tensor) -> Projection:
    """Projection on {t: low <= t <= high}, entry by entry.

    Args:
        low: lower bound, a number or a tensor that broadcasts.
        high: upper bound, likewise.

    Returns:
        The projection.

    Raises:
        ValueError: if a lower bound exceeds its upper bound.

    >>> box(0.0, 1.0)(torch.tensor([-1.0, 0.5, 2.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    if not bool((torch.as_tensor(low) <= torch.as_tensor(high)).all()):
        raise ValueError(f"low must not exceed high, got low={low}, high={high}")
    return partial(_clamp, low=low, high=high)


def linf_ball(radius: float) -> Projection:
    """Projection on {t: max |t_i| <= radius}.

    Args:
        radius: positive.

    Returns:
        The projection.

    >>> linf_ball(0.5)(torch.tensor([-1.0, 0.25]))
    tensor([-0.5000,  0.2500])
    """
    _positive(radius)
    return partial(_clamp, low=-radius, high=radius)


def l2_ball(radius: float, dims: int | tuple[int, ...] | None = None) -> Projection:
    """Projection on {t: |t| <= radius}, as a whole or per slice.

    Args:
        radius: positive.
        dims: dimensions over which the norm is taken; ``None`` takes all. For a batch of perturbations of shape
            (n, ...), one ball each, pass the dimensions 1, 2, ...

    Returns:
        The projection.

    >>> l2_ball(1.0)(torch.tensor([3.0, 4.0]))
    tensor([0.6000, 0.8000])
    """
    _positive(radius)
    return partial(_to_l2_ball, radius=radius, dims=dims)


def simplex(total: float = 1.0) -> Projection:
    """Projection on {t: t >= 0, sum of t = total}, along the last dimension, in O(n log n).

    Args:
        total: positive, default 1.

    Returns:
        The projection.

    Reference: Held, Wolfe, Crowder, Mathematical Programming 6, 1974; sorting form as in Duchi et al., ICML 2008.

    >>> simplex()(torch.tensor([0.5, 0.9, -3.0]))
    tensor([0.3000, 0.7000, 0.0000])
    """
    _positive(total, "total")
    return partial(_to_simplex, total=total)


def _clamp(t: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    bounds = (torch.as_tensor(bound, dtype=t.dtype, device=t.device) for bound in (low, high))
    return t.clamp(*bounds)


def _to_l2_ball(t: Tensor, radius: float, dims: int | tuple[int, ...] | None) -> Tensor:
    wide = accumulator(t)
    axes = tuple(range(t.dim())) if dims is None else dims
    squares = (wide * wide).sum(axes, keepdim=True) if t.dim() else wide * wide
    outside = squares > radius * radius
    # The square root is taken of 1 inside the ball, so that its derivative is finite at t = 0.
    factor = torch.where(outside, radius * torch.where(outside, squares, 1.0).rsqrt(), 1.0)
    return t * factor.to(t.dtype)


def _to_simplex(t: Tensor, total: float) -> Tensor:
    if t.dim() == 0:
        raise ValueError("the simplex is a set of vectors, and this tensor has no dimension")
    # The projection does not change when t is shifted along (1, ..., 1). Shifted to maximum 0, it loses no digits to
    # a large mean, and the largest entry always exceeds its threshold -total.
    wide = accumulator(t)
    ordered = wide.sort(dim=-1, descending=True).values
    top = ordered[..., :1].detach()
    shifted, ordered = wide - top, ordered - top
    rank = torch.arange(1, t.shape[-1] + 1, dtype=wide.dtype, device=t.device)
    thresholds = (ordered.cumsum(-1) - total) / rank
    # The lower bound is for entries that are not finite: they must come out as such, not as an index error.
    support = (ordered > thresholds).sum(-1, keepdim=True).clamp(min=1)
    return (shifted - thresholds.gather(-1, support - 1)).clamp(min=0).to(t.dtype)


def _positive(value: float, name: str = "radius") -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")
