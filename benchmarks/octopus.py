"""The octopus of Du et al. (2017): d saddles in a row, as a plain loss, a bilevel and a minimax problem.

With S the quintic smoothstep from 0 to 1, a_j = |x_j| and w(a) = S((a - tau) / tau),

    O(x) = sum_j [(1 - W_{j-1}) L a_j^2 + W_{j-1} p(a_j)],     W_j = w(a_1) ... w(a_j),     W_0 = 1,

    p(a) = -gamma a^2                        for a <= tau
           g1(a), a quartic                  for tau <= a <= 2 tau
           L (a - 4 tau)^2 - nu              for 2 tau <= a.

O is C^2 and coercive on the whole space, equals the piecewise function of the paper on its tube, and has no
critical points but the paper's: saddles (4 tau, ..., 4 tau, 0, ..., 0), the minimum (4 tau, ..., 4 tau) and
their mirror images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchbilevel import BilevelProblem, MinimaxProblem

TAU = math.e


def drop(L: float, gamma: float, tau: float = TAU) -> float:
    """The constant nu: how much lower each critical point lies than the one before it."""
    return (13 * gamma + 37 * L) * tau**2 / 6


def octopus(x: Tensor, L: float, gamma: float = 1.0, tau: float = TAU) -> Tensor:
    """O(x) over the last dimension of ``x``; twice differentiable by autograd everywhere.

    The quadratic parts are written in x, since autograd takes the second derivative of |x|^2 at 0 to be 0.
    |x| enters only behind clamps that are flat around 0.

    >>> octopus(torch.zeros(3), L=1.0), round(octopus(minimum(3), L=1.0).item() / drop(1.0, 1.0), 6)
    (tensor(0.), -3.0)
    """
    a, square = x.abs(), x * x
    s = (a - tau).clamp(min=0.0)
    u = (s / tau).clamp(max=1.0)
    w = u**3 * (10 + u * (6 * u - 15))
    leading = torch.cumprod(w[..., :-1], -1)
    reached = torch.cat((torch.ones_like(w[..., :1]), leading), -1)
    bend = s**3 * ((10 * gamma - 14 * L) / (3 * tau) + (5 * L - 3 * gamma) / (2 * tau**2) * s)
    p = torch.where(a < 2 * tau, bend - gamma * square, L * (a - 4 * tau) ** 2 - drop(L, gamma, tau))
    return ((1 - reached) * (L * square) + reached * p).sum(-1)


def saddle(k: int, d: int, tau: float = TAU, dtype: torch.dtype = torch.float64) -> Tensor:
    """The critical point with k leading entries 4 tau, the others 0.

    Its value is -k nu, its Hessian diag(2L, ..., 2L, -2 gamma, 2L, ..., 2L) with -2 gamma after k entries.
    """
    if not 0 <= k <= d:
        raise ValueError(f"k must lie between 0 and d = {d}, got {k}")
    point = torch.zeros(d, dtype=dtype)
    point[:k] = 4 * tau
    return point


def minimum(d: int, tau: float = TAU, dtype: torch.dtype = torch.float64) -> Tensor:
    """The minimum of the nonnegative orthant: value -d nu, Hessian 2 L I."""
    return saddle(d, d, tau, dtype)


def left_behind(history: Iterable[Tensor] | Tensor, tau: float = TAU) -> list[int]:
    """Times at which |x_1|, |x_2|, ... first exceed 2 tau, up to the first coordinate that never does.

    ``history`` holds x_0, x_1, ... of shape (d,), so time t means after t steps (the specification's tables
    show t - 1). The length of the answer is the number of saddles left behind.
    """
    points = history if isinstance(history, Tensor) else torch.stack([x.detach() for x in history])
    beyond = points.abs() > 2 * tau
    passed = int(beyond.any(0).long().cumprod(0).sum())
    return beyond.long().argmax(0)[:passed].tolist()


def time_ratio(L: float, gamma: float = 1.0) -> float:
    """Limit of the ratio of successive escape times of gradient descent with step 1/(4L).

    While coordinate k waits, coordinate k+1 decays by the factor 1 - 2 L lr = 1/2 per step and then grows by
    1 + 2 gamma lr per step, so a wait of length t is followed by one of length t log 2 / log(1 + gamma/(2L)).

    >>> [round(time_ratio(L), 2) for L in (1.0, 1.5, 2.0, 3.0)]
    [2.71, 3.41, 4.11, 5.5]
    """
    return 1 + math.log(2) / math.log1p(gamma / (2 * L))


def random_start(d: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """x_0 uniform in [-1, 1]^d, inside the first region.

    With numpy's generator, seed 0 reproduces the specification's tables to the iteration.
    """
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, d)).to(dtype)


def curvature(d: int, kappa: float, rotated: bool = False, seed: int = 0) -> Tensor:
    """The lower Hessian H, spectrum log-spaced in [1/kappa, 1] and ascending, in float64.

    Aligned: its diagonal, of shape (d,), so that products keep zeros and signs. Rotated: R diag R', of shape
    (d, d), with R orthogonal and uniform (by the sign convention on the QR factorisation).
    """
    if not kappa >= 1:
        raise ValueError(f"kappa must be at least 1, got {kappa}")
    spectrum = torch.logspace(-math.log10(kappa), 0, d, dtype=torch.float64)
    if not rotated:
        return spectrum
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    q = q * r.diagonal().sign()
    return (q * spectrum) @ q.T


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """``matrix @ vector``, where a matrix of shape (d,) stands for a diagonal one."""
    return matrix * vector if matrix.ndim == 1 else matrix @ vector


class Upper(nn.Module):
    """x, with what the upper loss needs: the octopus and the way from y back to x."""

    inverse_coupling: Tensor

    def __init__(
        self, start: Tensor, L: float, gamma: float, tau: float, theta: float, inverse_coupling: Tensor
    ) -> None:
        super().__init__()
        self.x = nn.Parameter(start.clone())
        self.L, self.gamma, self.tau, self.theta = L, gamma, tau, theta
        self.register_buffer("inverse_coupling", inverse_coupling)

    def value(self, point: Tensor) -> Tensor:
        """O at any point, with this module's constants."""
        return octopus(point, self.L, self.gamma, self.tau)


