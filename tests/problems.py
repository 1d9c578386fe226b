"""Problems whose y*, Phi, grad Phi and hess Phi are known in closed form, in float64.

Each factory returns a frozen dataclass. Its closed forms take and return flat vectors, in the order in which
the parameters are registered; x and y are split over several parameters, one of them 0-d. The constants live in
the modules as buffers and the losses are importable functions of the modules and a batch, so that problems copy,
pickle and move. No closed form uses the package, and only `LogisticRegression.hess_phi` uses autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchbilevel import BilevelProblem, MinimaxProblem

Shapes = Sequence[tuple[int, ...]]
Batch = tuple[Tensor, ...]


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All entries in one vector; the graph is kept."""
    return torch.cat([t.reshape(-1) for t in tensors])


def unflat(vector: Tensor, like: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The inverse of `flat`, with the shapes of `like`."""
    like = list(like)
    return tuple(part.reshape(t.shape) for part, t in zip(vector.split([t.numel() for t in like]), like, strict=True))


def assign(module: nn.Module, vector: Tensor) -> None:
    """Copy a flat vector into the parameters of a module."""
    parameters = list(module.parameters())
    with torch.no_grad():
        for p, value in zip(parameters, unflat(vector, parameters), strict=True):
            p.copy_(value)


class Split(nn.Module):
    """A flat vector kept as parameters `p0`, `p1`, ... of the given shapes, and constants kept as buffers."""

    def __init__(self, vector: Tensor, shapes: Shapes, **constants: Tensor) -> None:
        super().__init__()
        for i, value in enumerate(unflat(vector, [torch.empty(shape) for shape in shapes])):
            self.register_parameter(f"p{i}", nn.Parameter(value.clone()))
        for name, value in constants.items():
            self.register_buffer(name, value.clone())
        # Evaluation mode: no loss changes a buffer, so the package need not look after them.
        self.eval()

    def flat(self) -> Tensor:
        return flat(self.parameters())


def generator(seed: int) -> Callable[..., Tensor]:
    """Standard normal draws in float64 from a generator of their own."""
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)


def spd(normal: Callable[..., Tensor], d: int, low: float, high: float) -> Tensor:
    """A symmetric matrix with random eigenvectors and spectrum evenly spaced in [low, high]."""
    q, _ = torch.linalg.qr(normal(d, d))
    return (q * torch.linspace(low, high, d, dtype=torch.float64)) @ q.T


def symmetric(m: Tensor) -> Tensor:
    return (m + m.T) / 2


# --- y* solves a linear system --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Response:
    """y(x) that solves (H + diag(w exp(E x))) y = B x + c, with its first two derivatives."""

    H: Tensor
    B: Tensor
    c: Tensor
    E: Tensor
    w: Tensor

    def matrix(self, x: Tensor) -> Tensor:
        return self.H + torch.diag(self.w * (self.E @ x).exp())

    def value(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(self.matrix(x), self.B @ x + self.c)

    def jacobian(self, x: Tensor) -> Tensor:
        """dy/dx of shape (dy, dx): M y_j = B e_j - D_j y with M the matrix and D_j its derivative by x_j."""
        return torch.linalg.solve(self.matrix(x), self.B - self._first(x) * self.value(x)[:, None])

    def second(self, x: Tensor) -> Tensor:
        """d2y/dx2 of shape (dy, dx, dx): M y_jk = -D_j y_k - D_k y_j - D_jk y."""
        first, Y = self._first(x), self.jacobian(x)
        mixed = first[:, :, None] * Y[:, None, :]
        curved = first[:, :, None] * self.E[:, None, :] * self.value(x)[:, None, None]
        right = -(mixed + mixed.transpose(1, 2) + curved)
        return torch.linalg.solve(self.matrix(x), right.flatten(1)).reshape(right.shape)

    def _first(self, x: Tensor) -> Tensor:
        """The diagonals of D_j, as columns."""
        return (self.w * (self.E @ x).exp())[:, None] * self.E


def chain(f_x: Tensor, f_y: Tensor, Y: Tensor) -> Tensor:
    """grad Phi from the derivatives of f and of y*."""
    return f_x + Y.T @ f_y


def chain2(f_xx: Tensor, f_xy: Tensor, f_yy: Tensor, f_y: Tensor, Y: Tensor, Y2: Tensor) -> Tensor:
    """hess Phi = f_xx + f_xy Y + Y' f_yx + Y' f_yy Y + sum_i f_y,i hess y*_i."""
    mixed = f_xy @ Y
    return f_xx + mixed + mixed.T + Y.T @ f_yy @ Y + torch.einsum("i,ijk->jk", f_y, Y2)


@dataclass(frozen=True, eq=False)
class QuadraticBilevel:
    """g = 1/2 y'(H + diag(w exp(E x)))y - y'(B x + c),  f = 1/2 |y - t|^2 + 1/2 x'R x + x'C y.

    c and t are means over the rows of the batches, so that a mini-batch gives unbiased gradients; f and Phi
    carry the constant that the variance of t adds. R is indefinite. With w = 0 g is quadratic in (x, y).
    """

    response: Response
    R: Tensor
    C: Tensor
    x0: Tensor
    y0: Tensor
    lower_batch: Batch
    upper_batch: Batch
    x_shapes: Shapes = ((3,), ())
    y_shapes: Shapes = ((2, 2), (), (1,))

    @cached_property
    def problem(self) -> BilevelProblem:
        from torchbilevel import BilevelProblem

        return BilevelProblem(*self.modules(), upper_loss=self.upper_loss, lower_loss=self.lower_loss)

    def modules(self) -> tuple[Split, Split]:
        r = self.response
        return (
            Split(self.x0, self.x_shapes, R=self.R, C=self.C),
            Split(self.y0, self.y_shapes, H=r.H, B=r.B, E=r.E, w=r.w),
        )

    @staticmethod
    def lower_loss(upper: Split, lower: Split, batch: Batch) -> Tensor:
        x, y = upper.flat(), lower.flat()
        curvature = y @ (lower.H @ y) + y @ (lower.w * (lower.E @ x).exp() * y)
        return 0.5 * curvature - y @ (lower.B @ x + batch[0].mean(0))

    @staticmethod
    def upper_loss(upper: Split, lower: Split, batch: Batch) -> Tensor:
        x, y = upper.flat(), lower.flat()
        misfit = 0.5 * (y - batch[0]).square().sum(1).mean()
        return misfit + 0.5 * x @ (upper.R @ x) + x @ (upper.C @ y)

    def y_star(self, x: Tensor) -> Tensor:
        return self.response.value(x)

    def phi(self, x: Tensor) -> Tensor:
        y = self.y_star(x)
        misfit = 0.5 * (y - self.upper_batch[0]).square().sum(1).mean()
        return misfit + 0.5 * x @ self.R @ x + x @ self.C @ y

    def grad_phi(self, x: Tensor) -> Tensor:
        y = self.y_star(x)
        return chain(self.R @ x + self.C @ y, self._f_y(x, y), self.response.jacobian(x))

    def hess_phi(self, x: Tensor) -> Tensor:
        f_y = self._f_y(x, self.y_star(x))
        eye = torch.eye(len(f_y), dtype=x.dtype)
        return chain2(self.R, self.C, eye, f_y, self.response.jacobian(x), self.response.second(x))

    def _f_y(self, x: Tensor, y: Tensor) -> Tensor:
        return y - self.upper_batch[0].mean(0) + self.C.T @ x


def quadratic_bilevel(seed: int = 0, curved: bool = False, n: int = 8) -> QuadraticBilevel:
    """x in R^4, y in R^6, n rows of data in each loss; `curved` makes g_yy depend on x."""
    normal = generator(seed)
    dx, dy = 4, 6
    R = spd(normal, dx, -2.0, 1.0)
    c, t = normal(n, dy), normal(n, dy)
    w = torch.full((dy,), 0.3 if curved else 0.0, dtype=torch.float64)
    response = Response(spd(normal, dy, 0.2, 1.0), normal(dy, dx), c.mean(0), normal(dy, dx) / 2, w)
    return QuadraticBilevel(
        response, R, normal(dx, dy) / 2, normal(dx) / 2, normal(dy), lower_batch=(c,), upper_batch=(t,)
    )


@dataclass(frozen=True, eq=False)
class RidgeRegression:
    """g = 1/(2n) |A y - b|^2 + 1/2 sum_j exp(x_j) y_j^2,  f = 1/m |A_val y - b_val|^2.

    x holds one log penalty per feature, the batches are (A, b) and (A_val, b_val).
    """

    x0: Tensor
    y0: Tensor
    lower_batch: Batch
    upper_batch: Batch
    x_shapes: Shapes = ((2, 2), ())
    y_shapes: Shapes = ((4,), ())

    @cached_property
    def problem(self) -> BilevelProblem:
        from torchbilevel import BilevelProblem

        return BilevelProblem(*self.modules(), upper_loss=self.upper_loss, lower_loss=self.lower_loss)

    def modules(self) -> tuple[Split, Split]:
        return Split(self.x0, self.x_shapes), Split(self.y0, self.y_shapes)

    @staticmethod
    def lower_loss(upper: Split, lower: Split, batch: Batch) -> Tensor:
        y = lower.flat()
        return 0.5 * F.mse_loss(batch[0] @ y, batch[1]) + 0.5 * torch.dot(upper.flat().exp(), y * y)

    @staticmethod
    def upper_loss(upper: Split, lower: Split, batch: Batch) -> Tensor:
        return F.mse_loss(batch[0] @ lower.flat(), batch[1])

    @property
    def response(self) -> Response:
        A, b = self.lower_batch
        eye = torch.eye(A.shape[1], dtype=A.dtype)
        return Response(A.T @ A / len(b), torch.zeros_like(eye), A.T @ b / len(b), eye, torch.ones_like(eye[0]))

    def y_star(self, x: Tensor) -> Tensor:
        return self.response.value(x)

    def phi(self, x: Tensor) -> Tensor:
        A, b = self.upper_batch
        return (A @ self.y_star(x) - b).square().mean()

    def grad_phi(self, x: Tensor) -> Tensor:
        return chain(torch.zeros_like(x), self._f_y(x), self.response.jacobian(x))

    def hess_phi(self, x: Tensor) -> Tensor:
        A, b = self.upper_batch
        zero = x.new_zeros(len(x), len(x))
        Y, Y2 = self.response.jacobian(x), self.response.second(x)
        return chain2(zero, zero, 2 * A.T @ A / len(b), self._f_y(x), Y, Y2)

    def _f_y(self, x: Tensor) -> Tensor:
        A, b = self.upper_batch
        return 2 * A.T @ (A @ self.y_star(x) - b) / len(b)


def ridge_regression(seed: int = 0, n: int = 30, m: int = 20) -> RidgeRegression:
    """Five features, two of them without influence on the target; n training and m validation rows."""
    normal = generator(seed)
    truth = torch.tensor([1.0, -2.0, 0.5, 0.0, 0.0], dtype=torch.float64)
    scale = torch.tensor([1.5, 1.0, 0.7, 1.0, 0.5], dtype=torch.float64)

    def rows(k: int) -> Batch:
        A = normal(k, 5) * scale
        return A, A @ truth + 0.5 * normal(k)

    return RidgeRegression(0.5 * normal(5) - 1, normal(5), lower_batch=rows(n), upper_batch=rows(m))


# --- y* by Newton ---------------------------------------------------------------------------------


class Penalty(nn.Module):
    """Log penalties: one per feature, shared by the classes, and a 0-d one for the biases."""

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.features = nn.Parameter(vector[:-1].clone())
        self.bias = nn.Parameter(vector[-1].clone())

    def forward(self, linear: nn.Linear) -> Tensor:
        weights = (self.features.exp() * linear.weight.square()).sum()
        return 0.5 * (weights + self.bias.exp() * linear.bias.square().sum())


@dataclass(frozen=True, eq=False)
class LogisticRegression:
    """Multinomial: g = cross entropy + 1/2 sum_j exp(x_j) sum_k y_kj^2,  f = cross entropy.

    y is an `nn.Linear`: weight (classes, features), then bias (classes), penalised by the last entry of x.
    The algebra is dense, on the grid of shape (classes, features + 1) whose last column is the bias.
    """

    classes: int
    x0: Tensor
    y0: Tensor
    lower_batch: Batch
    upper_batch: Batch

    @cached_property
    def problem(self) -> BilevelProblem:
        from torchbilevel import BilevelProblem

        return BilevelProblem(*self.modules(), upper_loss=self.upper_loss, lower_loss=self.lower_loss)

    def modules(self) -> tuple[Penalty, nn.Linear]:
        linear = nn.Linear(len(self.x0) - 1, self.classes, dtype=torch.float64)
        assign(linear, self.y0)
        return Penalty(self.x0), linear

    @staticmethod
    def lower_loss(upper: Penalty, lower: nn.Linear, batch: Batch) -> Tensor:
        return F.cross_entropy(lower(batch[0]), batch[1]) + upper(lower)

    @staticmethod
    def upper_loss(upper: Penalty, lower: nn.Linear, batch: Batch) -> Tensor:
        return F.cross_entropy(lower(batch[0]), batch[1])

    def y_star(self, x: Tensor) -> Tensor:
        """Newton from 0, halving steps that do not decrease g, until the step is lost in round-off."""
        y = x.new_zeros(self.classes * len(x))
        for _ in range(100):
            gradient = self.g_y(x, y)
            step = torch.linalg.solve(self.g_yy(x, y), gradient)
            if step.norm() <= 1e-15 * (1 + y.norm()) or gradient.norm() <= 1e-16:
                break
            while step.norm() > 1e-6 and self._g(x, y - step) > self._g(x, y):
                step = step / 2
            y = y - step
        return y

    def phi(self, x: Tensor) -> Tensor:
        return self._entropy(self.y_star(x), self.upper_batch)

    def grad_phi(self, x: Tensor) -> Tensor:
        y = self.y_star(x)
        return -self._g_xy(x, y) @ self._adjoint(x, y)

    def hess_phi(self, x: Tensor) -> Tensor:
        """L_xx - L_xs L_ss^{-1} L_sx with L = f - <z, g_y> and s = (y, z); blocks by autograd."""
        y = self.y_star(x)
        z = self._adjoint(x, y)
        sizes = (len(x), len(y), len(z))

        def lagrangian(point: Tensor) -> Tensor:
            x, y, z = point.split(sizes)
            return self._entropy(y, self.upper_batch) - z @ self.g_y(x, y)

        hessian = torch.autograd.functional.hessian(lagrangian, torch.cat((x, y, z)))
        n = len(x)
        xs = hessian[:n, n:]
        return hessian[:n, :n] - xs @ torch.linalg.solve(hessian[n:, n:], xs.T)

    def g_y(self, x: Tensor, y: Tensor) -> Tensor:
        """Gradient of g by y, by hand."""
        return self._entropy_y(y, self.lower_batch) + self._strengths(x) * y

    def g_yy(self, x: Tensor, y: Tensor) -> Tensor:
        """Hessian of g by y, by hand."""
        inputs, P = self._probabilities(y, self.lower_batch)
        # d2 CE / dlogits2 = diag(p) - p p' for each row, then the chain rule through logits = grid @ inputs.
        curvature = torch.diag_embed(P) - P[:, :, None] * P[:, None, :]
        blocks = torch.einsum("nkl,ni,nj->kilj", curvature, inputs, inputs) / len(inputs)
        grid = self._to_grid(torch.arange(len(y)))
        order = grid.reshape(-1).argsort()
        dense = blocks.reshape(len(y), len(y))[order][:, order]
        return dense + torch.diag(self._strengths(x))

    def _adjoint(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.solve(self.g_yy(x, y), self._entropy_y(y, self.upper_batch))

    def _g(self, x: Tensor, y: Tensor) -> Tensor:
        return self._entropy(y, self.lower_batch) + 0.5 * torch.dot(self._strengths(x), y * y)

    def _g_xy(self, x: Tensor, y: Tensor) -> Tensor:
        """d g_y / dx_j = exp(x_j) y on the entries that x_j penalises, as row j."""
        owner = self._from_grid(torch.arange(len(x)).expand(self.classes, -1))
        return torch.where(owner == torch.arange(len(x))[:, None], self._strengths(x) * y, 0.0)

    def _strengths(self, x: Tensor) -> Tensor:
        return self._from_grid(x.exp().expand(self.classes, -1))

    def _to_grid(self, y: Tensor) -> Tensor:
        weight, bias = y.split([len(y) - self.classes, self.classes])
        return torch.cat((weight.reshape(self.classes, -1), bias[:, None]), 1)

    def _from_grid(self, grid: Tensor) -> Tensor:
        return torch.cat((grid[:, :-1].reshape(-1), grid[:, -1]))

    def _probabilities(self, y: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs = F.pad(batch[0], (0, 1), value=1.0)
        return inputs, (inputs @ self._to_grid(y).T).softmax(1)

    def _entropy(self, y: Tensor, batch: Batch) -> Tensor:
        logits = F.pad(batch[0], (0, 1), value=1.0) @ self._to_grid(y).T
        return (logits.logsumexp(1) - logits.gather(1, batch[1][:, None])[:, 0]).mean()

    def _entropy_y(self, y: Tensor, batch: Batch) -> Tensor:
        inputs, P = self._probabilities(y, batch)
        return self._from_grid((P - F.one_hot(batch[1], self.classes)).T @ inputs / len(inputs))


def logistic_regression(
    seed: int = 0, classes: int = 3, features: int = 4, n: int = 40, m: int = 30
) -> LogisticRegression:
    """Labels from a noisy linear rule; n training and m validation rows. Two classes are allowed."""
    normal = generator(seed)
    rule = normal(classes, features)

    def rows(k: int) -> Batch:
        inputs = normal(k, features)
        return inputs, (inputs @ rule.T + normal(k, classes)).argmax(1)

    x0 = 0.5 * normal(features + 1) - 2
    return LogisticRegression(classes, x0, normal(classes * (features + 1)), lower_batch=rows(n), upper_batch=rows(m))


# --- minimax --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class QuadraticMinimax:
    """f = 1/2 x'P x + x'C y - 1/2 y'Q y + b'y + 1/4 q sum_i (V'x)_i^4, b the mean of the rows of the batch.

    P + C Q^{-1} C' = V diag(spectrum) V' and C Q^{-1} b = 0, so in the coordinates u = V'x, up to a constant,

        Phi = sum_i 1/2 spectrum_i u_i^2 + 1/4 q u_i^4:

    a strict saddle at 0, two minima V u with u_0 = +-sqrt(-spectrum_0 / q), lower by spectrum_0^2 / (4 q).
    """

    spectrum: Tensor
    V: Tensor
    P: Tensor
    C: Tensor
    Q: Tensor
    q: Tensor
    x0: Tensor
    y0: Tensor
    batch: Batch
    x_shapes: Shapes = ((), (3,))
    y_shapes: Shapes = ((2, 2), (), (1,))

    @cached_property
    def problem(self) -> MinimaxProblem:
        from torchbilevel import MinimaxProblem

        return MinimaxProblem(*self.modules(), loss=self.loss)

    def modules(self) -> tuple[Split, Split]:
        return (
            Split(self.x0, self.x_shapes, P=self.P, C=self.C, V=self.V, q=self.q),
            Split(self.y0, self.y_shapes, Q=self.Q),
        )

    @staticmethod
    def loss(upper: Split, lower: Split, batch: Batch) -> Tensor:
        x, y = upper.flat(), lower.flat()
        own = 0.5 * x @ (upper.P @ x) + 0.25 * upper.q * (upper.V.T @ x).pow(4).sum()
        return own + y @ (upper.C.T @ x + batch[0].mean(0)) - 0.5 * y @ (lower.Q @ y)

    @property
    def minimum(self) -> Tensor:
        """One of the two minima; the other is its negative."""
        return self.V[:, 0] * (-self.spectrum[0] / self.q).sqrt()

    def y_star(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(self.Q, self.C.T @ x + self.batch[0].mean(0))

    def phi(self, x: Tensor) -> Tensor:
        u, b = self.V.T @ x, self.batch[0].mean(0)
        constant = 0.5 * b @ torch.linalg.solve(self.Q, b)
        return 0.5 * self.spectrum @ u.square() + 0.25 * self.q * u.pow(4).sum() + constant

    def grad_phi(self, x: Tensor) -> Tensor:
        u = self.V.T @ x
        return self.V @ (self.spectrum * u + self.q * u.pow(3))

    def hess_phi(self, x: Tensor) -> Tensor:
        u = self.V.T @ x
        return (self.V * (self.spectrum + 3 * self.q * u.square())) @ self.V.T


def quadratic_minimax(seed: int = 0, n: int = 8) -> QuadraticMinimax:
    """x in R^4, y in R^6, one negative direction of curvature -1 at 0; n rows of data."""
    normal = generator(seed)
    dx, dy = 4, 6
    spectrum = torch.tensor([-1.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    V, _ = torch.linalg.qr(normal(dx, dx))
    C, Q = normal(dx, dy) / 2, spd(normal, dy, 0.2, 1.0)
    P = symmetric((V * spectrum) @ V.T - C @ torch.linalg.solve(Q, C.T))
    # b = Q k with k orthogonal to the rows of C, whatever the noise of the single rows.
    k = normal(dy)
    b = Q @ (k - C.T @ torch.linalg.solve(C @ C.T, C @ k))
    rows = normal(n, dy)
    q = torch.tensor(0.5, dtype=torch.float64)
    batch = (b + rows - rows.mean(0),)
    return QuadraticMinimax(spectrum, V, P, C, Q, q, normal(dx) / 2, normal(dy), batch)


@dataclass(frozen=True, eq=False)
class ConstrainedMinimax:
    """f = 1/2 x'P x + sum_i y_i l_i(x) - 1/2 |y - c|^2 over the simplex or the box [-1, 1]^n.

    l_i = 1/2 x'P_i x + q_i'x + r_i, and y* is the projection of c + l(x). Where y* moves inside one face,
    hess Phi is that of f in x plus J' K J, with J = dl/dx and K the projection on the face's directions. The batch is
    ignored.
    """

    simplex: bool
    P: Tensor
    parts: Tensor
    slopes: Tensor
    offsets: Tensor
    c: Tensor
    x0: Tensor
    y0: Tensor
    x_shapes: Shapes = ((2,), ())
    batch: Batch = ()

    @cached_property
    def problem(self) -> MinimaxProblem:
        from torchbilevel import MinimaxProblem, projections

        projection = projections.simplex() if self.simplex else projections.linf_ball(1.0)
        return MinimaxProblem(*self.modules(), loss=self.loss, projection=projection)

    def modules(self) -> tuple[Split, Split]:
        # A simplex ties its coordinates together, so there y stays one parameter.
        shapes: Shapes = [(len(self.c),)] if self.simplex else [(), (len(self.c) - 1,)]
        upper = Split(self.x0, self.x_shapes, P=self.P, parts=self.parts, slopes=self.slopes, offsets=self.offsets)
        return upper, Split(self.y0, shapes, c=self.c)

    @staticmethod
    def loss(upper: Split, lower: Split, batch: Any = None) -> Tensor:
        x, y = upper.flat(), lower.flat()
        losses = 0.5 * torch.einsum("ijk,j,k->i", upper.parts, x, x) + upper.slopes @ x + upper.offsets
        return 0.5 * x @ (upper.P @ x) + y @ losses - 0.5 * (y - lower.c).square().sum()

    def losses(self, x: Tensor) -> Tensor:
        return 0.5 * ((self.parts @ x) @ x) + self.slopes @ x + self.offsets

    def y_star(self, x: Tensor) -> Tensor:
        point = self.c + self.losses(x)
        if not self.simplex:
            return point.clamp(-1.0, 1.0)
        # Of the candidate thresholds, one for each support size, the largest is the right one.
        ordered = point.sort(descending=True).values
        sizes = torch.arange(1, len(point) + 1, dtype=point.dtype)
        return (point - ((ordered.cumsum(0) - 1) / sizes).max()).clamp(min=0.0)

    def free(self, x: Tensor) -> Tensor:
        """Which coordinates of y* are off their bounds."""
        y = self.y_star(x)
        return y > 0 if self.simplex else y.abs() < 1

    def phi(self, x: Tensor) -> Tensor:
        y = self.y_star(x)
        return 0.5 * x @ self.P @ x + y @ self.losses(x) - 0.5 * (y - self.c).square().sum()

    def grad_phi(self, x: Tensor) -> Tensor:
        return self.P @ x + self._jacobian(x).T @ self.y_star(x)

    def hess_phi(self, x: Tensor) -> Tensor:
        face = self.free(x).to(x.dtype)
        K = torch.diag(face)
        if self.simplex:
            K = K - torch.outer(face, face) / face.sum()
        J = self._jacobian(x)
        return self.P + torch.einsum("i,ijk->jk", self.y_star(x), self.parts) + J.T @ K @ J

    def _jacobian(self, x: Tensor) -> Tensor:
        return self.parts @ x + self.slopes


def constrained_minimax(seed: int = 0, simplex: bool = True) -> ConstrainedMinimax:
    """x in R^3, y in R^5; around x0, and for |x| up to about 0.3, two coordinates of y* are at a bound."""
    normal = generator(seed)
    dx, dy = 3, 5
    P = spd(normal, dx, -1.5, 1.0)
    parts = torch.stack([spd(normal, dx, -0.5, 1.0) for _ in range(dy)])
    slopes, x0 = 0.3 * normal(dy, dx), 0.1 * normal(dx)
    if simplex:
        offsets, c = [0.2, 0.0, 0.1, -1.5, -2.0], torch.full((dy,), 1 / dy)
        y0 = torch.full((dy,), 1 / dy)
    else:
        offsets, c, y0 = [0.2, 2.5, -0.1, 0.3, -2.5], torch.zeros(dy), torch.zeros(dy)
    r = torch.tensor(offsets, dtype=torch.float64)
    return ConstrainedMinimax(simplex, P, parts, slopes, r, c.double(), x0, y0.double())


FACTORIES: dict[str, Callable[[], Any]] = {
    "quadratic": quadratic_bilevel,
    "curved quadratic": lambda: quadratic_bilevel(curved=True),
    "ridge": ridge_regression,
    "logistic": logistic_regression,
    "binary logistic": lambda: logistic_regression(classes=2),
    "minimax": quadratic_minimax,
    "simplex": constrained_minimax,
    "box": lambda: constrained_minimax(simplex=False),
}
