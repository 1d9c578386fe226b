"""The bare arithmetic of PRGDA and SREDA on robust sensing: tensors, no autograd, no checks, nothing counted; its time.

The gradient of F on the samples i, with c_i = n y_i r_i / s and r_i = <A_i, U U'> - b_i, is (sum_i c_i (A_i + A_i')) U
in U and n r_i^2 / (2 s) e_i - c (y - 1/n), summed, in y.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.experiments.study import rounded
from benchmarks.robust_descent import BATCH, BUILD, PERIOD
from benchmarks.robust_sensing import RobustSensing, loss, robust_sensing

Batch = tuple[Tensor, Tensor, Tensor]


class ByHand:
    """The recursion with its state.

    Args:
        data: of the seed.
        lower_lr: lambda.
        K: corrections per step.
        period: q.
        size: S_2.
        lr: the length of a step.
        after: the anchor of SREDA, taken where the corrections have ended; else that of PRGDA, before they begin.
        draw: the next batch; by default a uniform one.
    """

    def __init__(
        self,
        data: RobustSensing,
        *,
        lower_lr: float = 0.01,
        K: int = 5,
        period: int = 25,
        size: int = 40,
        lr: float = 1e-3,
        after: bool = False,
        draw: Callable[[], Batch] | None = None,
    ) -> None:
        self.data, self.lower_lr, self.K, self.period, self.size, self.lr = data, lower_lr, K, period, size, lr
        self.after, self.draw = after, draw or self._draw
        self.n, self.d, self.c = data.rows, len(data.M), data.concavity
        self.U, self.y = data.start.clone(), data.respond(data.start).y
        self.entries, self.full = data.entries, data.batch()
        self.ranks = torch.arange(1, self.n + 1, dtype=self.U.dtype, device=self.U.device)
        self._rows = self.U.new_empty(size, len(self.entries))
        self.t = 0
        self.old: tuple[Tensor, Tensor] = (self.U, self.y)
        self.v: Tensor = self.U
        self.u: Tensor = self.y

    def _draw(self) -> Batch:
        index = torch.randint(self.n, (self.size,), device=self.U.device)
        # Into the memory of the last ones, which are no longer needed.
        rows = torch.index_select(self.data.A, 0, index, out=self._rows)
        return rows, self.data.b.index_select(0, index), index

    def gradient(self, U: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """f_U and f_y on a batch."""
        A, b, index = batch
        r = torch.addmv(b, A, (U @ U.T).view(-1).index_select(0, self.entries), beta=-1)
        weights = y.index_select(0, index).mul_(r).mul_(self.n / len(b))
        half = U.new_zeros(self.d * self.d).index_copy_(0, self.entries, weights @ A).view(self.d, self.d)
        in_y = (y - 1 / self.n).mul_(-self.c)
        in_y.index_add_(0, index, r.square_().mul_(0.5 * self.n / len(b)))
        return (half + half.T) @ U, in_y

    def project(self, y: Tensor) -> Tensor:
        """The projection on the simplex."""
        ordered = y.sort(descending=True).values
        thresholds = (ordered.cumsum(0) - 1) / self.ranks
        k = (ordered > thresholds).sum() - 1
        return (y - thresholds[k]).clamp_(min=0)

    def step(self) -> None:
        """Carry v and u on, move y, then U by a step of the given length."""
        anchor, U, y = self.t % self.period == 0, self.U, self.y
        best, least, fresh = None, float("inf"), False
        if self.t == 0 or (anchor and not self.after):
            v, u = self.gradient(U, y, self.full)
            best, fresh = (y, v, u), True
        else:
            v, u = self.v, self.u
        if not (self.after and fresh):
            old_U, old_y = self.old
            for k in range(self.K):
                if not (fresh and k == 0):
                    batch = self.draw()
                    new, past = self.gradient(U, y, batch), self.gradient(old_U, old_y, batch)
                    v, u = v + new[0] - past[0], u + new[1] - past[1]
                ahead = self.project(torch.add(y, u, alpha=self.lower_lr))
                length = float((ahead - y).norm())
                if length < least:
                    best, least = (y, v, u), length
                old_U, old_y, y = U, y, ahead
            assert best is not None
            if anchor and self.after:
                best = (best[0], *self.gradient(U, best[0], self.full))
        assert best is not None
        self.y, self.v, self.u = best
        self.old = U, self.y
        self.U = U - self.lr / float(self.v.norm()) * self.v
        self.t += 1


class ByAutograd(ByHand):
    """The same loop on gradients of the loss by autograd."""

    def gradient(self, U: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """f_U and f_y on a batch."""
        U, y = U.detach().requires_grad_(), y.detach().requires_grad_()
        upper: Any = SimpleNamespace(value=U, entries=self.entries)
        lower: Any = SimpleNamespace(value=y, concavity=self.c)
        return torch.autograd.grad(loss(upper, lower, batch), (U, y))


def speed(name: str, d: int, rounds: int, device: str) -> dict[str, Any]:
    """Milliseconds of processor time of a step and of a gradient, ours and by hand, with either way to store A.

    Args:
        name: "PRGDA" or "SREDA".
        d: rows of U.
        rounds: of a period each, step by step in turns; the median over rounds counts.
        device: where to compute.

    Returns:
        The times by storage, and the median ratios of ours to the loops by hand.
    """
    result: dict[str, Any] = {}
    for storage in ("upper triangles", "whole matrices"):
        data = robust_sensing(0, d, whole=storage == "whole matrices", device=device)
        loops = _loops(name, data)
        spent = {key: [0.0] * rounds for key in loops}
        for i in range(rounds):
            for _ in range(PERIOD):
                for key, step in loops.items():
                    begun = time.process_time()
                    step()
                    spent[key][i] += (time.process_time() - begun) / PERIOD * 1e3
        times = {key: statistics.median(of_rounds) for key, of_rounds in spent.items()}
        result[storage] = times
        for key, other in (("ratio", "by hand"), ("ratio to autograd", "by hand, autograd")):
            ratios = [a / b for a, b in zip(spent["ours"], spent[other], strict=True)]
            result[storage][key] = statistics.median(ratios)
    return rounded(result, 4)  # type: ignore[no-any-return]


def _loops(name: str, data: RobustSensing) -> dict[str, Callable[[], Any]]:
    method, source = BUILD[name](data, 0, lr=1e-3), data.source(0)
    hand, autograd = (kind(data, after=name == "SREDA") for kind in (ByHand, ByAutograd))
    at = hand.U, hand.y, source(BATCH)

    def ours() -> None:
        method.zero_grad()
        method.backward(source)
        method.step()

    return {
        "ours": ours,
        "by hand": hand.step,
        "by hand, autograd": autograd.step,
        "gradient by hand": lambda: hand.gradient(*at),
        "gradient": lambda: autograd.gradient(*at),
    }
