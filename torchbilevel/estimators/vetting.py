"""What an evaluation must pass before anything is written: finite numbers, a linear solve that did not fail."""

from __future__ import annotations

import sys
import warnings

from torchbilevel.estimators.evaluation import Evaluation, LinearSolveWarning
from torchbilevel.linear_solve import SolveResult
from torchbilevel.lower import LowerResult, LowerSolver
from torchbilevel.tensors import is_finite

SILENT_ZERO = (
    "no path leads from the losses to the upper parameters, so the hypergradient would be zero in silence: are they "
    "detached in the losses, or used only where Unrolled alone sees them (lower_init, hyperparameters of the lower "
    "solver)?"
)


def vet(e: Evaluation, solver: LowerSolver | None) -> None:
    """Refuse an evaluation that is not finite, and warn of one whose linear solve failed.

    Args:
        e: the evaluation, nothing of which has been written anywhere.
        solver: that moved y, for the message.

    Raises:
        FloatingPointError: if it is not finite; the message says where that began.

    Warns:
        LinearSolveWarning: if the linear solve met non-positive curvature or diverged.
    """
    g_y, residual = e.lower_gradient or (), () if e.solve is None else (e.solve.residual,)
    if not is_finite((e.value,), e.y, e.hypergradient, g_y, residual):
        if not is_finite(e.y):
            raise FloatingPointError(diverged(e.lower, solver))
        if not is_finite((e.value,)):
            raise FloatingPointError(f"the upper loss is {e.value.item()}; it must be finite")
        if e.solve is not None and is_finite(g_y) and not is_finite(residual):
            raise FloatingPointError(
                f"the linear solve ended in numbers that are not finite after {e.solve.iterations} iterations "
                f"({e.solve.status}): is lower_loss strongly convex in y, and is it twice differentiable here?"
            )
        which = "hypergradient" if is_finite(g_y) else "gradient of the lower loss"
        raise FloatingPointError(
            f"the {which} is not finite although the upper loss and y are; look for a square root, log or norm at 0"
        )
    if e.solve is not None and failed(e.solve):
        reason = "lower_loss is not strongly convex in y here"
        if e.solve.status == "diverged":
            reason = f"its lr exceeds 2 / L, or {reason}"
        # Without numbers, so that Python shows it once; they are in ``last``.
        warnings.warn(
            f"the linear solve ended with {e.solve.status}: {reason} (estimator.last.solve has the residual)",
            LinearSolveWarning,
            stacklevel=_outside(),
        )


def diverged(result: LowerResult, solver: LowerSolver | None) -> str:
    """What to say of a y that is not finite."""
    return f"the lower variables y are not finite after {result.steps} steps of {solver}; a smaller lr may help"


def _outside() -> int:
    """The stack level, as the caller's caller counts, of the first frame outside the package: the user's line."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("torchbilevel"):
        frame, level = frame.f_back, level + 1
    return level


def failed(solve: SolveResult | None) -> bool:
    """Whether a linear solve, which ended in finite numbers, ended where its z is not to be trusted."""
    return solve is not None and solve.failed
