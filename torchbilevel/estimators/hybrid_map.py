"""Hybrid variance-reduced SGD's estimator: a map and its Jacobian carried along, and y in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from torchbilevel.derivatives import vjp
from torchbilevel.draws import BatchSizes, Draws
from torchbilevel.estimators.base import Estimator
from torchbilevel.estimators.evaluation import Evaluation, Memory
from torchbilevel.estimators.recursion import require_weight
from torchbilevel.estimators.vetting import SILENT_ZERO
from torchbilevel.linear_solve.base import positive_int
from torchbilevel.lower import LowerResult
from torchbilevel.problem import NonconvexLinearProblem, Problem
from torchbilevel.samples import Sample
from torchbilevel.tensors import Tensors, clone, flatten, leaves, numel, unflatten


class HybridMap(Estimator):
    """The gradient of phi(E H(x; xi)) from estimates h of E H and J of its Jacobian that are carried along.

    With S, S' independent samples, and others for J, H' the Jacobian of H:

        h_t = (1 - a) (h_{t-1} + H(x_t; S) - H(x_{t-1}; S)) + a H(x_t; S'),
        J_t = (1 - b) (J_{t-1} + H'(x_t; S) - H'(x_{t-1}; S)) + b H'(x_t; S'),
        y_t = argmax over y in Y of <A y, h_t> - psi(y),   v_t = J_t' A y_t,

    where h_0 and J_0 are H and H' on samples of the anchor size.

    Args:
        weight: a in (0, 1]; 1 - beta of the paper.
        jacobian_weight: b in (0, 1]; by default as ``weight``.
        max_size: J may have at most ``max_size``^2 entries.
        batch_sizes: of independent draws: ``upper`` of H, ``jvp`` of H', ``anchor`` of the first of both; ``None`` for
            one sample per ``backward``.
        seed: of the random numbers inside the map.

    Raises:
        ValueError: if an argument is out of range; on binding to another problem than ``NonconvexLinearProblem``, or
            to one that is too large.

    Cost: per ``backward`` three values of H and three Jacobians (counted as gradients of f), each Jacobian one reverse
    sweep per value that the map returns; one of both in the first and with weights of 1. Keeps x, h and J.

    Reference: Tran-Dinh, Liu and Nguyen, NeurIPS 2020.

    Differs from the paper: nothing.
    """

    def __init__(
        self,
        *,
        weight: float,
        jacobian_weight: float | None = None,
        max_size: int = 2000,
        batch_sizes: BatchSizes | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(None, batch_sizes=batch_sizes, seed=seed)
        self.weight, self.jacobian_weight = weight, weight if jacobian_weight is None else jacobian_weight
        for name in ("weight", "jacobian_weight"):
            require_weight(name, getattr(self, name))
        self.max_size = positive_int("max_size", max_size)

    def refuse(self, problem: Problem) -> None:
        """Only a problem that is linear in y has such a map."""
        if not isinstance(problem, NonconvexLinearProblem):
            raise ValueError(
                f"HybridVRSGD is for a NonconvexLinearProblem, got a {type(problem).__name__}; HybridGDA takes any "
                "minimax problem, without a guarantee"
            )
        if problem.ranks.size > 1:
            raise ValueError(
                f"HybridVRSGD works in one process, and this problem is shared by {problem.ranks.size} ranks: use "
                "HybridGDA or SREDA"
            )
        rows, columns = problem.linear.size, numel(problem.x)
        if rows * columns > self.max_size**2:
            raise ValueError(
                f"HybridVRSGD keeps the Jacobian of the map, here {rows} x {columns} entries, more than max_size^2 "
                f"with max_size={self.max_size}: use HybridGDA or SREDA, or raise max_size"
            )

    def evaluate(self, x: Tensors, y: Tensors, memory: Memory, draws: Draws) -> Evaluation:
        """Carry h and J to x; y and the gradient follow."""
        x, past, first = clone(x), memory.tracked, not memory.tracked
        fresh = draws.at(0, anchor=True) if first else draws.at(-1)
        h, (J, found) = self._map(x, fresh.upper), self._jacobian(x, fresh.jvp)
        if not found:
            raise ValueError(SILENT_ZERO)
        if not first and self.weight < 1:
            S = draws.at(0).upper
            carried = past["map"][0] + self._map(x, S) - self._map(past["x"], S)
            h = torch.lerp(carried, h, self.weight)
        if not first and self.jacobian_weight < 1:
            S = draws.at(0).jvp
            carried = past["jacobian"][0] + self._jacobian(x, S)[0] - self._jacobian(past["x"], S)[0]
            J = torch.lerp(carried, J, self.jacobian_weight)
        loss = self._linear_problem.linear
        with torch.no_grad():
            (like,) = y
            best = loss.response(h).to(like)
            weights = loss.weights(best).to(h)
            value = torch.dot(weights, h) - loss.penalty(best)
        tracked = {"x": x, "map": (h,), "jacobian": (J,)}
        lower = LowerResult((best,), None, 0, None)
        return Evaluation(value, unflatten(J.T @ weights, x), None, (best,), None, lower, tracked=tracked)

    def value(self, x: Tensors, y: Tensors, memory: Memory, draws: Draws) -> tuple[Tensor, Tensors]:
        """The estimate of Phi at x, and y. Cost: one ``backward``."""
        evaluation = self.evaluate(x, y, memory, draws)
        return evaluation.value, evaluation.y

    def solve_lower(self, x: Tensors, y: Tensors, memory: Memory, draws: Draws) -> LowerResult:
        """The best response at x on a full sample, for ``refresh``. Cost: one value of f."""
        (like,) = y
        best = self._linear_problem.linear.response(self._map(x, draws.pair.upper)).to(like)
        return LowerResult((best,), None, 0, None)

    @property
    def answers(self) -> bool:
        """Y is the best response at every point."""
        return True

    @property
    def _linear_problem(self) -> NonconvexLinearProblem:
        problem = self.problem
        assert isinstance(problem, NonconvexLinearProblem)
        return problem

    def _map(self, x: Tensors, sample: Sample) -> Tensor:
        """H(x; sample). Cost: one value of f."""
        self.oracle.counts.add("upper_value", sample)
        problem, h = self._linear_problem, flatten(x).new_zeros(self._linear_problem.linear.size)
        with torch.no_grad():
            for weight, batch, seed in sample.parts():
                rows, values = problem.map_value(x, batch, seed)
                h.index_add_(0, rows, values.to(h), alpha=weight)
        return h

    def _jacobian(self, x: Tensors, sample: Sample) -> tuple[Tensor, bool]:
        """H'(x; sample) with a row per entry of H, and whether a path leads to x. Cost: one gradient of f."""
        self.oracle.counts.add("upper_gradient", sample)
        problem, xs, found = self._linear_problem, leaves(x), False
        J = flatten(x).new_zeros(problem.linear.size, numel(x))
        for weight, batch, seed in sample.parts():
            with torch.enable_grad():
                rows, values = problem.map_value(xs, batch, seed)
                pieces = values.unbind()
            for row, piece in zip(rows.tolist(), pieces, strict=True):
                gradient, reached = vjp([piece], xs, [None], keep=True)
                J[row].add_(flatten(gradient), alpha=weight)
                found = found or any(reached)
        return J, found
