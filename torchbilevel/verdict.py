"""The verdict on a point, from the numbers that were found there."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from torchbilevel.curvature import HessianOperator
from torchbilevel.lanczos import Eigenpair
from torchbilevel.tensors import axpy, flatten, norm, unflatten

Verdict = Literal["epsilon-local minimum", "strict saddle", "not stationary", "undecided"]


def obstacle(operator: HessianOperator, y_pair: Eigenpair | None, *numbers: float) -> str:
    """Why nothing can be said about a point.

    Args:
        operator: hess Phi there.
        y_pair: smallest eigenpair of g_yy on the face of y; ``None`` at a vertex.
        numbers: which must be finite.

    Returns:
        The reason in words, empty if there is none.
    """
    if y_pair is not None and not y_pair.value > y_pair.error:
        return (
            f"g_yy is not shown to be positive definite at y (smallest eigenvalue {y_pair.value:.2e} - "
            f"{y_pair.error:.0e} after {y_pair.products - 1} Lanczos steps), so y need not be a strict minimiser"
        )
    if operator.trouble:
        return operator.trouble
    if operator.solve_error > 0.01:
        return f"a linear solve with g_yy stopped at a relative residual of {operator.solve_error:.0e}"
    if not all(map(math.isfinite, (*numbers, operator.gradient_error, float(operator.value)))):
        return "a number is not finite"
    return ""


def disagreement(operator: HessianOperator, u: Tensor) -> str:
    """Compare one product with a difference of exact gradients, since autograd can be wrong in silence.

    torch's fused LayerNorm, BatchNorm and weight_norm have wrong second or third derivatives in some releases, and a
    once-differentiable function drops its curvature.

    Args:
        operator: hess Phi.
        u: a direction drawn at random, shape (n,).

    Returns:
        What disagrees, in words, empty if nothing does. Cost: two gradients of Phi and one product.
    """
    eps, size = torch.finfo(u.dtype).eps, float(norm(operator.x))
    u, step = u / u.norm(), eps ** (1 / 3) * max(1.0, size)
    ends = [operator.at(axpy(h, unflatten(u, operator.x), operator.x)) for h in (step, -step)]
    difference = (flatten(ends[0].gradient) - flatten(ends[1].gradient)) / (2 * step)
    product = operator.matvec(u)
    error, length = float((product - difference).norm()), float(product.norm())
    noise = sum(end.gradient_error + 100 * eps * float(norm(end.gradient)) for end in ends) / step
    if error <= 0.05 * float(difference.norm()) + 10 * eps ** (1 / 3) * length + noise:
        return ""
    return (
        f"a product with hess Phi is {error / max(length, eps):.0%} off a difference of grad Phi: either Phi is not "
        f"smooth here (ReLU), or some operation has wrong higher derivatives in torch (fused LayerNorm and BatchNorm "
        f"do): write it out in elementary operations"
    )


def judge(
    operator: HessianOperator,
    grad_norm: float,
    grad_tol: float,
    pair: Eigenpair | None,
    curvature_tol: float,
    reason: str,
) -> tuple[Verdict, str]:
    """The verdict and its reason.

    Args:
        operator: hess Phi.
        grad_norm: |grad Phi|.
        grad_tol: epsilon.
        pair: smallest eigenpair of hess Phi, ``None`` where there was an obstacle.
        curvature_tol: epsilon_H.
        reason: the obstacle, or empty.

    Returns:
        Both.
    """
    if reason or pair is None:
        return "undecided", reason
    if grad_norm - operator.gradient_error > grad_tol:
        return "not stationary", f"|grad Phi| = {grad_norm:.2e} exceeds {grad_tol:.2e}"
    if grad_norm + operator.gradient_error > grad_tol:
        return "undecided", (
            f"|grad Phi| = {grad_norm:.2e} is known to {operator.gradient_error:.0e} only "
            f"(|g_y| = {operator.response.residual:.1e}), too coarse for {grad_tol:.2e}"
        )
    if pair.value < -curvature_tol:
        return "strict saddle", f"a direction of curvature {pair.value:.2e}, below {-curvature_tol:.2e}, exists"
    if pair.value - pair.error >= -curvature_tol:
        return "epsilon-local minimum", f"no curvature below {-curvature_tol:.2e}"
    return "undecided", (
        f"no curvature below {-curvature_tol:.2e} was found in {pair.products - 1} Lanczos steps, but it could go down "
        f"to {pair.value - pair.error:.2e}: raise max_basis, or use float64"
    )


def positive_definite(pair: Eigenpair) -> bool | None:
    """Whether an operator is positive definite, from its smallest eigenpair.

    Args:
        pair: the eigenpair.

    Returns:
        ``False`` if there is a negative eigenvalue, ``None`` if neither is shown.
    """
    if pair.value > pair.error:
        return True
    rounding = 1e3 * torch.finfo(pair.vector.dtype).eps * max(abs(pair.value), abs(pair.largest))
    return False if pair.value < -rounding else None
