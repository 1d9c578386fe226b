"""Probes: the hypergradient as a function of x on frozen samples, for rules that need trial points."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from torchbilevel.curvature import HessianOperator
from torchbilevel.tensors import Tensors, clone

if TYPE_CHECKING:
    from torchbilevel.estimators.base import Estimator


class Probe:
    """The hypergradient as a function of the upper parameters' current values, on frozen samples.

    On construction it takes a snapshot of y, of the memory and of the samples. A call *overwrites* ``.grad`` of the upper
    parameters with the hypergradient there and returns the upper loss; nothing else changes, so calls at one x agree. Only
    the first call, if x has not moved since, costs nothing: it leaves ``.grad`` as ``backward`` made it.

    Args:
        estimator: whose last ``backward`` defines samples and memory.

    Raises:
        RuntimeError: if there has been no ``backward``.
    """

    def __init__(self, estimator: Estimator) -> None:
        self._estimator, self._samples = estimator, estimator.last_samples
        self._y, self._memory = clone(estimator.start()), estimator.memory
        self._value: Tensor | None = estimator.last_value
        self._versions = self._moves()
        self._operator: HessianOperator | None = None

    def __call__(self) -> Tensor:
        """Overwrite ``.grad`` with the hypergradient at the current x and return f there. Cost: one ``backward``."""
        value, self._value = self._value, None
        if value is not None and self._moves() == self._versions:
            return value
        estimator = self._estimator
        evaluation = estimator.evaluate(estimator.problem.x, self._y, self._memory, self._samples)
        estimator.vet(evaluation)
        for p, v in zip(estimator.problem.upper_parameters, evaluation.hypergradient, strict=True):
            p.grad = v.clone()
        return evaluation.value

    def value(self) -> Tensor:
        """f at the current x, after the lower solver has run from the snapshot. Cost: the lower solve and one value of f."""
        estimator = self._estimator
        x = estimator.problem.x
        result = estimator.solve_lower(x, self._y, self._memory, self._samples.lower)
        return estimator.oracle.upper_value(x, result.y, self._samples.upper)

    def hvp(self, s: Tensors) -> Tensors:
        """hess Phi s at the current x, exact, for a tuple of the shapes of x.

        Cost: see ``HessianOperator``; its construction is spent again whenever x has moved.
        """
        moves = self._moves()
        if self._operator is None or moves != self._built_at:
            estimator = self._estimator
            self._operator = HessianOperator(estimator.problem, self._samples, oracle=estimator.oracle)
            self._built_at = moves
        return self._operator.product(s)

    def _moves(self) -> list[int]:
        """Counts of in-place changes of the upper parameters, which tell whether x has moved."""
        return [p._version for p in self._estimator.problem.upper_parameters]
