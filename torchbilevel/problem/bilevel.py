"""Bilevel problems: two losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from torchbilevel.problem.arguments import Projections
from torchbilevel.problem.base import Loss, Problem
from torchbilevel.tensors import Tensors


class BilevelProblem(Problem):
    """min over x of f(x, y*(x)) with y*(x) = argmin over y of g(x, y).

    x are the trainable parameters of ``upper``, y those of ``lower``; both losses are called as
    ``loss(upper, lower, batch)`` and return a scalar. g must be strongly convex in y near y*(x) for implicit
    hypergradients to mean what they say.

    Args:
        upper: module that holds x.
        lower: module that holds y.
        upper_loss: f.
        lower_loss: g, twice differentiable.
        lower_init: a function of the upper module that returns where y starts when it is not warm: one tensor per
            trainable parameter of ``lower``, in their order, or a dict by name. ``Unrolled`` differentiates it. Random
            numbers that it draws are replayed as those of the losses are. Of a ``TaskBatch``, tensors without the
            leading dimension start every task.
        upper_projection: projection of x on its set, applied after every outer step: one Tensor -> Tensor map for all
            parameters, or a dict by parameter name.
        projection: refused; y of a bilevel problem is free.
        process_group: over whose ranks gradients and products are averaged; ``None`` (default) for all ranks where
            ``torch.distributed`` is initialised. A group of one rank keeps it to itself. Parameters may be ``DTensor``s
            that are spread over these ranks; losses see them whole.

    Raises:
        TypeError: if a module, a loss or ``lower_init`` is of the wrong kind.
        ValueError: if a module has no trainable parameter, or both share one; if one is spread over other ranks; if
            ``upper_projection`` does not map a parameter to a tensor of its kind; if ``projection`` is given.

    Example:
        >>> import torch
        >>> class Shift(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.value = torch.nn.Parameter(torch.zeros(2))
        >>> problem = BilevelProblem(
        ...     upper=Shift(), lower=Shift(),
        ...     lower_loss=lambda upper, lower, batch: (lower.value - upper.value).square().sum(),
        ...     upper_loss=lambda upper, lower, batch: (lower.value - batch).square().sum())
        >>> problem.check(upper=torch.ones(2))
    """

    def __init__(
        self,
        upper: nn.Module,
        lower: nn.Module,
        upper_loss: Loss,
        lower_loss: Loss,
        lower_init: Callable[[nn.Module], Any] | None = None,
        upper_projection: Projections = None,
        projection: None = None,
        process_group: Any = None,
    ) -> None:
        if projection is not None:
            raise ValueError(
                "projection= constrains y, and a bilevel problem cannot have it: the implicit formula is wrong at an "
                "active bound; write y as a function of free parameters (softplus, softmax, ...), or state the problem "
                "as a MinimaxProblem"
            )
        losses = {"upper_loss": upper_loss, "lower_loss": lower_loss}
        super().__init__(upper, lower, losses, None, upper_projection, lower_init, process_group)

    def upper_value(self, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensor:
        """The upper loss f(x, y) on a batch, under a seed."""
        return self._evaluate("upper_loss", x, y, batch, seed)

    def lower_value(self, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensor:
        """The lower loss g(x, y) on a batch, under a seed."""
        return self._evaluate("lower_loss", x, y, batch, seed)

    def data(self, batch: Any, lower: Any, upper: Any) -> tuple[Any, Any]:
        """Data are named (``lower=``, ``upper=``), never positional.

        Args:
            batch: refused.
            lower: a batch or a source for g.
            upper: a batch or a source for f.

        Returns:
            ``lower`` and ``upper``.

        Raises:
            TypeError: if ``batch`` was given.
        """
        if batch is not None:
            raise TypeError("a bilevel problem takes its data by name: backward(lower=..., upper=...)")
        return lower, upper
