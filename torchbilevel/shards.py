"""Tensors that are spread over processes (``torch.distributed.tensor.DTensor``): gathered, cut again, summed over.

Graphs go through all of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def is_sharded(t: Any) -> bool:
    """Whether a tensor is a ``DTensor``."""
    if type(t) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes half a second, and few have such tensors
    return module is not None and isinstance(t, module.DTensor)


def any_sharded(a: Iterable[Tensor]) -> bool:
    """Whether any of the tensors is a ``DTensor``."""
    return any([type(t) not in _PLAIN and is_sharded(t) for t in a])


def whole(a: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors with all their entries on every rank; what follows must be the same on all ranks.

    Args:
        a: tensors, ``DTensor`` or not.

    Returns:
        As many. Cost: one all-gather per ``DTensor``, in which all ranks of its mesh take part.
    """
    if not any_sharded(a):
        return tuple(a)
    return tuple([t.full_tensor() if is_sharded(t) else t for t in a])  # type: ignore[attr-defined]


def local(t: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return t.to_local() if is_sharded(t) else t  # type: ignore[attr-defined]


def beside(t: Tensor, like: Any) -> Any:
    """A whole tensor, the same on all ranks, for arithmetic with ``like``."""
    if not is_sharded(like) or is_sharded(t):
        return t
    everywhere = [torch.distributed.tensor.Replicate()] * like.device_mesh.ndim
    return type(like).from_local(t, like.device_mesh, everywhere, run_check=False)


def cut(a: Sequence[Tensor], like: Sequence[Any]) -> tuple[Tensor, ...]:
    """Whole tensors, the same on all ranks, spread as those of ``like`` are. Nothing is exchanged."""
    if not any_sharded(like):
        return tuple(a)
    return tuple(
        [
            beside(t, s).redistribute(placements=s.placements) if is_sharded(s) else t
            for t, s in zip(a, like, strict=True)
        ]
    )


def fit(a: Sequence[Tensor], like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Tensors of a checkpoint on the devices of those of ``like``, and spread as these are."""
    return cut([t.to(s.device) for t, s in zip(a, like, strict=True)], like)


def gathered(tree: Any) -> Any:
    """Nested dicts, lists and tuples with whole tensors in place of those that are spread."""
    if isinstance(tree, dict):
        return {key: gathered(value) for key, value in tree.items()}
    if type(tree) in (list, tuple):  # not named ones, which are made otherwise
        return type(tree)(gathered(value) for value in tree)
    return whole((tree,))[0] if is_sharded(tree) else tree


def spread(part: Tensor, like: Any) -> Tensor:
    """The tensor spread as ``like`` of which this process holds ``part``; a plain ``like`` leaves it as it is."""
    if not is_sharded(like):
        return part
    return type(like).from_local(  # type: ignore[no-any-return]
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def summed(part: Tensor, like: Any) -> Tensor:
    """The sum of a 0-d number over the processes that hold different parts of ``like``."""
    partial = torch.distributed.tensor.Partial("sum")
    placements = [partial if p.is_shard() else p for p in like.placements]
    found = torch.distributed.tensor.DTensor.from_local(part, like.device_mesh, placements, run_check=False)
    return found.full_tensor()
