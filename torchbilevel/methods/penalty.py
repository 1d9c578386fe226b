"""Stochastic bilevel methods that use first derivatives alone."""

from __future__ import annotations

from torchbilevel.decay import Decay
from torchbilevel.draws import BatchSizes
from torchbilevel.estimators.penalty import Penalty
from torchbilevel.lower import GD
from torchbilevel.method import Method
from torchbilevel.methods.rules import gradient_descent
from torchbilevel.problem import Problem

NOISE_IN_BOTH = Decay(power=5 / 7, lower_power=4 / 7)


class F2SA(Method):
    """Fully first-order stochastic approximation: the penalty lambda (g - min g) in place of the linear solve.

    K times y <- y - gamma_t g_y(x_t, y; .) and p <- p - gamma_t (g_y(x_t, p; .) + f_y(x_t, p; .) / lambda_t), all
    samples fresh; then x_{t+1} = x_t - lr_t (f_x(x_t, p; .) + lambda_t (g_x(x_t, p; .) - g_x(x_t, y; .))).

    Args:
        problem: a ``BilevelProblem``; ``backward`` takes sources, see ``sample`` and ``stream``.
        lr: xi alpha_0, positive.
        multiplier: lambda_0, positive; in theory at least 2 L_f / mu_g. The hypergradient is off by O(1 / lambda).
        lower_solver: moves y and p: ``GD(lr=gamma_0, steps=K)``, K is T in the paper.
        batch_size: of f; ``None``, here and below, takes what the source gives by itself.
        lower_batch_size: of g.
        shared: whether y and p meet the same samples of g, so that lambda does not multiply their noise.
        reuse_batch: let a plain batch stand for all samples of its loss.
        decay: gamma_t = gamma_0 times the lower factor, lr_t = lr times the upper one, and lambda_t = lambda_0 times
            the ratio of both, which grows. By default (1 + t)^(-4/7), (1 + t)^(-5/7) and (1 + t)^(1/7), for noise in
            both losses; where f alone is noisy ``Decay(3 / 5, lower_power=2 / 5)``, without noise ``Decay(1 / 3,
            lower_power=0.0)``. |grad Phi|^2 then falls like t^(-2/7), t^(-2/5) or t^(-2/3), as does its part from the
            bias, lambda_t^(-2). ``None`` for constant steps and lambda.
        seed: of the random numbers inside the losses.

    Raises:
        TypeError: if ``shared`` is neither true nor false.
        ValueError: if an argument is out of range, or the lower solver has momentum.

    Cost: per step 2 K + 2 gradients of g, K + 1 of f and a value of f, each on a sample of its own; no products of
    second derivatives. Keeps p.

    Reference: Kwon, Kwon, Wright and Nowak, ICML 2023 (F2SA, Algorithm 1).

    Differs from the paper: y is z there, and p is y, whose step alpha_t (f_y + lambda_t g_y) has lambda_t = gamma_t /
    (2 alpha_t); here lambda_t = gamma_t / alpha_t. ``shared=True`` is not the paper's.
    """

    def __init__(
        self,
        problem: Problem,
        lr: float,
        *,
        multiplier: float,
        lower_solver: GD,
        batch_size: int | None = None,
        lower_batch_size: int | None = None,
        shared: bool = False,
        reuse_batch: bool = False,
        decay: Decay | None = NOISE_IN_BOTH,
        seed: int = 0,
    ) -> None:
        estimator = Penalty(
            lower_solver,
            multiplier=multiplier,
            shared=shared,
            batch_sizes=BatchSizes(batch_size, lower_batch_size, reuse_batch=reuse_batch),
            decay=decay,
            seed=seed,
        )
        super().__init__(problem, estimator, gradient_descent(problem, lr))
