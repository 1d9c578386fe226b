"""First-order methods for bilevel problems."""

from __future__ import annotations

from torchbilevel.estimators import Implicit, Unrolled
from torchbilevel.linear_solve import LinearSolver
from torchbilevel.lower import LowerSolver
from torchbilevel.method import Method
from torchbilevel.methods.rules import gradient_descent
from torchbilevel.problem import Problem


class AIDBiO(Method):
    """Bilevel optimisation by approximate implicit differentiation.

    y <- K lower steps at x_t, z <- solve g_yy z = f_y, v = f_x - g_xy z, x_{t+1} = x_t - lr v.

    Args:
        problem: a ``BilevelProblem``.
        lr: eta, positive; in theory 1 / (8 L_Phi).
        lower_solver: moves y; in theory ``GD(lr=1 / L, steps=K)`` with K of the order of kappa.
        linear_solver: solves for z; ``CG()`` by default, in theory with N of the order of sqrt(kappa).
        warm_start: whether y goes on from the last call.
        warm_start_adjoint: whether z goes on from the last call, where y does.
        seed: of the random numbers inside the losses.

    Cost: per step K + 1 gradients of g, one of f, the solver's Hessian-vector products (one more when z is warm), one
    Jacobian-vector product. One extra copy of y for z.

    Reference: Ji, Yang and Liang, ICML 2021 (AID-BiO).

    Differs from the paper: nothing; the lower solver is free.
    """

    def __init__(
        self,
        problem: Problem,
        lr: float,
        *,
        lower_solver: LowerSolver | None,
        linear_solver: LinearSolver | None = None,
        warm_start: bool = True,
        warm_start_adjoint: bool = True,
        seed: int = 0,
    ) -> None:
        estimator = Implicit(
            lower_solver,
            linear_solver,
            warm_start=warm_start,
            warm_start_adjoint=warm_start_adjoint,
            seed=seed,
        )
        super().__init__(problem, estimator, gradient_descent(problem, lr))


class ITDBiO(Method):
    """Bilevel optimisation by iterative differentiation, that is, through the unrolled lower steps.

    y_K <- K lower steps at x_t from y_0, v = d/dx f(x_t, y_K(x_t)), x_{t+1} = x_t - lr v. With ``problem.lower_init``
    and ``warm_start=False`` this is MAML.

    Args:
        problem: a ``BilevelProblem``.
        lr: eta, positive.
        lower_solver: ``GD``, ``Adam`` or ``SignGD``; its hyperparameters may be functions of the upper module.
        truncate: differentiate through the last ``truncate`` steps only.
        recompute: keep K copies of y instead of K graphs.
        warm_start: whether y goes on from the last call.
        seed: of the random numbers inside the losses.

    Cost: per step K gradients of g, one of f, K Hessian- and K Jacobian-vector products; see ``Unrolled``.

    Reference: Ji, Yang and Liang, ICML 2021 (ITD-BiO).

    Differs from the paper: nothing; the lower solver is free.
    """

    def __init__(
        self,
        problem: Problem,
        lr: float,
        *,
        lower_solver: LowerSolver,
        truncate: int | None = None,
        recompute: bool = False,
        warm_start: bool = True,
        seed: int = 0,
    ) -> None:
        estimator = Unrolled(lower_solver, truncate=truncate, recompute=recompute, warm_start=warm_start, seed=seed)
        super().__init__(problem, estimator, gradient_descent(problem, lr))
