"""The Hessian of Phi as an exact, matrix-free operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchbilevel.counts import Counts
from torchbilevel.lagrangian import Lagrangian
from torchbilevel.linear_solve import CG, SolveResult
from torchbilevel.oracle import Oracle
from torchbilevel.problem import Problem
from torchbilevel.response import best_response
from torchbilevel.samples import Samples
from torchbilevel.shards import whole
from torchbilevel.tensors import Tensors, add, flatten, norm, numel, scale, sub, unflatten, zeros


class HessianOperator:
    """The Hessian of Phi(x) = f(x, y*(x)) at one x, as a symmetric linear operator.

    Bilevel: with L(x, y, z) = f - <z, g_y>, s = (y, z), y = y*(x) and g_yy z = f_y,

        hess Phi u = L_xx u + L_xy dy - g_xy dz,   g_yy dy = -g_yx u,   g_yy dz = L_yx u + L_yy dy.

    Minimax: hess Phi u = f_xx u + f_xy dy with g_yy dy = -g_yx u, g = -f, on the active face where y is constrained.

    Args:
        problem: the problem; its modules are left as they are.
        samples: where both losses are evaluated.
        x: where; the current upper parameters by default.
        y: where the search for y*(x) starts; the current lower parameters by default.
        tol: accuracy of y: |g_y| <= tol (|y - P(y - g_y)| with a projection); default 1e-10 in float64, 4e-5 in
            float32.
        solver_tol: relative accuracy of the linear solves; default 1e-12 in float64, 5e-6 in float32.
        max_iter: products per linear solve at most; default the number of lower variables, at least 100.
        oracle: counts the calls; a new one by default.
        strict: raise where the Hessian is not well defined; otherwise only say so in ``trouble``.

    Attributes:
        x: upper variables.
        response: y*(x) as it was found, with its residual.
        value: Phi(x).
        z: the adjoint (bilevel), or ``None``.
        gradient: grad Phi(x).
        gradient_error: first-order estimate of how far the residuals of y and z put the gradient off.
        adjoint_residual: |f_y - g_yy z| (bilevel), 0 for minimax.
        solve_error: the largest relative residual of a linear solve so far.
        trouble: why products are not to be trusted, in words; empty if they are.

    Raises:
        ValueError: if the active face is not well defined (bounds that are active with a multiplier of zero, where Phi
            has no second derivative; the message says how many), y*(x) is not found, or g_yy is not positive definite
            (which a later product may find out).

    Cost: construction takes a few Newton steps for y, two linear solves, and a gradient of L with its graph; then per
    product two linear solves with g_yy (minimax: one) and three (minimax: two) reverse sweeps.

    Reference: the implicit function theorem on the stationarity conditions of y and z.
    """

    def __init__(
        self,
        problem: Problem,
        samples: Samples,
        *,
        x: Tensors | None = None,
        y: Tensors | None = None,
        tol: float | None = None,
        solver_tol: float | None = None,
        max_iter: int | None = None,
        oracle: Oracle | None = None,
        strict: bool = True,
    ) -> None:
        if problem.constrains_x:
            raise ValueError(
                "the problem has an upper_projection, and curvature is computed for a free x; where no bound on x is "
                "active, state the problem without upper_projection"
            )
        self.x = whole(problem.x if x is None else x)
        y = whole(problem.y if y is None else y)
        self.oracle = Oracle(problem) if oracle is None else oracle
        eps = max(torch.finfo(t.dtype).eps for t in (*self.x, *y))
        self.tol = _default(tol, eps**0.64, "tol")
        self._solver = CG(max_iter or max(numel(y), 100), _default(solver_tol, eps**0.77, "solver_tol"))
        self._problem, self._samples, self._strict = problem, samples, strict
        self.trouble, self.solve_error = "", 0.0
        self.response = best_response(problem, self.oracle, self.x, y, samples.lower, self.tol, self._solver)
        ambiguous = self.response.face.ambiguous()
        if ambiguous:
            self._object(
                f"strict complementarity fails: bounds on y active with a multiplier of zero: {ambiguous}; Phi has no "
                f"second derivative here"
            )
        y = self.response.y
        self.z: Tensors | None = None
        self.adjoint_residual = 0.0
        self._lagrangian: Lagrangian | None = None
        if problem.minimax:
            self.value, self.gradient, _, _ = self.oracle.upper_gradient(self.x, y, samples.upper)
        else:
            self.value, _, f_y, _ = self.oracle.upper_gradient(self.x, y, samples.upper)
            self.z = self._solve(f_y)
            self._lagrangian = Lagrangian(self.oracle, self.x, y, self.z, samples)
            self.gradient = self._lagrangian.gradient
            self.adjoint_residual = float(norm(self._lagrangian.residual))
        # One more Newton step on s = (y, z) would change the gradient by -L_xs L_ss^-1 (L_y, L_z), to first order.
        step, result = self.response.newton_step(self._solver)
        self._note(result)
        reach = float(norm(step))
        if self.response.residual > self.tol and not reach <= eps**0.5 * (1 + float(norm(y))):
            self._object(
                f"y*(x) was not found: |g_y| = {self.response.residual:.1e} after {self.response.iterations} steps, "
                f"and the next would be {reach:.1e} long; bring y closer to it"
            )
        self.gradient_error = float(norm(self._respond(zeros(self.x), step, residual=True)))

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n), n the number of upper variables."""
        return (numel(self.x), numel(self.x))

    @property
    def counts(self) -> Counts:
        """Oracle calls so far."""
        return self.oracle.counts

    def at(self, x: Tensors) -> HessianOperator:
        """The operator at another x, on the same samples and counter; the search for y*(x) starts from this one's."""
        return HessianOperator(
            self._problem,
            self._samples,
            x=x,
            y=self.response.y,
            tol=self.tol,
            solver_tol=self._solver.tol,
            max_iter=self._solver.max_iter,
            oracle=self.oracle,
            strict=self._strict,
        )

    def product(self, u: Tensors) -> Tensors:
        """The product (hess Phi) u.

        Args:
            u: of the shapes of x.

        Returns:
            A tuple of the shapes of x. Cost: see the class.
        """
        return self._respond(u, scale(-1.0, self._solve(self.response.linearization.cross_product(u))))

    def matvec(self, u: Tensor) -> Tensor:
        """The product with a flat vector of shape (n,), or with the k columns of a matrix of shape (n, k).

        Args:
            u: entries in the order of the upper parameters.

        Returns:
            A tensor of the shape of u.

        Raises:
            ValueError: if the shape is another.
        """
        if u.shape[:1] != (self.shape[0],) or u.dim() > 2:
            raise ValueError(f"u must have shape ({self.shape[0]},) or ({self.shape[0]}, k), got {tuple(u.shape)}")
        if u.dim() == 2:
            return torch.stack([self.matvec(column) for column in u.T], dim=1) if u.shape[1] else u.clone()
        return flatten(self.product(unflatten(u, self.x)))

    def dense(self, max_size: int = 2000) -> Tensor:
        """The symmetrised n x n matrix, for small problems.

        Args:
            max_size: largest n accepted.

        Returns:
            A tensor of shape (n, n). Cost: n products.

        Raises:
            ValueError: if n exceeds ``max_size``.
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
        from scipy.sparse.linalg import LinearOperator  # type: ignore[import-untyped, unused-ignore]

        like = flatten(self.x)

        def matvec(v: Any) -> Any:
            return self.matvec(torch.as_tensor(v).to(like)).cpu().numpy()

        dtype = torch.empty(0, dtype=like.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=matvec, rmatvec=matvec, matmat=matvec, rmatmat=matvec, dtype=dtype)

    def upper_block(self, u: Tensors) -> Tensors:
        """The product f_xx u at fixed y (minimax), for the test of a local Nash equilibrium."""
        return scale(-1.0, self.response.linearization.second_derivative(u, zeros(self.response.y))[0])

    def _respond(self, u: Tensors, dy: Tensors, residual: bool = False) -> Tensors:
        """How grad Phi changes as x moves by u, y by dy, and z with them; with ``residual``, z is corrected besides."""
        graph = self.response.linearization
        if self._lagrangian is None:  # minimax: the second derivatives of f are those of -g
            return scale(-1.0, graph.second_derivative(u, dy)[0])
        in_x, in_y = self._lagrangian.product(u, dy)
        dz = self._solve(add(in_y, self._lagrangian.residual) if residual else in_y)
        return sub(in_x, graph.jacobian_product(dz, keep=True))

    def _solve(self, b: Tensors) -> Tensors:
        result = self.response.solve(b, self._solver)
        self._note(result)
        return result.z

    def _note(self, result: SolveResult) -> None:
        if bool(result.scale > 0):
            self.solve_error = max(self.solve_error, float(result.residual / result.scale))
        if result.status in ("non-positive curvature", "non-finite"):
            self._object(f"g_yy is not positive definite at y: a linear solve met {result.status}")

    def _object(self, trouble: str) -> None:
        if self._strict:
            raise ValueError(trouble)
        self.trouble = self.trouble or trouble


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
