"""The best response y*(x) to a stated accuracy, and solves with g_yy there, on the active face where y is constrained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchbilevel.derivatives import LowerLinearization, Oracle, vjp
from torchbilevel.lanczos import Eigenpair, smallest_eigenpair
from torchbilevel.linear_solve import CG, SolveResult
from torchbilevel.problem import Problem
from torchbilevel.samples import Sample
from torchbilevel.tensors import Tensors, add, axpy, clone, detach, flatten, leaves, norm, scale, sub, unflatten


class Face:
    """The derivative J of the projection P at y - g_y, which describes the face of Y that y lies on.

    For a point with y = P(y - g_y), moving x moves y* within the range of J, and dy* = J q with

        [ (J - J^2) + J g_yy J ] q = -J g_yx dx,

    where J - J^2 vanishes on a flat face and is its curvature on a round one (divide J (J^+ - I) J by the step, here 1).
    Without a projection J = I. J is applied through autograd, so any differentiable Tensor -> Tensor projection works.

    Args:
        problem: whose projection is meant.
        y: lower variables.
        g_y: the lower gradient there.
    """

    def __init__(self, problem: Problem, y: Tensors, g_y: Tensors) -> None:
        self.free = not problem.constrains_y
        self._problem = problem
        if not self.free:
            self._point = leaves(sub(y, g_y))
            with torch.enable_grad():
                self._image = problem.project_y(self._point)

    def project(self, s: Tensors) -> Tensors:
        """J s."""
        return s if self.free else vjp(self._image, self._point, s, keep=True)[0]

    def system(self, hessian_product: LowerLinearization, q: Tensors) -> Tensors:
        """[(J - J^2) + J g_yy J] q. Cost: one Hessian-vector product."""
        if self.free:
            return hessian_product.hessian_product(q)
        flat = self.project(q)
        return add(sub(flat, self.project(flat)), self.project(hessian_product.hessian_product(flat)))

    def ambiguous(self, scale_: float = 1e-6) -> int:
        """Number of entries whose bound is active with a multiplier of zero, so that the face is not well defined.

        An entry counts if its row of J changes between vanishing and not when y - g_y moves by ``scale_`` to either side.
        """
        if self.free:
            return 0
        generator = torch.Generator().manual_seed(0)
        draws = [torch.randn((2, *t.shape), generator=generator).to(t) for t in self._point]
        rows = []
        for side in (scale_, -scale_):
            shifted = leaves(
                tuple(p + side * (1 + p.abs()) * d[0].sign() for p, d in zip(detach(self._point), draws, strict=True))
            )
            with torch.enable_grad():
                image = self._problem.project_y(shifted)
            rows.append([row != 0 for row in vjp(image, shifted, tuple(d[1] for d in draws))[0]])
        return int(sum(int((a != b).sum()) for a, b in zip(*rows, strict=True)))


@dataclass(frozen=True)
class Response:
    """y*(x), and what is needed for further solves there.

    Attributes:
        y: the lower variables.
        residual: |y - P(y - g_y)|, without a projection |g_y|.
        converged: whether the residual met the tolerance.
        linearization: of g at (x, y), with g_x.
        face: where y lies.
        iterations: Newton steps taken.
    """

    y: Tensors
    residual: float
    converged: bool
    linearization: LowerLinearization
    face: Face
    iterations: int

    def solve(self, b: Tensors, solver: CG) -> SolveResult:
        """Solve with g_yy; on a face, return J q for the system of ``Face`` with right-hand side J b."""
        face = self.face
        result = solver.solve(lambda q: face.system(self.linearization, q), face.project(b))
        if face.free:
            return result
        return SolveResult(
            face.project(result.z),
            result.residual,
            result.scale,
            result.iterations,
            result.tol,
            result.nonpositive,
            result.diverged,
        )

    def smallest_eigenvalue(self, generator: torch.Generator, max_basis: int) -> Eigenpair | None:
        """Smallest eigenpair of g_yy on the face (of its reduced system where the face is round); ``None`` at a vertex."""
        start = flatten(self.face.project(unflatten(_normal(flatten(self.y), generator), self.y)))
        if not bool(start.norm() > 0):
            return None

        def operator(v: Tensor) -> Tensor:
            return flatten(self.face.system(self.linearization, unflatten(v, self.y)))

        return smallest_eigenpair(
            operator, start, max_basis=max_basis, enough=lambda value, residual, _: residual <= 0.05 * abs(value)
        )


def best_response(
    problem: Problem, oracle: Oracle, x: Tensors, y: Tensors, sample: Sample, tol: float, solver: CG, max_iter: int = 50
) -> Response:
    """Bring y to y*(x) by Newton steps, each from a linear solve, halved until the residual falls.

    R(y) = y - P(y - g_y); with J the derivative of P, the step d has (I - J) d = -(I - J) R and, on the face,
    [(J - J^2) + J g_yy J] q = J (-R + g_yy (I - J) R). Where g_yy is not positive definite along the way, the step is a gradient
    step of length 1 / |g_yy| instead.

    Args:
        problem: the problem; its modules are left alone.
        oracle: takes and counts the derivatives.
        x: upper variables.
        y: where to start.
        sample: where g is evaluated.
        tol: stop when |R| <= tol.
        solver: for the steps.
        max_iter: Newton steps at most.

    Returns:
        The response, converged or not. Cost: per step one gradient of g, one linear solve and the trial gradients.
    """
    y = clone(problem.project_y(y))
    best = float("inf")
    for iteration in range(max_iter + 1):
        linearization = oracle.linearize(x, y, sample, in_x=True)
        face = Face(problem, y, linearization.gradient)
        residual = _residual(problem, y, linearization.gradient)
        best = float(norm(residual))
        if best <= tol or iteration == max_iter:
            break
        step = _newton_step(face, linearization, residual, solver)
        trial, size = None, 1.0
        for _ in range(30):
            candidate = problem.project_y(axpy(size, step, y))
            gradient = oracle.lower_gradient(x, candidate, sample)[1]
            if float(norm(_residual(problem, candidate, gradient))) < (1 - 1e-4 * size) * best:
                trial = candidate
                break
            size *= 0.5
        if trial is None:  # round-off: the residual cannot fall any further
            break
        y = trial
    return Response(y, best, best <= tol, linearization, face, iteration)


def _residual(problem: Problem, y: Tensors, g: Tensors) -> Tensors:
    return sub(y, problem.project_y(sub(y, g))) if problem.constrains_y else g


def _newton_step(face: Face, linearization: LowerLinearization, residual: Tensors, solver: CG) -> Tensors:
    if face.free:
        solve = solver.solve(linearization.hessian_product, residual)
        step = scale(-1.0, solve.z)
    else:
        across = sub(residual, face.project(residual))
        rhs = face.project(sub(linearization.hessian_product(across), residual))
        solve = solver.solve(lambda q: face.system(linearization, q), rhs)
        step = sub(face.project(solve.z), across)
    if solve.status not in ("non-positive curvature", "non-finite"):
        return step
    curvature = norm(linearization.hessian_product(residual)) / norm(residual)
    return scale(-1.0 / curvature.clamp(min=torch.finfo(curvature.dtype).tiny), residual)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
