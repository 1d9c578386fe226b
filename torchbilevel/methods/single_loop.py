"""Stochastic bilevel methods of a single loop: y, z and x move at the same time."""

from __future__ import annotations

from torchbilevel.decay import Decay
from torchbilevel.draws import BatchSizes
from torchbilevel.estimators.saba import Saba
from torchbilevel.estimators.soba import Soba
from torchbilevel.lower import GD
from torchbilevel.method import Method
from torchbilevel.methods.rules import gradient_descent
from torchbilevel.methods.stochastic import SQUARE_ROOT
from torchbilevel.problem import Problem


class SOBA(Method):
    """Stochastic bilevel algorithm: simultaneous steps of y, of the adjoint z, and of x.

    At (x_t, y_t, z_t), from z_0 = 0, with one sample of g and one of f for all of it,

        y_{t+1} = y_t - rho s_t g_y,   z_{t+1} = z_t - rho s_t (g_yy z_t - f_y),   x_{t+1} = x_t - lr s_t (f_x - g_xy
        z_t).

    Args:
        problem: a ``BilevelProblem``; ``backward`` takes sources or batches.
        lr: gamma_0, positive; in theory a small multiple of rho.
        lower_solver: ``GD(lr=rho, steps=1)``; rho at most 2 / L_g, L_g that of g on single samples.
        batch_size: of f, 1 in the paper; ``None``, here and below, takes what the source gives by itself.
        lower_batch_size: of g.
        decay: gives s_t, by default (1 + t)^(-1/2) for all steps; ``None`` for constant steps.
        seed: of the random numbers inside the losses.

    Raises:
        ValueError: if the lower solver takes more than one step, or has momentum or a ``tol``.

    Cost: per step one gradient of g, one of f, one Hessian- and one Jacobian-vector product. Keeps z.

    Reference: Dagreou, Ablin, Vaiter and Moreau, NeurIPS 2022 (Algorithm 1, SOBA).

    Differs from the paper: nothing; z has the other sign there. Other step sizes that its analyses use, t^(-2/5) for y
    and z and t^(-3/5) for x, are ``Decay(power=3 / 5, lower_power=2 / 5)``. z is not projected on a ball, as some later
    analyses have it.
    """

    def __init__(
        self,
        problem: Problem,
        lr: float,
        *,
        lower_solver: GD,
        batch_size: int | None = None,
        lower_batch_size: int | None = None,
        decay: Decay | None = SQUARE_ROOT,
        seed: int = 0,
    ) -> None:
        # One sample of each loss is drawn per step, so that a plain batch passes for one draw.
        sizes = BatchSizes(batch_size, lower_batch_size, reuse_batch=True)
        super().__init__(
            problem, Soba(lower_solver, batch_sizes=sizes, decay=decay, seed=seed), gradient_descent(problem, lr)
        )


class SABA(Method):
    """Stochastic average bilevel algorithm: ``SOBA`` with SAGA's variance reduction, and constant steps.

    The data are cut into fixed blocks, and a table keeps what each last contributed. With S[e] = e_i - r_i + sum_j w_j
    r_j at (x_t, y_t, z_t) for every part e of the directions, i the block drawn, w_j the shares, then r_i = e_i,

        y_{t+1} = y_t - rho S[g_y],   z_{t+1} = z_t - rho (S[g_yy z] - S[f_y]),   x_{t+1} = x_t - lr (S[f_x] - S[g_xy
        z]).

    The first step fills the table in one pass over all data, and so is exact. The losses are to be means over the rows,
    besides terms without data.

    Args:
        problem: a ``BilevelProblem``; ``backward`` takes ``sample(tensors, seed)`` for both losses, the same data in
            every step. Data in a meaningful order should be shuffled once, since blocks are consecutive rows.
        lr: gamma, positive; in theory a small multiple of rho, and at most 1 / (8 L_Phi).
        lower_solver: ``GD(lr=rho, steps=1)``; rho of the order of 1 / L_g, in theory times N^(-2/3) for N = n + m
            blocks of g and of f.
        batch_size: rows per block of f, 1 in the paper; ``None``, here and below, makes one block of all rows.
        lower_batch_size: rows per block of g.
        shuffle: take the blocks in passes, each in a random order of its own, rather than independently. The table
            fills in the first of them, so that the first step costs no more than the others.
        seed: of the random numbers inside the losses.

    Raises:
        TypeError: if ``shuffle`` is neither true nor false.
        ValueError: if the lower solver takes more than one step, or has momentum or a ``tol``.

    Cost: per step as ``SOBA``, on one block of each loss; the first step on all blocks, unless ``shuffle``. Keeps z and
    the table: n (2 d_y + d_x) + m (d_y + d_x) numbers for n blocks of g and m of f.

    Reference: Dagreou, Ablin, Vaiter and Moreau, NeurIPS 2022 (SABA); Defazio, Bach and Lacoste-Julien, NeurIPS 2014.

    Differs from the paper: nothing; z has the other sign there. The table starts at (x_0, y_0, z_0), which the paper
    leaves open. A last block that is shorter is drawn with a smaller probability. ``shuffle`` is ours (see ``Saba``).
    """

    def __init__(
        self,
        problem: Problem,
        lr: float,
        *,
        lower_solver: GD,
        batch_size: int | None = None,
        lower_batch_size: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        sizes = BatchSizes(batch_size, lower_batch_size)
        estimator = Saba(lower_solver, batch_sizes=sizes, shuffle=shuffle, seed=seed)
        super().__init__(problem, estimator, gradient_descent(problem, lr))
