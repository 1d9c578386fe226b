"""What autograd keeps in memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def live_tensors() -> int:
    """Number of tensor objects."""
    return sum(issubclass(type(entry), Tensor) for entry in gc.get_objects())


class Saved:
    """Bytes that autograd graphs built inside the block keep alive, now and at most.

    The losses must not use operations that save their outputs (exp, tanh, softmax): when such a graph is itself
    differentiable, torch never lets go of what these hooks returned.
    """

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, t: Tensor) -> Saved.Box:
        return Saved.Box(self, t)

    class Box:
        def __init__(self, saved: Saved, t: Tensor) -> None:
            self.t = t
            size = t.numel() * t.element_size()
            saved.now += size
            saved.most = max(saved.most, saved.now)
            weakref.finalize(self, saved.release, size)

    def release(self, size: int) -> None:
        self.now -= size


@contextmanager
def saved_tensors() -> Iterator[Saved]:
    saved = Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda box: box.t):
        yield saved
