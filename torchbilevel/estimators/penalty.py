"""The penalty field of F2SA: a hypergradient from first derivatives alone."""

from __future__ import annotations

from itertools import count

from torch import Tensor

from torchbilevel.decay import Decay
from torchbilevel.draws import BatchSizes, Draws
from torchbilevel.estimators.base import Estimator
from torchbilevel.estimators.evaluation import Evaluation, Memory
from torchbilevel.estimators.lower_gradient import LowerGradient
from torchbilevel.estimators.vetting import SILENT_ZERO
from torchbilevel.linear_solve.base import positive
from torchbilevel.lower import GD, LowerSolver
from torchbilevel.lower.hyperparameters import check_flag
from torchbilevel.oracle import Oracle
from torchbilevel.problem import Problem
from torchbilevel.tensors import Tensors, axpy, clone, is_finite, sub


class Penalty(Estimator):
    """The gradient of the penalty f(x, p) + lambda (g(x, p) - g(x, y)), p and y its minimisers.

    y moves by the lower solver along g_y(x, y), p by the same solver along g_y(x, p) + f_y(x, p) / lambda_t; then

        v = f_x(x, p) + lambda_t (g_x(x, p) - g_x(x, y)).

    At y = argmin of g and p = argmin of lambda g + f, v differs from grad Phi by O(1 / lambda). With a decay lambda_t =
    ``multiplier`` (lower factor) / (upper factor) grows, since the step of x decays faster than that of y. ``y`` of the
    problem approximates y*(x); p is off by O(1 / lambda).

    Args:
        lower_solver: ``GD(lr, steps)`` without momentum; lr at most 2 / (L_g + L_f / lambda).
        multiplier: lambda_0, positive; in theory at least 2 L_f / mu_g.
        shared: whether y and p meet the same samples of g. Their noise then cancels in v; otherwise, as in the paper,
            the samples are independent, and lambda multiplies their noise.
        batch_sizes: of independent draws: ``upper`` of f, ``lower`` of g; ``None`` for one sample of each loss.
        decay: of the step of y and p, and of x under a ``Method``.
        initial_solver: brings y close to y*(x) before the first ``backward``; p starts there too.
        warm_start: whether y and p go on from the last call.
        seed: of the random numbers inside the losses.

    Raises:
        TypeError: if ``shared`` is neither true nor false.
        ValueError: if an argument is out of range, or on binding to a minimax problem.

    Cost: per ``backward`` with K lower steps 2 K + 2 gradients of g, K + 1 of f, and a value of f. Keeps p. In single
    precision the difference in v loses as many digits as lambda has.

    Reference: Kwon, Kwon, Wright and Nowak, ICML 2023 (F2SA, Algorithm 1).

    Differs from the paper: p, y and lambda are y, z and lambda there. The paper's step of p is alpha (f_y + lambda g_y)
    with lambda = gamma / (2 alpha), gamma the step of y; here lambda = gamma / alpha.
    """

    def __init__(
        self,
        lower_solver: GD,
        *,
        multiplier: float,
        shared: bool = False,
        batch_sizes: BatchSizes | None = None,
        decay: Decay | None = None,
        initial_solver: LowerSolver | None = None,
        warm_start: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(
            lower_solver,
            batch_sizes=batch_sizes,
            decay=decay,
            initial_solver=initial_solver,
            warm_start=warm_start,
            seed=seed,
        )
        if not isinstance(lower_solver, GD) or lower_solver.momentum != 0:
            raise ValueError(f"y and p move by plain steps: use GD(lr=..., steps=...), got {lower_solver}")
        check_flag("shared", shared)
        self.multiplier, self.shared = positive("multiplier", multiplier), shared

    def refuse(self, problem: Problem) -> None:
        """Minimax problems need no penalty."""
        if problem.minimax:
            raise ValueError("Penalty is for bilevel problems; a MinimaxProblem needs no penalty: use Danskin")

    def multiplier_at(self, t: int) -> float:
        """lambda_t."""
        return self.multiplier if self.decay is None else self.multiplier * self.decay.lower(t) / self.decay.upper(t)

    def evaluate(self, x: Tensors, y: Tensors, memory: Memory, draws: Draws) -> Evaluation:
        """Move y and p, then take the difference of the gradients there."""
        solver, multiplier = self.lower_solver, self.multiplier_at(memory.calls)
        assert isinstance(solver, GD)
        # Draws 0 to K - 1 of g are those of the steps of y.
        first = 0 if self.shared else solver.steps
        last = first + solver.steps
        lower = self.solve_lower(x, y, memory, draws)
        if self.decay is not None:
            solver = solver.scaled(self.decay.lower(memory.calls))
        penalized = PenalizedGradient(self.oracle, x, draws, first, 1.0 / multiplier)
        p = clone(solver.run(penalized, memory.tracked.get("p", y), None, self.problem.project_y, self.problem.tasks).y)
        upper = draws.at(0).upper
        _, f_x, _, in_f = self.oracle.upper_gradient(x, p, upper)
        _, at_p, _, in_g = self.oracle.full_lower_gradient(x, p, draws.at(last).lower)
        _, at_y, g_y, _ = self.oracle.full_lower_gradient(x, lower.y, draws.at(last + (not self.shared)).lower)
        if not in_f and not in_g:
            raise ValueError(SILENT_ZERO)
        v = axpy(multiplier, sub(at_p, at_y), f_x)
        value = self.oracle.upper_value(x, lower.y, upper)
        return Evaluation(value, v, g_y, lower.y, None, lower, tracked={"p": p})

    def vet(self, e: Evaluation) -> None:
        """As in ``Estimator``; the message says where p is what is not finite."""
        if is_finite(e.y) and not is_finite(e.tracked["p"]):
            raise FloatingPointError(
                f"the minimiser p of the penalised loss is not finite after {self.lower_solver}: its lr must be "
                "below 2 / (L_g + L_f / lambda), so that a smaller lr or a larger multiplier may help"
            )
        super().vet(e)


class PenalizedGradient(LowerGradient):
    """p -> (g + weight f, g_y + weight f_y) at one x; every call meets the next draws.

    Args:
        oracle: takes the gradients.
        x: upper variables.
        draws: the samples; those of f are numbered from 1.
        first: number of the first draw of g.
        weight: 1 / lambda.
    """

    def __init__(self, oracle: Oracle, x: Tensors, draws: Draws, first: int, weight: float) -> None:
        super().__init__(oracle, x, draws, first)
        self._of_f, self._weight = count(1), weight

    def __call__(self, y: Tensors) -> tuple[Tensor, Tensors]:
        """The penalised loss over lambda and its gradient at y, on the next draws."""
        g, g_y = super().__call__(y)
        f, _, f_y, _ = self._oracle.upper_gradient(self._x, y, self._draws.at(next(self._of_f)).upper)
        return g + self._weight * f, axpy(self._weight, f_y, g_y)
