"""Deterministic methods that escape saddles: a perturbed rule on a hypergradient."""

from __future__ import annotations

from dataclasses import replace

from torchbilevel.estimators import Danskin, Implicit
from torchbilevel.linear_solve import LinearSolver
from torchbilevel.lower import LowerSolver
from torchbilevel.method import Method
from torchbilevel.methods.rules import perturbed_descent
from torchbilevel.problem import Problem
from torchbilevel.verify import Verify


class PerturbedAID(Method):
    """AID-BiO that leaves saddles by random displacements.

    y and z as in ``AIDBiO``; x_{t+1} = x_t + xi, xi uniform in the ball of radius r, if |v| <= 4/5 epsilon and the last
    displacement is more than t_thres steps ago; else x_{t+1} = x_t - lr v.

    Args:
        problem: a ``BilevelProblem``.
        lr: eta, positive; in theory 1 / L_Phi.
        radius: r, length of the displacement in units of x; 1e-3 to 1e-2 times the scale of x.
        grad_tol: epsilon, the accuracy asked for; the hypergradient should be exact to epsilon / 5.
        lower_solver: moves y; in theory ``GD(lr=1 / L, steps=K)``, K of the order of kappa log(1 / epsilon).
        linear_solver: solves for z; ``CG()`` by default, in theory with N of the order of sqrt(kappa) log(1 / epsilon).
        escape_steps: t_thres, steps that follow a displacement before the next may come; default 50.
        value_test: test at the end of every window whether f(x, y) has dropped by ``value_tol``. Needs a ``tol`` of the
            lower solver that is below ``value_tol``, since f(x, y) is biased by the error of y.
        value_tol: f_thres, positive; required with ``value_test``.
        stop: end the run at the first test passed, at the point before the displacement.
        verify: certify a point that passed its test, and leave it if it is a saddle; see ``Verify``.
        warm_start: whether y goes on from the last call.
        warm_start_adjoint: whether z goes on from the last call, where y does.
        seed: of the displacements, and of the random numbers inside the losses.

    Raises:
        ValueError: if an argument is out of range, or ``value_test`` lacks the tolerance it needs.

    Cost: that of ``AIDBiO``; one copy of x and y after a displacement, with ``value_test`` up to two.

    Reference: Huang, Chen, Ji, Ma and Lai, JMLR 26, 2025 (perturbed AID).

    Differs from the paper: the displacement takes the place of the gradient step of its iteration, which in the paper
    follows it.
    """

    def __init__(
        self,
        problem: Problem,
        lr: float,
        *,
        radius: float,
        grad_tol: float,
        lower_solver: LowerSolver | None,
        linear_solver: LinearSolver | None = None,
        escape_steps: int = 50,
        value_test: bool = False,
        value_tol: float | None = None,
        stop: bool = False,
        verify: Verify | None = None,
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
        rule = perturbed_descent(
            problem,
            lr,
            radius=radius,
            grad_tol=grad_tol,
            escape_steps=escape_steps,
            value_test=value_test,
            value_tol=value_tol,
            stop=stop,
            seed=seed,
        )
        super().__init__(problem, estimator, rule, verify=_with_tolerance(verify, grad_tol))


class PerturbedGDmax(Method):
    """GDmax that leaves saddles by random displacements.

    y as in ``GDmax``; x_{t+1} = x_t + xi, xi uniform in the ball of radius r, if |v| <= 4/5 epsilon and the last
    displacement is more than t_thres steps ago; else x_{t+1} = x_t - lr v. A limit that is a strict minimum of Phi is a
    strict local minimax point.

    Args:
        problem: a ``MinimaxProblem``.
        lr: eta, positive; in theory 1 / L_Phi.
        radius: r, length of the displacement in units of x.
        grad_tol: epsilon, the accuracy asked for; the gradient should be exact to epsilon / 5.
        lower_solver: moves y; in theory ``GD(lr=1 / L, steps=K)``, K of the order of kappa log(1 / epsilon).
        escape_steps: t_thres, steps that follow a displacement before the next may come; default 50.
        value_test: test at the end of every window whether f(x, y) has dropped by ``value_tol``; see ``PerturbedAID``.
        value_tol: f_thres, positive; required with ``value_test``.
        stop: end the run at the first test passed, at the point before the displacement.
        verify: certify a point that passed its test, and leave it if it is a saddle; see ``Verify``.
        warm_start: whether y goes on from the last call.
        seed: of the displacements, and of the random numbers inside the loss.

    Raises:
        ValueError: if an argument is out of range, or ``value_test`` lacks the tolerance it needs.

    Cost: that of ``GDmax``; no Hessian-vector product. Copies as in ``PerturbedAID``.

    Reference: Huang, Chen, Ji, Ma and Lai, JMLR 26, 2025 (perturbed GDmax).

    Differs from the paper: the displacement takes the place of the gradient step of its iteration, which in the paper
    follows it.
    """

    def __init__(
        self,
        problem: Problem,
        lr: float,
        *,
        radius: float,
        grad_tol: float,
        lower_solver: LowerSolver | None,
        escape_steps: int = 50,
        value_test: bool = False,
        value_tol: float | None = None,
        stop: bool = False,
        verify: Verify | None = None,
        warm_start: bool = True,
        seed: int = 0,
    ) -> None:
        rule = perturbed_descent(
            problem,
            lr,
            radius=radius,
            grad_tol=grad_tol,
            escape_steps=escape_steps,
            value_test=value_test,
            value_tol=value_tol,
            stop=stop,
            seed=seed,
        )
        estimator = Danskin(lower_solver, warm_start=warm_start, seed=seed)
        super().__init__(problem, estimator, rule, verify=_with_tolerance(verify, grad_tol))


def _with_tolerance(verify: Verify | None, grad_tol: float) -> Verify | None:
    """The rule tests 4/5 epsilon; the certificate is about epsilon."""
    if not isinstance(verify, Verify) or verify.grad_tol is not None:
        return verify
    return replace(verify, grad_tol=grad_tol)
