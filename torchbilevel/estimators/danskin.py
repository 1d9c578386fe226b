"""Danskin's gradient for minimax problems: f_x at the best response."""

from __future__ import annotations

from torchbilevel.estimators.base import SILENT_ZERO, Estimator
from torchbilevel.estimators.evaluation import Evaluation, Memory
from torchbilevel.problem import Problem
from torchbilevel.samples import Samples
from torchbilevel.tensors import Tensors, scale


class Danskin(Estimator):
    """The gradient of Phi(x) = max over y of f(x, y) by Danskin's theorem.

    y moves by the lower solver, ascending on f; then v = f_x(x, y).

    Args:
        lower_solver: moves y in every ``backward``; ``None`` leaves y where it is.
        warm_start: whether y goes on from the last call.
        seed: of the random numbers inside the loss.

    Raises:
        ValueError: on binding to a bilevel problem, or if a hyperparameter of the lower solver is a function of the
            upper module.

    Cost: per ``backward`` the gradients of the lower solver and one more. The error is at most L |y - y*(x)|.

    Reference: Danskin, 1967; Jin, Netrapalli and Jordan, ICML 2020 (GDmax).

    Differs from the paper: nothing.
    """

    def refuse(self, problem: Problem) -> None:
        """Bilevel problems need a linear solve or unrolling."""
        if not problem.minimax:
            raise ValueError(
                "Danskin is for minimax problems; f_x alone is no gradient of a BilevelProblem: use Implicit or "
                "Unrolled"
            )

    def evaluate(self, x: Tensors, y: Tensors, memory: Memory, samples: Samples) -> Evaluation:
        """Move y, then take f_x.

        Args:
            x: upper variables.
            y: where the lower solver starts.
            memory: as the last ``backward`` left it.
            samples: where the loss is evaluated.

        Returns:
            The evaluation.

        Raises:
            ValueError: if the loss does not depend on x.
        """
        lower = self.solve_lower(x, y, memory, samples.lower)
        value, f_x, f_y, in_x = self.oracle.upper_gradient(x, lower.y, samples.upper)
        if not in_x:
            raise ValueError(SILENT_ZERO)
        return Evaluation(value, f_x, scale(-1.0, f_y), lower.y, None, lower)
