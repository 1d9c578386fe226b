"""The Hessian of Phi as an exact, matrix-free operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchbilevel.derivatives import Counts, Oracle
from torchbilevel.lagrangian import Lagrangian
from torchbilevel.linear_solve import CG, SolveResult
from torchbilevel.problem import Problem
from torchbilevel.response import best_response
from torchbilevel.samples import Samples
from torchbilevel.tensors import Tensors, add, flatten, norm, numel, scale, sub, unflatten


class HessianOperator:
    """The Hessian of Phi(x) = f(x, y*(x)) at one x, as a symmetric linear operator.

    Bilevel: with L(x, y, z) = f - <z, g_y>, s = (y, z), y = y*(x) and g_yy z = f_y,

        hess Phi u = L_xx u + L_xy dy - g_xy dz,   g_yy dy = -g_yx u,   g_yy dz = L_yx u + L_yy dy.

    Minimax: hess Phi u = f_xx u + f_xy dy with g_yy dy = -g_yx u, g = -f, on the active face where y is constrained.

    Args:
        problem: the problem; its modules are left as they are, at the current x.
        samples: where both losses are evaluated.
        x: where; the current upper parameters by default.
        tol: accuracy of y: |g_y| <= tol (|y - P(y - g_y)| with a projection); default 1e-10 in float64, 1e-5 in float32.
        solver_tol: relative accuracy of the linear solves; default 1e-12 in float64, 1e-6 in float32.
        max_iter: products per linear solve at most; default the number of lower variables, at least 100.
        oracle: counts the calls; a new one by default.
        strict: raise where the active face is not well defined; otherwise only say so in ``ambiguous``.

    Attributes:
        x: upper variables.
        response: y*(x) as it was found, with its residual.
        z: the adjoint (bilevel), or ``None``.
        gradient: grad Phi(x).
        gradient_error: first-order estimate of how far the residuals of y and z put the gradient off.
        adjoint_residual: |f_y - g_yy z| (bilevel), 0 for minimax.
        counts: oracle calls so far.
        ambiguous: number of bounds on y that are active with a multiplier of zero.
        worst_solve: the solve with the largest relative residual so far.

    Raises:
        ValueError: if the active face is not well defined: bounds that are active with a multiplier of zero, where Phi has no
            second derivative. The message says how many.

    Cost: construction takes a few Newton steps for y, one linear solve for z, and a gradient of L with its graph; then per
    product two linear solves with g_yy (minimax: one) and three (minimax: two) reverse sweeps.

    Reference: the implicit function theorem on the stationarity conditions of y and z.
    """

    def __init__(
        self,
        problem: Problem,
        samples: Samples,
        *,
        x: Tensors | None = None,
        tol: float | None = None,
        solver_tol: float | None = None,
        max_iter: int | None = None,
        oracle: Oracle | None = None,
        strict: bool = True,
    ) -> None:
        if problem.constrains_x:
            raise ValueError(
                "the problem has an upper_projection, and curvature is computed for a free x; where no bound on x is active, "
                "state the problem without upper_projection"
            )
        self.x = problem.x if x is None else x
        self._problem, self._samples = problem, samples
        self.oracle = Oracle(problem) if oracle is None else oracle
        y = problem.y
        eps = max(torch.finfo(t.dtype).eps for t in (*self.x, *y))
        self.tol = _default(tol, eps**0.64, "tol")
        self._solver = CG(max_iter or max(numel(y), 100), _default(solver_tol, eps**0.77, "solver_tol"))
        self.worst_solve: SolveResult | None = None
        self.response = best_response(problem, self.oracle, self.x, y, samples.lower, self.tol, self._solver)
        self.ambiguous = self.response.face.ambiguous()
        if self.ambiguous and strict:
            raise ValueError(
                f"{self.ambiguous} bounds on y are active with a multiplier of zero (strict complementarity fails), so Phi has no "
                f"second derivative here; move x a little"
            )
        y = self.response.y
        self.z: Tensors | None = None
        self._lagrangian: Lagrangian | None = None
        g_y = self.response.linearization.gradient
        if problem.minimax:
            self.value, self.gradient, _, _ = self.oracle.upper_gradient(self.x, y, samples.upper)
            self.adjoint_residual = 0.0
            correction = self._against(g_y)
        else:
            self.value, _, f_y, _ = self.oracle.upper_gradient(self.x, y, samples.upper)
            self.z = self._solve(f_y)
            self._lagrangian = Lagrangian(self.oracle, self.x, y, self.z, samples)
            self.gradient, adjoint = self._lagrangian.gradient, self._lagrangian.residual
            self.adjoint_residual = float(norm(adjoint))
            correction = self._against(g_y, adjoint)
        self.gradient_error = float(norm(correction))

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n), n the number of upper variables."""
        return (numel(self.x), numel(self.x))

    @property
    def counts(self) -> Counts:
        """Oracle calls so far."""
        return self.oracle.counts

    def product(self, u: Tensors) -> Tensors:
        """hess Phi u for a tuple of the shapes of x."""
        graph = self.response.linearization
        dy = scale(-1.0, self._solve(graph.cross_product(u)))
        if self._lagrangian is None:  # minimax: the second derivatives of f are those of -g
            return scale(-1.0, graph.second_derivative(u, dy)[0])
        in_x, in_y = self._lagrangian.product(u, dy)
        return sub(in_x, graph.jacobian_product(self._solve(in_y), keep=True))

    def matvec(self, u: Tensor) -> Tensor:
        """hess Phi u for a flat vector of shape (n,), or for the k columns of a matrix of shape (n, k).

        Args:
            u: entries in the order of the upper parameters.

        Returns:
            A tensor of the shape of u.
        """
        if u.shape[:1] != (self.shape[0],) or u.dim() > 2:
            raise ValueError(f"u must have shape ({self.shape[0]},) or ({self.shape[0]}, k), got {tuple(u.shape)}")
        if u.dim() == 2:
            return torch.stack([self.matvec(column) for column in u.T], dim=1)
        return flatten(self.product(unflatten(u, self.x)))

    def dense(self, max_size: int = 2000) -> Tensor:
        """The symmetrised n x n matrix, for small problems. Cost: n products.

        Args:
            max_size: largest n accepted.

        Returns:
            A tensor of shape (n, n).
        """
        n = self.shape[0]
        if n > max_size:
            raise ValueError(
                f"dense() takes {n} products, more than max_size={max_size}; use matvec, or raise max_size"
            )
        like = flatten(self.x)
        matrix = self.matvec(torch.eye(n, dtype=like.dtype, device=like.device))
        return 0.5 * (matrix + matrix.T)

    def scipy(self) -> Any:
        """The operator as a ``scipy.sparse.linalg.LinearOperator`` on numpy arrays (needs SciPy)."""
        from scipy.sparse.linalg import LinearOperator

        like = flatten(self.x)

        def matvec(v: Any) -> Any:
            return self.matvec(torch.as_tensor(v).reshape(-1).to(like)).cpu().numpy()

        dtype = torch.empty(0, dtype=like.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=matvec, rmatvec=matvec, dtype=dtype)

    def upper_block(self, u: Tensors) -> Tensors:
        """f_xx u at fixed y (minimax), for the test of a local Nash equilibrium."""
        zero = tuple(torch.zeros_like(t) for t in self.response.y)
        return scale(-1.0, self.response.linearization.second_derivative(u, zero)[0])

    def _solve(self, b: Tensors) -> Tensors:
        result = self.response.solve(b, self._solver)
        worst = self.worst_solve
        if worst is None or bool(result.residual * worst.scale > worst.residual * result.scale):
            self.worst_solve = result
        return result.z

    def _against(self, g_y: Tensors, adjoint: Tensors | None = None) -> Tensors:
        """What one more Newton step on (y, z) would change in the gradient: -L_xs L_ss^-1 (L_y, L_z)."""
        graph = self.response.linearization
        zero = tuple(torch.zeros_like(t) for t in self.x)
        dy = scale(-1.0, self._solve(g_y))
        if self._lagrangian is None or adjoint is None:
            return scale(-1.0, graph.second_derivative(zero, dy)[0])
        in_x, in_y = self._lagrangian.product(zero, dy)
        return sub(in_x, graph.jacobian_product(self._solve(add(adjoint, in_y)), keep=True))


def hessian_operator(
    problem: Problem, batch: Any = None, *, lower: Any = None, upper: Any = None, **options: Any
) -> HessianOperator:
    """The Hessian of Phi at the current x on the data given.

    Args:
        problem: a ``BilevelProblem`` or ``MinimaxProblem``; its modules are left as they are.
        batch: minimax: a batch or ``Batches``.
        lower: bilevel: a batch or ``Batches`` for the lower loss.
        upper: bilevel: a batch or ``Batches`` for the upper loss.
        options: ``tol``, ``solver_tol``, ``max_iter`` of ``HessianOperator``.

    Returns:
        The operator: ``matvec``, ``dense()``, ``scipy()``.
    """
    return HessianOperator(problem, problem.sample(batch, lower, upper, seed=0), **options)


def _default(value: float | None, default: float, name: str) -> float:
    if value is not None and not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return default if value is None else value
