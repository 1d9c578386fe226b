"""Hyperparameters of lower solvers: numbers, or functions of the upper module whose values are tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchbilevel.shards import beside
from torchbilevel.tensors import Tensors

Hyperparameter = float | Callable[[nn.Module], Any]


def descend(y: Tensors, direction: Tensors, lr: Any, factor: float = 1.0) -> Tensors:
    """Return y - lr factor direction, lr one value or one per tensor."""
    if isinstance(lr, int | float):
        return tuple(torch.add(p, d, alpha=-lr * factor) for p, d in zip(y, direction, strict=True))
    rates = each(lr, y, "lr")
    return tuple(p - times(r, d) * factor for p, r, d in zip(y, rates, direction, strict=True))


def times(rate: Any, t: Tensor) -> Tensor:
    """The product of a tensor with a rate on any device."""
    if isinstance(rate, Tensor):
        rate = beside(rate.to(t.device, t.dtype), t)
    product: Tensor = t * rate
    return product


def is_zero(value: Any) -> bool:
    """Whether a hyperparameter is the number zero, so that its term can be left out."""
    return isinstance(value, int | float) and value == 0


def each(value: Any, y: Tensors, name: str) -> Sequence[Any]:
    """One hyperparameter value per lower tensor."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.reshape(())
    if isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0):
        return [value] * len(y)
    if not isinstance(value, Sequence) and not (isinstance(value, Tensor) and value.dim() == 1):
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(
            f"{name} returned {got}; return one value, or a list (or 1-d tensor) with one value per lower parameter"
        )
    if len(value) != len(y):
        raise ValueError(
            f"{name} returned {len(value)} values for {len(y)} lower parameters; return one value, or a list with one "
            f"number or tensor per parameter"
        )
    return list(value)


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """A number must lie in [low, high), strictly inside for step sizes; functions of the upper module pass."""
    if not callable(value) or isinstance(value, type):
        check_number(name, value, low, high, "a number or a function of the upper module")


def check_number(name: str, value: Any, low: float, high: float, kind: str = "a number") -> None:
    """As ``check_range``, where a function of the upper module cannot stand."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        got = repr(value) if isinstance(value, bool | str | type) else type(value).__name__
        raise TypeError(f"{name} must be {kind}, got {got}")
    if not (low <= value < high) or (name == "lr" and value == 0):
        raise ValueError(
            f"{name} must be {'positive and finite' if name == 'lr' else f'in [{low:g}, {high:g})'}, got {value}"
        )


def check_flag(name: str, value: Any) -> None:
    """It must be True or False: any other value would count as True."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
