"""What all lower solvers share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from torchbilevel.blocks import choose, norms
from torchbilevel.shards import fit
from torchbilevel.tensors import Tensors, detach, sub

if TYPE_CHECKING:
    from typing_extensions import Self


class Gradient(Protocol):
    """g and g_y as functions of y, at one x; detached."""

    def __call__(self, y: Tensors) -> tuple[Tensor, Tensors]:
        """G and g_y at y, on the next sample."""

    def at(self, y: Tensors, k: int, anchor: bool = False) -> Tensors:
        """g_y at y on sample number k, the same at every y; one of the large samples where ``anchor`` is set."""


@dataclass(frozen=True, eq=False)
class LowerResult:
    """Where the lower solver ended.

    Attributes:
        y: the lower variables.
        state: the solver's own memory (momentum), tensors and numbers in plain containers, ``None`` if it has none.
            Nobody changes it in place.
        steps: steps taken, fewer than asked for only if ``tol`` was met.
        residual: |g_y| (with a projection P, |y - P(y - g_y)|) at the last point where it was tested against ``tol``,
            ``None`` without ``tol``; of shape (tasks,) where there are tasks.
    """

    y: Tensors
    state: Any
    steps: int
    residual: Tensor | None


class LowerSolver(ABC):
    """Moves y towards y*(x) by ``steps`` steps, or until |g_y| <= tol.

    Attributes:
        steps: steps at most.
        tol: stop before a step when |g_y| <= tol (with a projection P, when |y - P(y - g_y)| <= tol), each task by
            itself where there are tasks; ``None`` takes exactly ``steps`` steps.
    """

    def __init__(self, steps: int, tol: float | None) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(
                f"steps must be a positive integer, got {steps!r} (lower_solver=None leaves y where it is)"
            )
        if tol is not None and (isinstance(tol, bool) or not isinstance(tol, int | float)):
            raise TypeError(f"tol must be a positive number or None, got {tol!r}")
        if tol is not None and not tol > 0:
            raise ValueError(f"tol must be positive or None, got {tol}")
        self.steps, self.tol = steps, tol

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in vars(self).items())})"

    @abstractmethod
    def run(
        self,
        gradient: Gradient,
        y: Tensors,
        state: Any,
        project: Callable[[Tensors], Tensors],
        tasks: int | None = None,
    ) -> LowerResult:
        """Move y, without a graph.

        Args:
            gradient: y -> (g, g_y).
            y: where to start; left as it is.
            state: the solver's memory from an earlier run, or ``None``; left as it is.
            project: projection of y.
            tasks: the first dimension of all tensors of y where it holds one block per task (``TaskBatch``).

        Returns:
            The end point. Cost: one gradient of g per step, one more if ``tol`` is met.
        """

    def bind(self, evaluate: Callable[[Callable[[nn.Module], Any]], Any]) -> Self:
        """The solver with hyperparameters that are functions of the upper module replaced by their values.

        Args:
            evaluate: gives the value of such a function at x.

        Returns:
            A copy, or the solver itself where there is nothing to replace.
        """
        return self.with_values({name: evaluate(vars(self)[name]) for name in self.learned})

    def with_values(self, values: dict[str, Any]) -> Self:
        """A copy with these attributes instead; the solver itself where there are none."""
        if not values:
            return self
        bound = copy.copy(self)
        vars(bound).update(values)
        return bound

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the hyperparameters that are functions of the upper module."""
        return tuple(name for name, value in vars(self).items() if callable(value) and not isinstance(value, type))

    def refuse_tasks(self, warm_start: bool) -> None:  # noqa: B027  (by default all is well)
        """Raise if the solver cannot treat the tasks of a ``TaskBatch`` each by itself.

        Args:
            warm_start: whether its memory goes on from run to run.
        """

    def place(self, state: Any, y: Tensors) -> Any:
        """The state of a checkpoint, on the devices of y where ``run`` does not see to that itself."""
        return state


class Unrollable(LowerSolver):
    """A lower solver whose step is a pure function, so that it can also be differentiated through."""

    @abstractmethod
    def update(self, y: Tensors, g: Tensors, state: Any) -> tuple[Tensors, Any]:
        """One step from y along the gradient g; nothing is changed in place.

        Args:
            y: lower variables.
            g: g_y at y.
            state: what the last step returned; ``None`` before the first.

        Returns:
            The new y and the new state.
        """

    def scaled(self, factor: float) -> Self:
        """The solver with ``factor`` times its lr."""
        return self if factor == 1 else self.with_values({"lr": factor * vars(self)["lr"]})

    def place(self, state: Any, y: Tensors) -> Any:
        """Each tensor beside its parameter: a state holds rounds of one tensor per parameter."""
        parameters = cycle(y)
        return map_tensors(lambda t: fit((t,), (next(parameters),))[0], state)

    @torch.no_grad()
    def run(
        self,
        gradient: Gradient,
        y: Tensors,
        state: Any,
        project: Callable[[Tensors], Tensors],
        tasks: int | None = None,
    ) -> LowerResult:
        """Take the steps; see ``LowerSolver.run``."""
        y, residual = detach(y), None
        moving: Tensor | None = None  # the tasks that have not met tol yet
        for k in range(self.steps):
            g = gradient(y)[1]
            if self.tol is not None:
                here = natural_residual(y, g, project, tasks)
                residual = here if residual is None or moving is None else torch.where(moving, here, residual)
                met = residual <= self.tol
                if bool(met if tasks is None else met.all()):
                    return LowerResult(y, state, k, residual)
                moving = None if tasks is None else ~met
            ahead, after = self.update(y, g, state)
            ahead = project(ahead)
            y, state = (ahead, after) if moving is None else choose(moving, (ahead, after), (y, state))
        return LowerResult(y, state, self.steps, residual)


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to every tensor of nested tuples, lists and dicts.

    Args:
        function: what to apply.
        tree: may hold anything besides, which stays as it is.

    Returns:
        The same nesting, with tuples in place of lists.

    >>> map_tensors(torch.neg, (1, [torch.ones(1)]))
    (1, (tensor([-1.]),))
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return tuple(map_tensors(function, value) for value in tree)
    return tree


def natural_residual(y: Tensors, g: Tensors, project: Callable[[Tensors], Tensors], tasks: int | None = None) -> Tensor:
    """|y - P(y - g)|, and |g| where P is the identity, without the cancellation; of each task where there are tasks."""
    moved = sub(y, g)
    return norms(tuple(s if q is t else p - q for p, s, t, q in zip(y, g, moved, project(moved), strict=True)), tasks)
