"""First-order methods for minimax problems."""

from __future__ import annotations

from torchbilevel.estimators import Danskin
from torchbilevel.lower import LowerSolver
from torchbilevel.method import Method
from torchbilevel.methods.rules import gradient_descent
from torchbilevel.problem import Problem


class GDmax(Method):
    """Gradient descent on Phi(x) = max over y of f(x, y).

    y <- K ascent steps on f(x_t, .), v = f_x(x_t, y), x_{t+1} = x_t - lr v.

    Args:
        problem: a ``MinimaxProblem``.
        lr: eta, positive; in theory of the order of 1 / (kappa L).
        lower_solver: moves y; in theory ``GD(lr=1 / L, steps=K)`` with K of the order of kappa.
        warm_start: whether y goes on from the last call.
        seed: of the random numbers inside the loss.

    Cost: per step K + 1 gradients of f.

    Reference: Jin, Netrapalli and Jordan, ICML 2020; Nouiehed et al., NeurIPS 2019.

    Differs from the paper: a fixed number of ascent steps, or ``tol`` of the lower solver, in place of an oracle of
    given accuracy.
    """

    def __init__(
        self,
        problem: Problem,
        lr: float,
        *,
        lower_solver: LowerSolver | None,
        warm_start: bool = True,
        seed: int = 0,
    ) -> None:
        estimator = Danskin(lower_solver, warm_start=warm_start, seed=seed)
        super().__init__(problem, estimator, gradient_descent(problem, lr))
