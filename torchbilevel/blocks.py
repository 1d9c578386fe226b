"""Tensors that hold one block per task along their first dimension: arithmetic block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchbilevel.tensors import Layout, Tensors, accumulator, flatten, norm, unflatten


def norms(a: Sequence[Tensor], tasks: int | None) -> Tensor:
    """The Euclidean norm of each task's block, over all tensors together; without tasks that of the whole.

    Args:
        a: tensors of shapes (tasks, ...).
        tasks: their first dimension, or ``None``.

    Returns:
        A tensor of shape (tasks,), or 0-d.

    >>> norms((torch.ones(2, 3), torch.ones(2)), tasks=2)
    tensor([2., 2.])
    """
    if tasks is None:
        return norm(a)
    squares = [accumulator(t).reshape(tasks, -1).square().sum(1) for t in a]
    return torch.stack([s.to(squares[0].device) for s in squares]).sum(0).sqrt()


def flatten_rows(a: Sequence[Tensor], tasks: int | None) -> Tensor:
    """One matrix of all entries with a row per task; without tasks the vector of ``flatten``."""
    if tasks is None:
        return flatten(a)
    kind = flatten([t.reshape(-1)[:0] for t in a])
    return torch.cat([t.reshape(tasks, -1).to(kind) for t in a], 1)


def unflatten_rows(rows: Tensor, like: Sequence[Tensor], tasks: int | None) -> Tensors:
    """The inverse of ``flatten_rows``, in the shapes, dtypes and devices of ``like``."""
    if tasks is None:
        return unflatten(rows, like)
    pieces = rows.split_with_sizes([t.numel() // tasks for t in like], 1)
    return tuple(v.reshape(t.shape).to(t) for v, t in zip(pieces, like, strict=True))


def choose(which: Tensor, new: Any, old: Any) -> Any:
    """The tensors of ``new`` for some tasks and those of ``old`` for the others.

    Args:
        which: of shape (tasks,), true where ``new`` is taken.
        new: nested tuples, lists and dicts of tensors of shapes (tasks, ...); anything else in them is taken as it is.
        old: likewise, or ``None`` for zeros.

    Returns:
        The same nesting as ``new``.

    >>> choose(torch.tensor([True, False]), (torch.ones(2, 1),), None)
    (tensor([[1.],
            [0.]]),)
    """
    if isinstance(new, Tensor):
        return torch.where(which.to(new.device).view(-1, *[1] * (new.dim() - 1)), new, 0.0 if old is None else old)
    if isinstance(new, dict):
        return {key: choose(which, value, None if old is None else old[key]) for key, value in new.items()}
    if isinstance(new, tuple | list):
        before = [None] * len(new) if old is None else old
        return tuple(choose(which, s, t) for s, t in zip(new, before, strict=True))
    return new


class BlockLayout(Layout):
    """Tuples of tensors of shapes (tasks, ...) as matrices with one row per task, one per device and dtype.

    Inner products are columns, one number per task, so that they scale matrices row by row.

    Args:
        like: a tuple of the shapes, dtypes and devices to come.
        tasks: their first dimension.

    >>> layout = BlockLayout((torch.zeros(2, 3), torch.zeros(2)), tasks=2)
    >>> rows = layout.pack((torch.ones(2, 3), torch.tensor([1.0, 2.0])))
    >>> layout.dot(rows, rows)
    tensor([[4.],
            [7.]])
    """

    def __init__(self, like: Sequence[Tensor], tasks: int) -> None:
        super().__init__(like)
        self._tasks = tasks

    def pack(self, a: Sequence[Tensor]) -> Tensors:
        """The matrices; a tensor alone in its matrix is viewed where possible, others are copied."""
        return tuple(
            torch.cat([a[i].reshape(self._tasks, -1) for i in group], 1)
            if len(group) > 1
            else a[group[0]].reshape(self._tasks, -1)
            for group in self._groups
        )

    def unpack(self, vectors: Sequence[Tensor]) -> Tensors:
        """Views of the matrices in the shapes of the tuple."""
        views: dict[int, Tensor] = {}
        for matrix, group in zip(vectors, self._groups, strict=True):
            columns = matrix.split_with_sizes([self._shapes[i].numel() // self._tasks for i in group], 1)
            views.update((i, piece.view(self._shapes[i])) for i, piece in zip(group, columns, strict=True))
        return tuple(views[i] for i in range(len(views)))

    def dot(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """Inner products of shape (tasks, 1)."""
        parts = [
            torch.bmm(accumulator(s)[:, None], accumulator(t)[..., None])[..., 0] for s, t in zip(a, b, strict=True)
        ]
        total = parts[0]
        for p in parts[1:]:
            total = total + p.to(total.device)
        return total
