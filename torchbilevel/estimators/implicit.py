"""Implicit differentiation (AID): the hypergradient from one linear solve with g_yy."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

from torchbilevel.decay import Decay
from torchbilevel.draws import BatchSizes, Draw, Draws
from torchbilevel.estimators.base import Estimator
from torchbilevel.estimators.evaluation import Evaluation, Memory
from torchbilevel.estimators.recursion import Recursion
from torchbilevel.estimators.tracking import Estimate
from torchbilevel.estimators.vetting import SILENT_ZERO
from torchbilevel.linear_solve import CG, LinearSolver, Neumann, SolveResult
from torchbilevel.lower import LowerResult, LowerSolver
from torchbilevel.oracle import Oracle
from torchbilevel.problem import Problem
from torchbilevel.tensors import Tensors, sub


def implicit_field(
    oracle: Oracle,
    x: Tensors,
    y: Tensors,
    z: Tensors | None,
    draw: Draw,
    linear_solver: LinearSolver,
    lower: LowerResult,
) -> Evaluation:
    """f_x - g_xy z with g_yy z = f_y, at (x, y) as it is given.

    Args:
        oracle: takes and counts the derivatives.
        x: upper variables.
        y: lower variables.
        z: where the linear solve starts, ``None`` for zero.
        draw: the samples of f, of the products with g_yy and of that with g_xy.
        linear_solver: solves for z.
        lower: how y came about, passed on.

    Returns:
        The evaluation. Cost: a gradient of f, the solver's Hessian-vector products, one Jacobian-vector product, and a
        gradient of g where one sample serves all products.

    Raises:
        ValueError: if neither loss depends on x.
    """
    value, f_x, f_y, in_f = oracle.upper_gradient(x, y, draw.upper)
    if draw.single:
        graph = oracle.linearize(x, y, draw.lower)
        solve = linear_solver.drawn(draw.seed).solve(graph.hessian_product, f_y, z, oracle.losses.tasks)
        product, in_g, g_y = graph.jacobian_product(solve.z), graph.reaches_x, graph.gradient
    else:
        solve = solve_adjoint(oracle, x, y, f_y, z, draw, linear_solver)
        product, in_g = oracle.jacobian_product(x, y, solve.z, draw.jvp)
        g_y = None
    if not in_f and not in_g:
        raise ValueError(SILENT_ZERO)
    return Evaluation(value, sub(f_x, product), g_y, y, solve.z, lower, solve)


def solve_adjoint(
    oracle: Oracle, x: Tensors, y: Tensors, b: Tensors, z: Tensors | None, draw: Draw, linear_solver: LinearSolver
) -> SolveResult:
    """Solve g_yy z = b, every product on a sample of its own where the solver allows it.

    Args:
        oracle: takes and counts the products.
        x: upper variables.
        y: lower variables.
        b: right-hand side.
        z: where the solver starts, ``None`` for zero.
        draw: the samples of the products.
        linear_solver: the solver.

    Returns:
        The solution. Cost: the solver's products; a gradient of g where they share their sample.
    """
    solver = linear_solver.drawn(draw.seed)
    if draw.single or not solver.resamples:
        return solver.solve(oracle.linearize(x, y, draw.hvp()).hessian_product, b, z, oracle.losses.tasks)
    numbers = count()

    def product(s: Tensors) -> Tensors:
        i = next(numbers)
        return oracle.hessian_product(x, y, s, draw.hvp(i, solver.batch_size(i, draw.hvp_size)))

    return solver.solve(product, b, z, oracle.losses.tasks)


class Implicit(Estimator):
    """Approximate implicit differentiation (AID).

    y moves by the lower solver; then z solves g_yy(x, y) z = f_y(x, y), and v = f_x(x, y) - g_xy(x, y) z. A recursion
    carries estimates of v and g_y along, or of f_x, f_y and g_y, from which v is then finished by a fresh solve.

    Args:
        lower_solver: moves y in every ``backward``; ``None`` leaves y where it is.
        linear_solver: solves for z: ``CG()`` (default), ``Neumann``, ``Direct``; with independent draws
            ``RandomTruncation`` and ``SGDSolve`` as well.
        recursion: ``Plain()`` (default), ``Storm``, ``Spider`` or ``Hybrid``.
        batch_sizes: of independent draws; ``None`` for one sample of each loss per ``backward``.
        decay: of all step sizes and weights.
        initial_solver: brings y close to y*(x) before the first ``backward``.
        probe_solver: brings y close to y*(x) at trial points, where y goes with x.
        warm_start: whether y goes on from the last call.
        warm_start_adjoint: whether z goes on from the last call, where y does; costs one more Hessian-vector product
            per solve and saves several when x moves little.
        seed: of the random numbers inside the losses.

    Raises:
        TypeError: if a solver is of the wrong kind.
        ValueError: on binding to a minimax problem, if a hyperparameter of the lower solver is a function of the upper
            module, or if ``Neumann(shrink=...)`` has no batch size to divide up.

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
        recursion: Recursion | None = None,
        batch_sizes: BatchSizes | None = None,
        decay: Decay | None = None,
        initial_solver: LowerSolver | None = None,
        probe_solver: LowerSolver | None = None,
        warm_start: bool = True,
        warm_start_adjoint: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(
            lower_solver,
            recursion=recursion,
            batch_sizes=batch_sizes,
            decay=decay,
            initial_solver=initial_solver,
            probe_solver=probe_solver,
            warm_start=warm_start,
            seed=seed,
        )
        if linear_solver is not None and not isinstance(linear_solver, LinearSolver):
            got = linear_solver.__name__ if isinstance(linear_solver, type) else type(linear_solver).__name__
            raise TypeError(f"linear_solver must be a linear solver such as CG(max_iter=20), got {got}")
        if isinstance(linear_solver, Neumann) and linear_solver.shrink is not None:
            size = None if batch_sizes is None else batch_sizes.size("hvp", anchor=False)
            if size is None:
                raise ValueError(
                    f"shrink={linear_solver.shrink} divides up the batch size of the products with g_yy: give a "
                    "hvp_batch_size or lower_batch_size, got None"
                )
        self.linear_solver = CG() if linear_solver is None else linear_solver
        self.warm_start_adjoint = warm_start_adjoint

    def refuse(self, problem: Problem) -> None:
        """Minimax problems need no linear solve."""
        if problem.minimax:
            raise ValueError(
                "Implicit is for bilevel problems; the gradient of a MinimaxProblem needs no linear solve: use Danskin"
            )

    def evaluate(self, x: Tensors, y: Tensors, memory: Memory, draws: Draws) -> Evaluation:
        """Move y, then differentiate implicitly."""
        if not self.follows:
            lower = self.solve_lower(x, y, memory, draws)
            return implicit_field(self.oracle, x, lower.y, memory.z, draws.at(0), self.linear_solver, lower)
        here, lower = self.follow(x, y, memory, draws)
        assert here.value is not None
        v, z, solve = here.upper, here.z, here.solve
        if self.recursion.tracks == "gradients":
            f_x, f_y, draw = v[: len(x)], v[len(x) :], draws.at(0)
            solve = solve_adjoint(self.oracle, x, here.y, f_y, memory.z, draw, self.linear_solver)
            product, in_g = self.oracle.jacobian_product(x, here.y, solve.z, draw.jvp)
            if not in_g and not any(bool(t.any()) for t in f_x):
                raise ValueError(SILENT_ZERO)
            v, z = sub(f_x, product), solve.z
        return Evaluation(here.value, v, here.lower, lower.y, z, lower, solve, self.remember(here))

    def observe(self, x: Tensors, y: Tensors, memory: Memory, draw: Draw) -> Estimate:
        """The hypergradient or f_x and f_y, as the recursion tracks them, and g_y.

        Args:
            x: upper variables.
            y: lower variables.
            memory: its z is where the linear solve starts.
            draw: the samples.

        Returns:
            The quantities.
        """
        if self.recursion.tracks == "gradients":
            value, f_x, f_y, _ = self.oracle.upper_gradient(x, y, draw.upper)
            return Estimate(x, y, (*f_x, *f_y), self.oracle.lower_gradient(x, y, draw.lower)[1], value)
        e = implicit_field(self.oracle, x, y, memory.z, draw, self.linear_solver, LowerResult(y, None, 0, None))
        g_y = self.oracle.lower_gradient(x, y, draw.lower)[1] if e.lower_gradient is None else e.lower_gradient
        return Estimate(x, y, e.hypergradient, g_y, e.value, e.z, e.solve)

    def advance(self, evaluation: Evaluation) -> Memory:
        """The memory after a ``backward``; it holds z only where the next solve starts from it."""
        memory = super().advance(evaluation)
        return memory if self.warm_start_adjoint else replace(memory, z=None)
