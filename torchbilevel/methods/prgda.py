"""PRGDA: a recursive estimate of the hypergradient, and escape phases that are pulled back."""

from __future__ import annotations

from typing import Any, Literal

from torchbilevel.draws import BatchSizes
from torchbilevel.estimators import Danskin, Estimator, Implicit, Spider
from torchbilevel.linear_solve import LinearSolver
from torchbilevel.lower import LowerSolver
from torchbilevel.method import Method
from torchbilevel.methods.rules import within_curvature
from torchbilevel.optim import Pullback
from torchbilevel.optim.pullback import escape_time
from torchbilevel.optim.search import positive
from torchbilevel.pairing import require_problem
from torchbilevel.problem import Problem
from torchbilevel.tensors import numel
from torchbilevel.verify import Verify


class PRGDA(Method):
    """Perturbed recursive gradient descent ascent, for minimax and for bilevel problems.

    With e = (f_x, f_y) at (x, y), u an estimate of g_y and p_k = (x_t, y_k), one ``backward`` is

        every q steps:  v, u <- e, g_y at (x_t, y_0) on large samples, y_0 where the last one ended
        K times:        v <- v + e(p_k; S) - e(p_{k-1}; S),  u likewise,  y_{k+1} = y_k - lambda u_k,

    p_{-1} being the point that v and u were carried from; at a large sample the first correction is zero and left out.
    It ends with the y, v and u of the k after which y moved least. For a minimax problem (g = -f, y_{k+1} projected)
    v_t = f_x as estimated; for a bilevel problem v_t = f_x - g_xy(.; S_5) z, z = alpha sum_{i=0}^{Q} (I - alpha
    g_yy(.; B_{Q+1-i})) ... (I - alpha g_yy(.; B_Q)) f_y, at (x_t, y) on fresh samples, f_x and f_y as estimated.

    x moves as in ``optim.Pullback``: by a step of length lr along -v_t where |v_t| >= epsilon; else by a displacement,
    then by -eta_H v_t, until these steps exceed D in their mean square (the pull-back: x was at a saddle) or t_thres of
    them have passed ("escape test passed").

    Args:
        problem: a ``MinimaxProblem`` (Algorithms 1 and 2) or ``BilevelProblem`` (Algorithms 1 and 3); ``backward``
            takes sources, see ``sample`` and ``stream``.
        lr: eta, the *length* of a descent step, positive; in theory epsilon / L_Phi over a logarithm.
        escape_lr: eta_H, an ordinary learning rate, positive; in theory 1 / L_Phi over a logarithm.
        radius: r, length of the displacement in units of x; in theory at most epsilon / L_Phi.
        grad_tol: epsilon; v_t should be exact to a fraction of it.
        curvature_tol: epsilon_H, positive: sets ``escape_steps``, and the tolerance of ``verify`` where it has none.
        escape_steps: t_thres; needed without ``curvature_tol``. By default the steps after which a quadratic of
            curvature -epsilon_H is pulled back from 99 of 100 displacements, log(1 / r) / (eta_H epsilon_H) or so.
        mean_movement: D. By default the square of the larger of ``lr`` and eta_H epsilon: in theory they are equal and
            D their square, all up to logarithms; a phase whose |v| stays within epsilon then passes the test.
        period: q >= 1, steps from one large sample to the next.
        lower_solver: moves y: ``GD(lr=lambda, steps=K)``, K >= 2; in theory lambda = 1 / L, K of the order of kappa.
        linear_solver: bilevel, and required there: ``Neumann(steps=Q, lr=alpha)``, alpha at most 1 / L.
        batch_size: S_2, of f; ``None``, here and below, takes what the source gives by itself.
        lower_batch_size: bilevel: S_4, of g_y.
        jvp_batch_size: bilevel: S_5, of the product with g_xy; by default as ``lower_batch_size``.
        hvp_batch_size: bilevel: B, of every product with g_yy; by default as ``lower_batch_size``.
        anchor_size: S_1, of the large samples of f.
        lower_anchor_size: bilevel: S_3, of those of g_y; by default as ``anchor_size``.
        selects: ``"argmin"`` as above, or ``"last"``: y, v and u are those of the last k.
        as_printed: keep the first correction at a large sample, see below.
        stop: end the run at the first test passed: x_m is copied into the parameters, further steps raise.
        verify: certify a point that passed its test, and leave it if it is a saddle; see ``Verify``.
        reuse_batch: let a plain batch stand for all samples of its loss.
        initial_solver: brings y close to y*(x_0) before the first step, ``PiSARAH`` in the paper.
        seed: of the displacements, and of the random numbers inside the losses.

    Raises:
        ValueError: if an argument is out of range, or belongs to bilevel problems and the problem is a minimax one.

    Cost: per step 2 K gradients of f, and of g for a bilevel problem, which adds Q Hessian-vector products and one
    Jacobian-vector product; every q steps, the first included, one gradient of each on large samples and 2 K - 2 on
    small ones. Keeps x, y, v and u, and x_m.

    Reference: Xian, Huang and Huang, Escaping Saddle Point Efficiently in Minimax and Bilevel Optimizations, 2025:
    Algorithm 1 with Algorithm 2 (minimax) or 3 (bilevel).

    Differs from the paper: where a large sample is taken at (x_t, y_0), the paper goes on to correct from (x_{t-1},
    y_0) to (x_t, y_0), which counts the last move of x twice and shifts v by as much until the next large sample;
    ``as_printed=True`` does so too. Equation (9) prints the lower end of its product as Q - Q for Q - q, which is not
    an approximation of g_yy^-1; the series above is meant. Algorithm 3 selects by the ascent mapping of equation (8),
    here it is the length of the move of y. The phases have no number, see ``optim.Pullback``; a test passed ends the
    run with ``stop`` only.
    """

    def __init__(
        self,
        problem: Problem,
        lr: float,
        *,
        escape_lr: float,
        radius: float,
        grad_tol: float,
        curvature_tol: float | None = None,
        escape_steps: int | None = None,
        mean_movement: float | None = None,
        period: int,
        lower_solver: LowerSolver,
        linear_solver: LinearSolver | None = None,
        batch_size: int | None = None,
        lower_batch_size: int | None = None,
        jvp_batch_size: int | None = None,
        hvp_batch_size: int | None = None,
        anchor_size: int | None = None,
        lower_anchor_size: int | None = None,
        selects: Literal["argmin", "last"] = "argmin",
        as_printed: bool = False,
        stop: bool = False,
        verify: Verify | None = None,
        reuse_batch: bool = False,
        initial_solver: LowerSolver | None = None,
        seed: int = 0,
    ) -> None:
        minimax = require_problem(problem).minimax
        bilevel_only = {
            "linear_solver": linear_solver,
            "lower_batch_size": lower_batch_size,
            "jvp_batch_size": jvp_batch_size,
            "hvp_batch_size": hvp_batch_size,
            "lower_anchor_size": lower_anchor_size,
        }
        for name, value in bilevel_only.items():
            if minimax and value is not None:
                raise ValueError(f"{name} is for bilevel problems, a MinimaxProblem has one loss: leave out {value}")
        if not minimax and linear_solver is None:
            raise ValueError("linear_solver must be given for a BilevelProblem, such as Neumann(steps=10, lr=1 / L)")
        if curvature_tol is not None:
            positive("curvature_tol", curvature_tol)
        if mean_movement is None:
            mean_movement = max(float(lr), float(escape_lr) * float(grad_tol)) ** 2
        if escape_steps is None:
            if curvature_tol is None:
                raise ValueError("give curvature_tol, the curvature to escape from, or escape_steps, got neither")
            escape_steps = escape_time(curvature_tol, escape_lr, radius, mean_movement, numel(problem.x))
        options: dict[str, Any] = {
            "recursion": Spider(period, selects=selects, anchors="as printed" if as_printed else "before"),
            "batch_sizes": BatchSizes(
                batch_size,
                lower_batch_size,
                jvp_batch_size,
                hvp_batch_size,
                anchor_size,
                lower_anchor_size,
                reuse_batch,
            ),
            "initial_solver": initial_solver,
            "seed": seed,
        }
        estimator: Estimator
        if minimax:
            estimator = Danskin(lower_solver, **options)
        else:
            estimator = Implicit(lower_solver, linear_solver, warm_start_adjoint=False, **options)
        rule = Pullback(
            problem.upper_parameters,
            lr,
            escape_lr,
            radius=radius,
            grad_tol=grad_tol,
            escape_steps=escape_steps,
            mean_movement=mean_movement,
            stop=stop,
            seed=seed,
        )
        super().__init__(problem, estimator, rule, verify=within_curvature(verify, curvature_tol))
