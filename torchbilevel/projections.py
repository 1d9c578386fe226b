"""Euclidean projections, Tensor -> Tensor, for constraints on y (minimax) and on x."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

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
    return lambda t: torch.minimum(
        torch.maximum(t, torch.as_tensor(low, dtype=t.dtype, device=t.device)),
        torch.as_tensor(high, dtype=t.dtype, device=t.device),
    )


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
    return lambda t: t.clamp(-radius, radius)


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

    def project(t: Tensor) -> Tensor:
        axes = tuple(range(t.dim())) if dims is None else dims
        squares = (t * t).sum(axes, keepdim=True) if t.dim() else t * t
        outside = squares > radius * radius
        # The square root is taken of 1 inside the ball, so that its derivative is finite at t = 0.
        return t * torch.where(outside, radius * torch.where(outside, squares, 1.0).rsqrt(), 1.0)

    return project


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

    def project(t: Tensor) -> Tensor:
        ordered = t.sort(dim=-1, descending=True).values
        rank = torch.arange(1, t.shape[-1] + 1, dtype=t.dtype, device=t.device)
        thresholds = (ordered.cumsum(-1) - total) / rank
        support = (ordered > thresholds).sum(-1, keepdim=True)
        return (t - thresholds.gather(-1, support - 1)).clamp(min=0)

    return project


def _positive(value: float, name: str = "radius") -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
