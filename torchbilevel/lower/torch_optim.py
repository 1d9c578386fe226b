"""Any torch optimizer as a lower solver."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchbilevel.lower.base import Gradient, LowerResult, LowerSolver, natural_residual
from torchbilevel.shards import any_sharded, fit
from torchbilevel.tensors import Tensors, clone, detach


class TorchOptim(LowerSolver):
    """Any torch optimizer as lower solver. It cannot be unrolled; ``GD`` and ``Adam`` can.

    Args:
        optimizer_class: such as ``torch.optim.LBFGS``.
        steps: calls of its ``step`` at most.
        tol: stop when |g_y| <= tol.
        options: its other arguments, ``lr=`` first of all.

    Raises:
        TypeError: if ``optimizer_class`` is no torch optimizer class.

    On a ``TaskBatch`` it sees the parameters of all tasks, and equals a loop over tasks if its step is entry by
    entry (that of SGD and Adam is, that of LBFGS is not).

    Cost: what the optimizer needs, as a rule one gradient of g per step, and one optimizer made per run.
    """

    def __init__(
        self,
        optimizer_class: type[torch.optim.Optimizer],
        steps: int,
        tol: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(steps, tol)
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
            raise TypeError(f"optimizer_class must be a torch.optim class, got {optimizer_class}")
        optimizer_class([nn.Parameter(torch.zeros(1, 1))], **options)  # bad options are found now, in its own words
        self.optimizer_class, self.options = optimizer_class, options

    def __repr__(self) -> str:
        options = {"steps": self.steps, "tol": self.tol, **self.options}
        return f"TorchOptim({self.optimizer_class.__name__}, {', '.join(f'{k}={v}' for k, v in options.items())})"

    def refuse_tasks(self, warm_start: bool) -> None:
        """It cannot stop for one task and go on for another; raise a ``ValueError``."""
        if self.tol is not None:
            raise ValueError(
                f"{self} cannot stop for one task of a TaskBatch and go on for others: leave tol out, or use GD or Adam"
            )

    def place(self, state: Any, y: Tensors) -> Any:
        """What is of the shape of a parameter that is spread over ranks, spread likewise; torch sees to the devices."""
        if state is None or not any_sharded(y):
            return state
        entries = {
            i: {
                key: fit((t,), (y[i],))[0] if isinstance(t, Tensor) and t.shape == y[i].shape else t
                for key, t in entry.items()
            }
            for i, entry in state["state"].items()
        }
        return {**state, "state": entries}

    def run(
        self,
        gradient: Gradient,
        y: Tensors,
        state: Any,
        project: Callable[[Tensors], Tensors],
        tasks: int | None = None,
    ) -> LowerResult:
        """Let the optimizer step; see ``LowerSolver.run``."""
        parameters = [nn.Parameter(t) for t in clone(y)]
        optimizer = self.optimizer_class(parameters, **self.options)
        if state is not None:
            optimizer.load_state_dict(copy.deepcopy(state))
        residual: Tensor | None = None
        here: list[tuple[Tensor, Tensors]] = []  # what the test of tol evaluated, for the optimizer's first evaluation

        def closure() -> Any:
            value, g = here.pop() if here else gradient(detach(parameters))
            for p, t in zip(parameters, g, strict=True):
                p.grad = t
            return value

        for k in range(self.steps):
            if self.tol is not None:
                here = [gradient(detach(parameters))]
                residual = natural_residual(detach(parameters), here[0][1], project)
                if bool(residual <= self.tol):
                    return LowerResult(detach(parameters), optimizer.state_dict(), k, residual)
            optimizer.step(closure)
            with torch.no_grad():
                for p, t in zip(parameters, project(detach(parameters)), strict=True):
                    p.copy_(t)
        return LowerResult(detach(parameters), optimizer.state_dict(), self.steps, residual)
