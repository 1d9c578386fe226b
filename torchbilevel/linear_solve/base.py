"""What all solvers for A z = b share, A symmetric positive definite and given as a product s -> A s."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchbilevel.tensors import Tensors

MatVec = Callable[[Tensors], Tensors]


@dataclass(frozen=True, eq=False)
class SolveResult:
    """What a solve returns.

    Attributes:
        z: the solution found, of the shapes of b.
        residual: |b - A z| as the solver knows it without a further product (0-d tensor; of shape (tasks,), as all the
            following, where there is a block per task).
        scale: |b|, to read the residual against.
        iterations: products with A.
        tol: the relative tolerance asked for, or ``None``.
        nonpositive: whether a direction s with <s, A s> <= 0 was met (bool tensor).
        diverged: whether the residual ended above where it began, in a method that contracts it when its step is right.
    """

    z: Tensors
    residual: Tensor
    scale: Tensor
    iterations: int
    tol: float | None
    nonpositive: Tensor
    diverged: Tensor

    @cached_property
    def failed(self) -> bool:
        """Whether z is not to be trusted although it is finite."""
        return bool((self.nonpositive | self.diverged).any())

    @property
    def status(self) -> str:
        """``"converged"``, ``"steps done"``, ``"non-positive curvature"``, ``"diverged"`` or ``"non-finite"``.

        With tasks, what is true of any task, and ``"converged"`` if all have.
        """
        if bool(self.nonpositive.any()):
            return "non-positive curvature"
        if not bool(torch.isfinite(self.residual).all()):
            return "non-finite"
        if bool(self.diverged.any()):
            return "diverged"
        if self.tol is not None and bool((self.residual <= self.tol * self.scale).all()):
            return "converged"
        return "steps done"


class LinearSolver(ABC):
    """A solver for A z = b: settings only, no state.

    Attributes:
        resamples: whether every product may be with an A from another sample, as unbiased methods want it; otherwise
            all products of a solve must be with one A.
    """

    resamples = False

    @abstractmethod
    def solve(self, matvec: MatVec, b: Tensors, z0: Tensors | None = None, tasks: int | None = None) -> SolveResult:
        """Solve A z = b.

        Args:
            matvec: the product s -> A s.
            b: right-hand side.
            z0: where to start; ``None`` starts at zero, which costs no product.
            tasks: the first dimension of all tensors where A has one diagonal block per task (``TaskBatch``): each is
                then solved as by itself, with products of all at once.

        Returns:
            The solution with its residual.
        """

    def drawn(self, seed: int) -> LinearSolver:
        """The solver with its random choices made; itself where it makes none.

        Args:
            seed: of the choices.

        Returns:
            A solver.
        """
        return self

    def batch_size(self, i: int, size: int | None) -> int | None:
        """The number of data points for product i where the caller's is ``size``; the same by default."""
        return size


def positive_int(name: str, value: int) -> int:
    """The value, which must be a positive integer.

    Args:
        name: of the argument.
        value: what was given.

    Returns:
        The value.

    Raises:
        ValueError: if it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def positive(name: str, value: float) -> float:
    """The value, which must be a positive, finite number.

    Args:
        name: of the argument.
        value: what was given.

    Returns:
        The value.

    Raises:
        ValueError: if it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return value
