"""Implicit differentiation (AID): the hypergradient from one linear solve with g_yy."""

from __future__ import annotations

from dataclasses import replace

from torchbilevel.derivatives import Oracle
from torchbilevel.estimators.base import SILENT_ZERO, Estimator
from torchbilevel.estimators.evaluation import Evaluation, Memory
from torchbilevel.linear_solve import CG, LinearSolver
from torchbilevel.lower import LowerResult, LowerSolver
from torchbilevel.problem import Problem
from torchbilevel.samples import Samples
from torchbilevel.tensors import Tensors, sub


def implicit_field(
    oracle: Oracle,
    x: Tensors,
    y: Tensors,
    z: Tensors | None,
    samples: Samples,
    linear_solver: LinearSolver,
    lower: LowerResult,
) -> Evaluation:
    """f_x - g_xy z with g_yy z = f_y, at (x, y) as it is given.

    Args:
        oracle: takes and counts the derivatives.
        x: upper variables.
        y: lower variables.
        z: where the linear solve starts, ``None`` for zero.
        samples: f is evaluated on the upper one, g on the lower one.
        linear_solver: solves for z.
        lower: how y came about, passed on.

    Returns:
        The evaluation. Cost: a gradient of f, a gradient of g, the solver's Hessian-vector products, and one
        Jacobian-vector product.

    Raises:
        ValueError: if neither loss depends on x.
    """
    value, f_x, f_y, in_f = oracle.upper_gradient(x, y, samples.upper)
    graph = oracle.linearize(x, y, samples.lower)
    solve = linear_solver.solve(graph.hessian_product, f_y, z)
    hypergradient = sub(f_x, graph.jacobian_product(solve.z))
    if not in_f and not graph.reaches_x:
        raise ValueError(SILENT_ZERO)
    return Evaluation(value, hypergradient, graph.gradient, y, solve.z, lower, solve)


class Implicit(Estimator):
    """Approximate implicit differentiation (AID).

    y moves by the lower solver; then z solves g_yy(x, y) z = f_y(x, y), and v = f_x(x, y) - g_xy(x, y) z.

    Args:
        lower_solver: moves y in every ``backward``; ``None`` leaves y where it is.
        linear_solver: solves for z: ``CG()`` (default), ``Neumann``, ``Direct``.
        warm_start: whether y goes on from the last call.
        warm_start_adjoint: whether z goes on from the last call, where y does; costs one more Hessian-vector product
            per solve and saves several when x moves little.
        seed: of the random numbers inside the losses.

    Raises:
        TypeError: if a solver is of the wrong kind.
        ValueError: on binding to a minimax problem, or if a hyperparameter of the lower solver is a function of the
            upper module.

    Cost: per ``backward`` the gradients of g of the lower solver and one more, one gradient of f, the Hessian-vector
    products of the solver, one Jacobian-vector product. Keeps a copy of z.

    Reference: Domke, AISTATS 2012; Pedregosa, ICML 2016; Ji, Yang and Liang, ICML 2021 (AID-BiO).

    Differs from the paper: nothing.
    """

    def __init__(
        self,
        lower_solver: LowerSolver | None,
        linear_solver: LinearSolver | None = None,
        *,
        warm_start: bool = True,
        warm_start_adjoint: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(lower_solver, warm_start=warm_start, seed=seed)
        if linear_solver is not None and not isinstance(linear_solver, LinearSolver):
            raise TypeError(
                f"linear_solver must be a linear solver such as CG(max_iter=20), got {type(linear_solver).__name__}"
            )
        self.linear_solver = CG() if linear_solver is None else linear_solver
        self.warm_start_adjoint = warm_start_adjoint

    def refuse(self, problem: Problem) -> None:
        """Minimax problems need no linear solve."""
        if problem.minimax:
            raise ValueError(
                "Implicit is for bilevel problems; the gradient of a MinimaxProblem needs no linear solve: use Danskin"
            )

    def evaluate(self, x: Tensors, y: Tensors, memory: Memory, samples: Samples) -> Evaluation:
        """Move y, then differentiate implicitly."""
        lower = self.solve_lower(x, y, memory, samples.lower)
        return implicit_field(self.oracle, x, lower.y, memory.z, samples, self.linear_solver, lower)

    def advance(self, evaluation: Evaluation) -> Memory:
        """The memory after a ``backward``; it holds z only where the next solve starts from it."""
        memory = super().advance(evaluation)
        return memory if self.warm_start_adjoint else replace(memory, z=None)
