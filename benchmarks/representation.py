"""Hyper-representation learning in matrix sensing: the first columns of U above, the last one below (bilevel).

    min over x of mean_{i in D1} L_i(x, y*(x)) / 2,    y*(x) = argmin over y of mean_{i in D2} L_i(x, y) / 2,
    L_i(x, y) = (<A_i, x x' + y y'> - b_i)^2,          b_i = <A_i, M>,   M = U U',   U of shape (d, rank)

with x of shape (d, rank - 1) and y of shape (d,). A_i is Gaussian and enters through its symmetric part alone. At the
minimum x x' + y y' = M both losses vanish on every sample. g is even and quartic in y: -y* is as good as y*, y = 0 is
stationary on every sample, and so is a zero column of x; methods follow one of the two branches of y*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import torchbilevel as tb

Batch = tuple[Tensor, Tensor]


class Columns(nn.Module):
    """Columns of U: x of shape (d, rank - 1), or y of shape (d,)."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(start.clone())
        self.eval()


def loss(upper: Columns, lower: Columns, batch: Batch) -> Tensor:
    """The loss of a batch (A, b), A with flat rows; f and g differ in their data alone."""
    A, b = batch
    x, y = upper.value, lower.value
    seen = A @ (x @ x.T + torch.outer(y, y)).flatten()
    return 0.5 * (seen - b).square().mean()


@dataclass(frozen=True, eq=False)
class Representation:
    """The data of one seed.

    Attributes:
        upper: A of shape (|D1|, d^2), the symmetric parts, flat, and b of shape (|D1|,).
        lower: likewise for D2.
        M: of shape (d, d).
        x: a start with zero columns after the first, of shape (d, rank - 1).
        y: a direction, of shape (d,) and length 1.
        unit: the inverse of what the data multiply both losses by: 1, or 1/d for A_i that are not scaled.
    """

    upper: Batch
    lower: Batch
    M: Tensor
    x: Tensor
    y: Tensor
    unit: float

    def at(self, x: Tensor, y: Tensor) -> tb.BilevelProblem:
        """The problem at (x, y)."""
        return tb.BilevelProblem(Columns(x), Columns(y), upper_loss=loss, lower_loss=loss)

    def problem(self, seed: int, noise: float, length: float = 1e-2) -> tb.BilevelProblem:
        """A problem at its start.

        Args:
            seed: of the noise.
            noise: standard deviation of the entries of the columns of x after the first.
            length: of y.

        Returns:
            The problem.
        """
        g = torch.Generator().manual_seed(seed)
        off = torch.randn(self.x.shape, generator=g, dtype=torch.float64).to(self.x)
        off[:, 0] = 0
        return self.at(self.x + noise * off, length * self.y)

    def sources(self, seed: int) -> dict[str, Any]:
        """Uniform draws of rows, as the arguments of ``backward``."""
        return {"lower": tb.sample(self.lower, seed=2 * seed), "upper": tb.sample(self.upper, seed=2 * seed + 1)}

    def distance(self, x: Tensor, y: Tensor) -> float:
        """|x x' + y y' - M|_F^2 / |M|_F^2."""
        gap = x @ x.T + torch.outer(y, y) - self.M
        return (gap.square().sum() / self.M.square().sum()).item()


def representation(
    seed: int, d: int = 50, rank: int = 3, *, scaled: bool = True, swap: bool = False, device: str = "cpu"
) -> Representation:
    """The data of one seed.

    Args:
        seed: of all random numbers.
        d: number of rows of U.
        rank: of M.
        scaled: A_i with entries N(0, 1/d); standard Gaussian otherwise.
        swap: give the 70 % of the 20 d samples to the lower loss, where they are the upper loss's.
        device: of the tensors.

    Returns:
        The data. U has entries N(0, 1/d); the first column of x has the length of the largest eigenvalue of M.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    n = 20 * d
    U = normal(d, rank) / d**0.5
    M = U @ U.T
    A = normal(n, d, d)
    A = (0.5 * (A + A.transpose(1, 2))).flatten(1)
    if scaled:
        A /= d**0.5
    b = A @ M.flatten()
    x, u, y = torch.zeros(d, rank - 1, dtype=torch.float64), normal(d), normal(d)
    x[:, 0] = u / u.norm() * torch.linalg.eigvalsh(M)[-1]
    A, b, M, x, y = (t.to(device) for t in (A, b, M, x, y / y.norm()))
    cut = 7 * n // 10
    parts = (A[:cut], b[:cut]), (A[cut:], b[cut:])
    return Representation(parts[swap], parts[not swap], M, x, y, 1.0 if scaled else 1 / d)
