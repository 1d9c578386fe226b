"""Unrolled differentiation (ITD): the derivative of f(x, y_K(x)) through the steps of the lower solver."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from torchbilevel.derivatives import vjp
from torchbilevel.draws import BatchSizes, Draws
from torchbilevel.estimators.base import Estimator
from torchbilevel.estimators.evaluation import Evaluation, Memory
from torchbilevel.estimators.vetting import SILENT_ZERO
from torchbilevel.lower import LowerResult, LowerSolver, Unrollable, map_tensors
from torchbilevel.problem import Problem
from torchbilevel.tensors import Tensors, add, detach, leaves, zeros

_Run = tuple[Tensor, Tensors, bool, Tensors, Any]  # f, the hypergradient, whether it reaches x, y and solver's state


class Unrolled(Estimator):
    """Iterative differentiation (ITD): v = d/dx f(x, y_K(x)), the start of y constant unless ``lower_init`` gives it.

    With plain gradient steps, p_K = f_y and for k = K-1, ..., 0:   v -= lr g_xy(x, y_k) p_{k+1},
    p_k = p_{k+1} - lr g_yy(x, y_k) p_{k+1}, starting from v = f_x. Where ``problem.lower_init`` is set, with
    ``warm_start=False`` and nothing truncated, y_0 depends on x and p_0 is carried through it (MAML). Hyperparameters
    of the lower solver that are functions of the upper module receive their derivatives as well.

    Args:
        lower_solver: ``GD``, ``Adam`` or ``SignGD``, without ``tol``.
        truncate: differentiate through the last ``truncate`` steps only; ``None`` (default) through all.
        recompute: keep the trajectory instead of the graph and rebuild each step when it is differentiated: K copies of
            y (and of the solver's momentum) instead of K graphs, for one more gradient of g per step.
        batch_sizes: of independent draws, one per step; ``None`` for one sample of each loss per ``backward``.
        warm_start: whether y goes on from the last call.
        seed: of the random numbers inside the losses.

    Raises:
        TypeError: if the lower solver cannot be unrolled; the message names what can.
        ValueError: if ``truncate`` is not between 1 and the solver's steps, or the solver has a ``tol``; on binding to
            a problem with ``lower_init`` while ``warm_start=True``.

    Cost: K gradients of g, one gradient of f; backwards K Hessian-vector and K Jacobian-vector products; with
    ``recompute`` another K gradients of g. Memory: K first-order graphs, or with ``recompute`` K copies of y.
    ``truncate`` stands in place of K for all but the K gradients.

    Reference: Maclaurin, Duvenaud and Adams, ICML 2015; Franceschi et al., ICML 2017; Shaban et al., AISTATS 2019
    (truncation); Ji, Yang and Liang, ICML 2021 (ITD-BiO).

    Differs from the paper: nothing.
    """

    differentiates_steps = True

    def __init__(
        self,
        lower_solver: LowerSolver,
        *,
        truncate: int | None = None,
        recompute: bool = False,
        batch_sizes: BatchSizes | None = None,
        warm_start: bool = True,
        seed: int = 0,
    ) -> None:
        if not isinstance(lower_solver, Unrollable):
            name = lower_solver if isinstance(lower_solver, LowerSolver) else type(lower_solver).__name__
            raise TypeError(
                f"{name} cannot be unrolled; use GD (with momentum, for torch.optim.SGD), Adam (also AdamW) or SignGD, "
                f"or keep it and use Implicit"
            )
        if lower_solver.tol is not None:
            raise ValueError(
                f"an unrolled lower solver takes a fixed number of steps; leave tol=None, got tol={lower_solver.tol}"
            )
        whole = isinstance(truncate, int) and not isinstance(truncate, bool)
        if truncate is not None and not (whole and 1 <= truncate <= lower_solver.steps):
            raise ValueError(f"truncate must be between 1 and the solver's {lower_solver.steps} steps, got {truncate}")
        super().__init__(lower_solver, batch_sizes=batch_sizes, warm_start=warm_start, seed=seed)
        self.lower_solver: Unrollable = lower_solver
        self.truncate, self.recompute = truncate, recompute

    def refuse(self, problem: Problem) -> None:
        """A start that is a function of x is learned only where every call begins there."""
        if self.warm_start and problem.start(problem.x) is not None:
            raise ValueError(
                "the problem has a lower_init, and with warm_start=True only the first call would start there and "
                "learn it: set warm_start=False (as MAML has it), or copy the start into the lower module and leave "
                "lower_init out"
            )

    def evaluate(self, x: Tensors, y: Tensors, memory: Memory, draws: Draws) -> Evaluation:
        """Unroll the lower solver from y and differentiate through it.

        Args:
            x: upper variables.
            y: where the lower solver starts.
            memory: as the last ``backward`` left it.
            draws: the samples on which the losses are evaluated.

        Returns:
            The evaluation.

        Raises:
            ValueError: if neither the losses nor the lower solver nor the start of y depend on x.
        """
        xs, steps = leaves(x), self.lower_solver.steps
        kept = steps if self.truncate is None else self.truncate
        with torch.enable_grad():
            solver = self.lower_solver.bind(lambda function: self.problem.call_upper(function, xs))
            initial = self.problem.start(xs, draws.seed) if kept == steps else None
        state = memory.solver_state if self.warm_start else None
        y = detach(y)
        with torch.no_grad():
            for k in range(steps - kept):
                y, state = solver.update(y, self.oracle.lower_gradient(x, y, draws.at(k).lower)[1], state)
                y = self.problem.project_y(y)
        run = self._recompute if self.recompute else self._reverse
        value, v, found, y, state = run(solver, xs, y if initial is None else initial, state, kept, draws)
        if not found:
            raise ValueError(SILENT_ZERO)
        for k in range(steps - kept, steps):
            self.oracle.counts.add("hessian_product", draws.at(k).lower)
            self.oracle.counts.add("jacobian_product", draws.at(k).lower)
        return Evaluation(value, v, None, y, None, LowerResult(y, state, steps, None))

    def _reverse(self, solver: Unrollable, xs: Tensors, y: Tensors, state: Any, kept: int, draws: Draws) -> _Run:
        """Differentiate through one graph of all kept steps."""
        with torch.enable_grad():
            y = tuple(t if t.requires_grad else t.detach().requires_grad_() for t in y)
            for k in range(solver.steps - kept, solver.steps):
                y, state = solver.update(y, self.oracle.lower_gradient_graph(xs, y, draws.at(k).lower), state)
                y = self.problem.project_y(y)
        value, f_x, f_y, in_f = self.oracle.upper_gradient(xs, y, draws.at(0).upper)
        through, reached = vjp(y, xs, f_y)
        return value, add(f_x, through), in_f or any(reached), detach(y), map_tensors(Tensor.detach, state)

    def _recompute(self, solver: Unrollable, xs: Tensors, y: Tensors, state: Any, kept: int, draws: Draws) -> _Run:
        """Keep the trajectory, and rebuild each step when its turn comes to be differentiated."""
        initial = y
        learned = {name: vars(solver)[name] for name in self.lower_solver.learned}
        rates = map_tensors(_leaf, learned)
        solver = solver.with_values(rates)
        trajectory = []
        with torch.no_grad():
            for k in range(solver.steps - kept, solver.steps):
                sample = draws.at(k).lower
                trajectory.append((y, state, sample))
                y, state = solver.update(y, self.oracle.lower_gradient(xs, y, sample)[1], state)
                y = self.problem.project_y(y)
        value, v, p, found = self.oracle.upper_gradient(xs, y, draws.at(0).upper)
        p_state, p_rates = zeros(_tensors(state)), zeros(_tensors(rates))
        while trajectory:
            y_k, state_k, sample = trajectory.pop()
            with torch.enable_grad():
                ys, memory = leaves(y_k), map_tensors(_leaf, state_k)
                following, after = solver.update(ys, self.oracle.lower_gradient_graph(xs, ys, sample), memory)
                following = self.problem.project_y(following)
            groups = (xs, ys, _tensors(memory), _tensors(rates))
            inputs = tuple(t for group in groups for t in group)
            products, reached = vjp((*following, *_tensors(after)), inputs, (*p, *p_state))
            found = found or any(reached[: len(xs)])
            in_x, p, p_state, in_rates = _split(products, [len(group) for group in groups])
            v, p_rates = add(v, in_x), add(p_rates, in_rates)
        for outputs, cotangents in ((_tensors(learned), p_rates), (initial, p)):
            products, reached = vjp(outputs, xs, cotangents)
            v, found = add(v, products), found or any(reached)
        return value, v, found, y, state


def _leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()


def _tensors(tree: Any) -> Tensors:
    """All tensors of nested tuples, lists and dicts, in order."""
    if isinstance(tree, Tensor):
        return (tree,)
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple | list) else ()
    return tuple(t for value in values for t in _tensors(value))


def _split(tensors: Tensors, sizes: Sequence[int]) -> list[Tensors]:
    """Cut a tuple into consecutive pieces."""
    ends = list(accumulate(sizes))
    return [tensors[end - size : end] for size, end in zip(sizes, ends, strict=True)]
