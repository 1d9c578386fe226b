"""Minimax problems: one loss, minimised and maximised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from torchbilevel.problem.arguments import Projections
from torchbilevel.problem.base import Loss, Problem
from torchbilevel.tensors import Tensors


class MinimaxProblem(Problem):
    """min over x of max over y in Y of f(x, y).

    x are the trainable parameters of ``upper``, y those of ``lower``. Seen as a bilevel problem, g = -f.

    Args:
        upper: module that holds x.
        lower: module that holds y.
        loss: f, called as ``loss(upper, lower, batch)``; strongly concave in y near y*(x).
        projection: Euclidean projection on Y: one Tensor -> Tensor map for all parameters of ``lower``, or a dict by
            parameter name. ``None`` leaves y free.
        upper_projection: likewise for x, applied after every outer step.
        lower_init: a function of the upper module that returns where y starts when it is not warm: one tensor per
            trainable parameter of ``lower``, in their order, or a dict by name; it is projected. With
            ``warm_start=False`` the random start of an attack is
            ``lower_init=lambda upper: torch.empty(shape).uniform_(-radius, radius)``; the random numbers are replayed
            as those of the loss are.
        process_group: over whose ranks gradients are averaged; ``None`` (default) for all ranks where
            ``torch.distributed`` is initialised. A group of one rank keeps it to itself. Parameters may be ``DTensor``s
            that are spread over these ranks; the loss sees them whole.

    Raises:
        TypeError: if a module, the loss or ``lower_init`` is of the wrong kind.
        ValueError: if a module has no trainable parameter, or both share one; if one is spread over other ranks; if a
            projection does not map a parameter to a tensor of its kind.
    """

    minimax = True

    def __init__(
        self,
        upper: nn.Module,
        lower: nn.Module,
        loss: Loss,
        projection: Projections = None,
        upper_projection: Projections = None,
        lower_init: Callable[[nn.Module], Any] | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__(upper, lower, {"loss": loss}, projection, upper_projection, lower_init, process_group)

    def upper_value(self, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensor:
        """The loss f(x, y) on a batch, under a seed."""
        return self._evaluate("loss", x, y, batch, seed)

    def lower_value(self, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensor:
        """The lower loss g = -f on a batch, under a seed."""
        return -self.upper_value(x, y, batch, seed)

    def data(self, batch: Any, lower: Any, upper: Any) -> tuple[Any, Any]:
        """One batch or source for both variables.

        Args:
            batch: a batch or a source.
            lower: refused.
            upper: refused.

        Returns:
            ``batch``, twice.

        Raises:
            TypeError: if ``lower`` or ``upper`` was given.
        """
        if lower is not None or upper is not None:
            raise TypeError("a minimax problem has one loss and takes one batch: backward(batch)")
        return batch, batch