class Lower(nn.Module):
    """y, with H and A of g = 1/2 (y - A x)' H (y - A x)."""

    H: Tensor
    coupling: Tensor

    def __init__(self, start: Tensor, H: Tensor, coupling: Tensor) -> None:
        super().__init__()
        self.y = nn.Parameter(start.clone())
        self.register_buffer("H", H)
        self.register_buffer("coupling", coupling)

    def misfit(self, x: Tensor) -> Tensor:
        """g(x, y), whose minimiser is y*(x) = A x."""
        r = self.y - apply(self.coupling, x)
        return 0.5 * torch.dot(r, apply(self.H, r))


def lower_loss(upper: Upper, lower: Lower, batch: Any = None) -> Tensor:
    """g(x, y) = 1/2 (y - A x)' H (y - A x)."""
    return lower.misfit(upper.x)


def upper_loss(upper: Upper, lower: Lower, batch: Any = None) -> Tensor:
    """f(x, y) = O((1 - theta) x + theta A^{-1} y)."""
    back = apply(upper.inverse_coupling, lower.y)
    return upper.value(back if upper.theta == 1 else torch.lerp(upper.x, back, upper.theta))


def saddle_loss(upper: Upper, lower: Lower, batch: Any = None) -> Tensor:
    """f(x, y) = O(x) - 1/2 (y - A x)' H (y - A x)."""
    return upper.value(upper.x) - lower.misfit(upper.x)


def modules(
    d: int,
    L: float,
    gamma: float = 1.0,
    kappa: float = 10.0,
    theta: float = 1.0,
    rotated: bool = False,
    start: Tensor | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    coupling: Tensor | None = None,
    tau: float = TAU,
) -> tuple[Upper, Lower]:
    """The two modules; x starts at ``start`` or at ``random_start(d, seed)``, y at 0.

    ``coupling`` is A, of shape (d, d) or (d,) for a diagonal; the identity by default, in both modes.
    """
    if not L >= gamma > 0:
        raise ValueError(f"L >= gamma > 0 is needed, got L = {L}, gamma = {gamma}")
    if not 0 <= theta <= 1:
        raise ValueError(f"theta must lie in [0, 1], got {theta}")
    A = torch.ones(d, dtype=torch.float64) if coupling is None else coupling.to(torch.float64)
    inverse = 1 / A if A.ndim == 1 else torch.linalg.inv(A)
    x = random_start(d, seed) if start is None else start
    H = curvature(d, kappa, rotated, seed)
    upper = Upper(x, L, gamma, tau, theta, inverse)
    # Evaluation mode: no loss changes a buffer, so the package need not look after them.
    return upper.to(dtype).eval(), Lower(torch.zeros_like(x), H, A).to(dtype).eval()


def bilevel(
    d: int,
    L: float,
    gamma: float = 1.0,
    kappa: float = 10.0,
    theta: float = 1.0,
    rotated: bool = False,
    start: Tensor | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    coupling: Tensor | None = None,
    tau: float = TAU,
) -> BilevelProblem:
    """The bilevel octopus: y*(x) = A x and Phi = O for every theta. The losses ignore their batch."""
    from torchbilevel import BilevelProblem

    upper, lower = modules(d, L, gamma, kappa, theta, rotated, start, seed, dtype, coupling, tau)
    return BilevelProblem(upper, lower, upper_loss=upper_loss, lower_loss=lower_loss)


def minimax(
    d: int,
    L: float,
    gamma: float = 1.0,
    kappa: float = 10.0,
    rotated: bool = False,
    start: Tensor | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    coupling: Tensor | None = None,
    tau: float = TAU,
) -> MinimaxProblem:
    """The minimax octopus: y*(x) = A x and Phi = O; condition number kappa in y. The loss ignores its batch.

    One loss, so no theta: x enters the octopus, y the misfit only.
    """
    from torchbilevel import MinimaxProblem

    upper, lower = modules(d, L, gamma, kappa, 1.0, rotated, start, seed, dtype, coupling, tau)
    return MinimaxProblem(upper, lower, loss=saddle_loss)
