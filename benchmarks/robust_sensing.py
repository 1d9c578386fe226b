"""Robust low-rank matrix sensing, a minimax problem whose Phi, with its gradient and Hessian, has a closed form.

    f(U, y) = <y, L(U)> / 2 - c |y - 1/n|^2 / 2,   L_i(U) = (<A_i, U U'> - b_i)^2,   b_i = <A_i, M> (+ noise),

y in the simplex; a sample i is F(U, y; i) = n y_i L_i(U) / 2 - c |y - 1/n|^2 / 2. The formula of the paper, sum_i y_i
L_i / 2 - (y_i - 1/n)^2, can be read in two ways: "A", the factor 1/2 before all of it, c = 1; "B", before y_i L_i
alone, c = 2. With t = 1/n + L / (2 c), y*(U) = P(t) = max(t - theta, 0) is its projection on the simplex.

Each L_i has a gradient 4 (<A_i, U U'> - b_i) A_i U: where columns of U are zero, those of every gradient are, and the
columns stay so, on every sample.

Reference: Xian, Huang and Huang, Escaping Saddle Point Efficiently in Minimax and Bilevel Optimizations, 2025, 7.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import torchbilevel as tb

CONCAVITY = {"A": 1.0, "B": 2.0}  # c
SCALES = ("scaled", "printed")  # standard deviation of the entries of A_i: d^-1/2 or 1


class Factor(nn.Module):
    """U, of shape (d, columns), and which entries of U U', flattened, the samples are multiplied with."""

    entries: Tensor

    def __init__(self, start: Tensor, entries: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(start.clone())
        self.register_buffer("entries", entries)
        self.eval()


class Weights(nn.Module):
    """y, of shape (n,), and c."""

    def __init__(self, start: Tensor, concavity: float) -> None:
        super().__init__()
        self.value = nn.Parameter(start.clone())
        self.concavity = concavity
        self.eval()


def loss(upper: Factor, lower: Weights, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The loss f on (A, b, i), of shapes (s, e), (s,), (s,): the mean of F over these samples."""
    A, b, index = batch
    U, y = upper.value, lower.value
    n = y.numel()
    # Few operations, since batches are small: each has its price in autograd.
    residuals = torch.addmv(b, A, (U @ U.T).view(-1).index_select(0, upper.entries), beta=-1)
    weighted = y.index_select(0, index).dot(residuals * residuals)
    off = y - 1 / n
    return weighted * (0.5 * n / b.numel()) - off.dot(off) * (0.5 * lower.concavity)


@dataclass(frozen=True, eq=False)
class Response:
    """What y*(U) is made of.

    Attributes:
        residuals: <A_i, U U'> - b_i, of shape (n,).
        y: y*(U), of shape (n,).
        margins: t_i - theta, of shape (n,); positive where y_i is, and a bound whose margin is zero is active with a
            multiplier of zero.
    """

    residuals: Tensor
    y: Tensor
    margins: Tensor


@dataclass(frozen=True, eq=False)
class RobustSensing:
    """The data of one seed.

    Attributes:
        A: entries of A_i + A_i' such that products with those of a symmetric matrix S are <A_i, S>, of shape (n, e).
        entries: which ones of a flattened matrix, of shape (e,).
        b: of shape (n,).
        M: of shape (d, d).
        start: U_0, of shape (d, columns).
        concavity: c.
    """

    A: Tensor
    b: Tensor
    M: Tensor
    start: Tensor
    entries: Tensor
    concavity: float

    @property
    def rows(self) -> int:
        """The number of samples, n."""
        return self.b.numel()

    def problem(self) -> tb.MinimaxProblem:
        """A new problem at U_0 and y*(U_0)."""
        modules = Factor(self.start, self.entries), Weights(self.respond(self.start).y, self.concavity)
        return tb.MinimaxProblem(*modules, loss=loss, projection=tb.projections.simplex())

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """All samples."""
        return self.A, self.b, torch.arange(self.rows, device=self.b.device)

    def source(self, seed: int) -> tb.sample:
        """Uniform draws of samples."""
        return tb.sample(self.batch(), seed=seed)

    def respond(self, U: Tensor) -> Response:
        """The best response, exactly."""
        residuals = self.A @ (U @ U.T).flatten()[self.entries] - self.b
        target = 1 / self.rows + residuals.square() / (2 * self.concavity)
        y = tb.projections.simplex()(target)
        support = y > 0
        return Response(residuals, y, target - (target - y)[support].mean())

    def phi(self, U: Tensor) -> float:
        """Phi, exactly."""
        at = self.respond(U)
        return float(
            0.5 * (at.y @ at.residuals.square()) - 0.5 * self.concavity * (at.y - 1 / self.rows).square().sum()
        )

    def gradient(self, U: Tensor) -> Tensor:
        """The gradient of Phi."""
        at = self.respond(U)
        return self._mixed(2 * at.y * at.residuals) @ U

    def hessian(self, U: Tensor) -> Tensor:
        """The Hessian of Phi on the face of y*(U), of shape (d columns, d columns), for U flattened.

        With a_i = A_i U and r_i the residuals, f_UU = sum_i y_i (4 a_i a_i' + 2 r_i A_i x 1) and f_yU has rows 2 r_i
        a_i; the face adds f_Uy P f_yU / c, P the projection on sum zero over the support.
        """
        at = self.respond(U)
        d, columns = U.shape
        support = at.y > 0
        y, r = at.y[support], at.residuals[support]
        a = (self._symmetric(self.A[support]) @ U).flatten(1)
        along = 2 * r[:, None] * a
        along = along - along.mean(0)
        eye = torch.eye(columns, dtype=U.dtype, device=U.device)
        bent = torch.kron(self._mixed(2 * at.y * at.residuals), eye)
        return 4 * (a.T * y) @ a + bent + along.T @ along / self.concavity

    def smallest_eigenvalue(self, U: Tensor) -> float:
        """The smallest eigenvalue of the Hessian of Phi."""
        return float(torch.linalg.eigvalsh(self.hessian(U))[0])

    def degenerate(self, U: Tensor, tol: float = 1e-6) -> bool:
        """Whether a bound of y*(U) is active with a multiplier within tol / n of zero: then Phi is only C^1 there."""
        return bool(self.respond(U).margins.abs().min() <= tol / self.rows)

    def ratio(self, U: Tensor) -> float:
        """|U U' - M|_F^2 / |M|_F^2."""
        return float((U @ U.T - self.M).square().sum() / self.M.square().sum())

    def _mixed(self, weights: Tensor) -> Tensor:
        return self._symmetric(weights @ self.A)

    def _symmetric(self, rows: Tensor) -> Tensor:
        """The symmetric matrices whose products with others are those of the rows."""
        d = len(self.M)
        full = rows.new_zeros(*rows.shape[:-1], d * d)
        full[..., self.entries] = 0.5 * rows
        full = full.unflatten(-1, (d, d))
        return full + full.transpose(-1, -2)


def robust_sensing(
    seed: int,
    d: int = 50,
    *,
    columns: int = 3,
    scale: str = "scaled",
    spread: float = 0.0,
    noise: float = 0.0,
    reading: str = "A",
    whole: bool = False,
    device: str = "cpu",
) -> RobustSensing:
    """The data of one seed.

    Args:
        seed: of all random numbers. Data, u_0 and the direction of the other columns do not depend on the options, nor
            does the noise but for its size.
        d: number of rows of U.
        columns: number of columns of U, at most 11; the rank of M is 3.
        scale: "printed", A_i with entries N(0, 1), or "scaled", N(0, 1/d); then symmetrised.
        spread: standard deviation of the entries of U_0 after the first column u_0.
        noise: of b, in units of the standard deviation of the entries of A_i.
        reading: of the formula, "A" or "B".
        whole: keep all d^2 entries of each A_i; by default the upper triangle, which is half the arithmetic.
        device: where the tensors are.

    Returns:
        The data: n = 20 d, M = V V' with entries of V N(0, 1/d), |u_0| the largest eigenvalue of M.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    n, deviation = 20 * d, 1.0 if scale == "printed" else d**-0.5
    V = normal(d, 3) / d**0.5
    M = V @ V.T
    u, errors, others = normal(d), normal(n), normal(d, 10)
    i, j = torch.triu_indices(d, d)
    entries = torch.arange(d * d) if whole else i * d + j
    A = normal(n, d, d)
    A = deviation * (A + A.transpose(1, 2)).flatten(1)[:, entries]
    A *= 0.5 if whole else torch.where(i == j, 0.5, 1.0).to(A)
    b = A @ M.flatten()[entries] + noise * deviation * errors
    first = u / u.norm() * torch.linalg.eigvalsh(M)[-1]
    start = torch.cat((first[:, None], spread * others[:, : columns - 1]), 1)
    tensors = (t.to(device) for t in (A, b, M, start, entries))
    return RobustSensing(*tensors, concavity=CONCAVITY[reading])
