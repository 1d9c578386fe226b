"""Hybrid variance-reduced methods for minimax problems."""

from __future__ import annotations

from torchbilevel.draws import BatchSizes
from torchbilevel.estimators import Danskin, Hybrid
from torchbilevel.estimators.hybrid_map import HybridMap
from torchbilevel.lower import LowerSolver
from torchbilevel.method import Method
from torchbilevel.methods.rules import averaged_descent
from torchbilevel.problem import NonconvexLinearProblem, Problem


class HybridVRSGD(Method):
    """Hybrid variance-reduced SGD for min over x of max over y in Y of E <A y, H(x; xi)> - psi(y).

    With S, S' independent samples, and others for J, H' the Jacobian of H, P the ``upper_projection``:

        h_t = (1 - a) (h_{t-1} + H(x_t; S) - H(x_{t-1}; S)) + a H(x_t; S'),
        J_t = (1 - b) (J_{t-1} + H'(x_t; S) - H'(x_{t-1}; S)) + b H'(x_t; S'),
        y_t = argmax over y in Y of <A y, h_t> - psi(y),   v_t = J_t' A y_t,
        x_{t+1} = x_t + theta (P(x_t - lr v_t) - x_t),

    where h_0 and J_0 are H and H' on samples of the anchor size.

    Args:
        problem: a ``NonconvexLinearProblem``; ``backward`` takes a source, see ``sample`` and ``stream``.
        lr: eta, positive.
        weight: a = 1 - beta in (0, 1], in theory of the order of T^(-2/3).
        jacobian_weight: b in (0, 1]; by default as ``weight``.
        averaging: theta in (0, 1].
        max_size: J may have at most ``max_size``^2 entries.
        batch_size: of S and S'; ``None``, here and below, takes what the source gives by itself.
        jvp_batch_size: likewise for J; ``None`` as ``batch_size``.
        anchor_size: of the first estimates; ``None`` as ``batch_size``.
        reuse_batch: let a plain batch stand for all samples.
        seed: of the random numbers inside the map.

    Raises:
        TypeError: if ``problem`` is no problem.
        ValueError: if an argument is out of range, or the problem is of another kind or too large.

    Cost: per step three values of H and three Jacobians, each Jacobian one reverse sweep per value that the map
    returns; a third of that in the first step. Keeps x, h and J.

    Reference: Tran-Dinh, Liu and Nguyen, NeurIPS 2020 (hybrid variance-reduced SGD, Algorithm 1).

    Differs from the paper: the term R(x) is the indicator of a set (``upper_projection``); a smooth R is an entry of
    the map with a fixed weight. Steps and weights are constant; ``lr`` may be scheduled.
    """

    def __init__(
        self,
        problem: NonconvexLinearProblem,
        lr: float,
        *,
        weight: float,
        jacobian_weight: float | None = None,
        averaging: float = 1.0,
        max_size: int = 2000,
        batch_size: int | None = None,
        jvp_batch_size: int | None = None,
        anchor_size: int | None = None,
        reuse_batch: bool = False,
        seed: int = 0,
    ) -> None:
        jvp = batch_size if jvp_batch_size is None else jvp_batch_size
        sizes = BatchSizes(batch_size, jvp=jvp, anchor=anchor_size, reuse_batch=reuse_batch)
        estimator = HybridMap(
            weight=weight, jacobian_weight=jacobian_weight, max_size=max_size, batch_sizes=sizes, seed=seed
        )
        super().__init__(problem, estimator, averaged_descent(problem, lr, averaging))


class HybridGDA(Method):
    """Descent-ascent on hybrid estimates of f_x and f_y: a heuristic, for which no paper gives a guarantee.

    With S, S' independent samples and p_t = (x_t, y_t):

        v_t = (1 - a) (v_{t-1} + f_x(p_t; S) - f_x(p_{t-1}; S)) + a f_x(p_t; S'),   u_t likewise of f_y,
        y_{t+1} = one lower step along u_t,   x_{t+1} = x_t + theta (P(x_t - lr v_t) - x_t).

    Args:
        problem: a ``MinimaxProblem``; ``backward`` takes a source, see ``sample`` and ``stream``.
        lr: eta, positive.
        weight: a in (0, 1]; with 1 this is descent-ascent on the sample S'.
        lower_weight: of the estimate of f_y; by default as ``weight``.
        averaging: theta in (0, 1].
        lower_solver: moves y: ``GD(lr=..., steps=1)``.
        batch_size: of S and S'; ``None``, here and below, takes what the source gives by itself.
        anchor_size: of the first estimates; ``None`` as ``batch_size``.
        reuse_batch: let a plain batch stand for all samples.
        seed: of the random numbers inside the loss.

    Raises:
        TypeError: if ``problem`` is no problem.
        ValueError: if an argument is out of range, or the lower solver takes more than one step or has a ``tol``.

    Cost: per step three gradients of f, one in the first. Keeps x, y, u and v.

    Reference: none; the estimate is that of Tran-Dinh, Liu and Nguyen, NeurIPS 2020, who use it for ``HybridVRSGD``.

    Differs from the paper: it is in none.
    """

    def __init__(
        self,
        problem: Problem,
        lr: float,
        *,
        weight: float,
        lower_weight: float | None = None,
        averaging: float = 1.0,
        lower_solver: LowerSolver,
        batch_size: int | None = None,
        anchor_size: int | None = None,
        reuse_batch: bool = False,
        seed: int = 0,
    ) -> None:
        sizes = BatchSizes(batch_size, anchor=anchor_size, reuse_batch=reuse_batch)
        estimator = Danskin(lower_solver, recursion=Hybrid(weight, lower_weight), batch_sizes=sizes, seed=seed)
        super().__init__(problem, estimator, averaged_descent(problem, lr, averaging))
