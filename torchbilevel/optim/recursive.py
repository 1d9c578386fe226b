"""Rules whose gradient is a recursive estimate from mini-batches."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from torchbilevel.optim.base import Closure, Loss, Rule
from torchbilevel.optim.search import count
from torchbilevel.tensors import Tensors, clone


class Recursive(Rule):
    """Base class that turns the gradient of a rule into a recursive estimate; put it before the rule that uses it.

    ``step(closure)`` is given a closure on one fixed mini-batch S. From its gradients g(x; S) and the memory of the
    step before, the rule sees in ``.grad``

        v_t = g(x_t; S)                                            at an anchor, the first step being one
        v_t = g(x_t; S) + (1 - a) (v_{t-1} - g(x_{t-1}; S))        otherwise

    For the second gradient the parameters are moved to x_{t-1} and back, and the state of torch's global random
    generators is set back, so that dropout draws the same; afterwards it is as one evaluation leaves it. Other
    randomness (numpy's, say) must be fixed by the closure, and buffers that a loss updates are updated twice.

    Attributes:
        weight: a in [0, 1].
        anchor_size: number of data points of an anchor batch; ``None`` stands for the whole data set.
        batch_size: number of data points of the other batches.
    """

    _memories: ClassVar[tuple[str, ...]] = ("weight", "anchor_size", "batch_size", "last_x", "last_v")

    weight: float
    anchor_size: int | None
    batch_size: int
    last_x: Tensors
    last_v: Tensors

    @property
    def next_batch_size(self) -> int | None:
        """The size of the batch that the next step wants; ``None`` for the whole data set."""
        return self.anchor_size if self._anchors() else self.batch_size

    def _anchors(self) -> bool:
        """Whether the next step makes the estimate anew."""
        return not self.last_v

    def _recur(self, weight: float, anchor_size: int | None, batch_size: int) -> None:
        """Set the recursion up; for the constructor."""
        self.weight = weight
        self.anchor_size = anchor_size if anchor_size is None else count("anchor_size", anchor_size)
        self.batch_size = count("batch_size", batch_size)

    def _evaluate(self, closure: Closure | None) -> tuple[Loss, float | None]:
        if closure is None:
            raise ValueError(
                f"{type(self).__name__} compares gradients at two points: pass step() a closure on one batch that "
                "clears the gradients, computes them and returns the loss"
            )

        def afresh() -> Loss:
            self.zero_grad()
            return closure()

        before = _random_states()
        loss, value = super()._evaluate(afresh)
        if self._anchors() or self.weight == 1:
            return loss, value
        parameters, after = self.parameters(), _random_states()
        here, gradients = clone(parameters), [p.grad for p in parameters]
        try:
            _set_random_states(before)
            _place(parameters, self.last_x)
            super()._evaluate(afresh)
            past = [p.grad for p in parameters]
        finally:
            _place(parameters, here)
            _set_random_states(after)
            for p, g in zip(parameters, gradients, strict=True):
                p.grad = g
        for p, g, g_past, v in zip(parameters, gradients, past, self.last_v, strict=True):
            if g is not None:
                p.grad = torch.add(g, v if g_past is None else v - g_past, alpha=1 - self.weight)
        return loss, value

    def _gradients(self) -> tuple[Tensors, Tensors, float]:
        found = super()._gradients()
        # Only an estimate that was found finite is remembered, and the absence of all gradients is no estimate of zero.
        if any(p.grad is not None for p in self.parameters()):
            self.last_x = clone(self.parameters())
            self.last_v = tuple(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters())
        return found

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; the next step is an anchor, since the new parameters have no past."""
        super().add_param_group(param_group)
        self.last_x = self.last_v = ()


def _place(parameters: Tensors, x: Tensors) -> None:
    for p, t in zip(parameters, x, strict=True):
        p.copy_(t)


def _generators() -> tuple[torch.Generator, ...]:
    return (torch.default_generator, *torch.cuda.default_generators)


def _random_states() -> list[Tensor]:
    return [generator.get_state() for generator in _generators()]


def _set_random_states(states: list[Tensor]) -> None:
    # CUDA may have been initialised, and its generators with it, by the evaluation in between.
    for generator, state in zip(_generators(), states, strict=False):
        generator.set_state(state)
