"""The options of an estimator: what goes together."""

from __future__ import annotations

from typing import Any

from torchbilevel.decay import Decay
from torchbilevel.draws import BatchSizes
from torchbilevel.estimators.recursion import Plain, Recursion, Spider
from torchbilevel.lower import LowerSolver, Unrollable


def require_options(
    estimator: str,
    differentiates_steps: bool,
    lower_solver: Any,
    recursion: Any,
    batch_sizes: Any,
    decay: Any,
    initial_solver: Any,
    probe_solver: Any,
    warm_start: Any,
) -> None:
    """Refuse options of an estimator that are of the wrong kind or do not go together.

    Args:
        estimator: its name.
        differentiates_steps: whether hyperparameters of the lower solver receive derivatives.
        lower_solver: this and what follows: as in ``Estimator``.
        recursion: likewise.
        batch_sizes: likewise.
        decay: likewise.
        initial_solver: likewise.
        probe_solver: likewise.
        warm_start: likewise.

    Raises:
        TypeError: if an option is of the wrong kind.
        ValueError: if two options do not go together.
    """
    solvers = {"lower_solver": lower_solver, "initial_solver": initial_solver, "probe_solver": probe_solver}
    for name, solver in solvers.items():
        if solver is not None and not isinstance(solver, LowerSolver):
            got = solver.__name__ if isinstance(solver, type) else type(solver).__name__
            raise TypeError(
                f"{name} must be a lower solver such as GD(lr=0.1, steps=10) or None, got {got}; "
                "wrap a torch optimizer as TorchOptim(torch.optim.SGD, steps=9, lr=0.1)"
            )
        if solver is not None and solver.learned and not differentiates_steps:
            raise ValueError(
                f"{', '.join(solver.learned)} of the lower solver is a function of the upper module, but y*(x) does "
                f"not depend on how it is reached, so {estimator} has no derivative for it; use Unrolled"
            )
    for name, value, kind, example in (
        ("recursion", recursion, Recursion, "Storm(weight=0.1)"),
        ("batch_sizes", batch_sizes, BatchSizes, "BatchSizes(upper=32, lower=32)"),
        ("decay", decay, Decay, "Decay(power=1 / 3)"),
    ):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name} must be {kind.__name__}, such as {example}, or None, got {value!r}")
    if not isinstance(warm_start, bool):
        raise TypeError(f"warm_start must be True or False, got {warm_start!r}")
    if decay is not None and lower_solver is not None and not isinstance(lower_solver, Unrollable):
        raise ValueError(f"decay= scales the lr of the lower solver: use GD, SignGD or Adam, got {lower_solver}")
    if recursion is None or recursion == Plain():
        return
    name = repr(recursion)
    if not warm_start:
        raise ValueError(f"{name} carries y and estimates from call to call: it needs warm_start=True")
    if not isinstance(lower_solver, Unrollable) or lower_solver.tol is not None:
        raise ValueError(
            f"{name} moves y along its own estimate: use GD, SignGD or Adam without tol, got {lower_solver}"
        )
    if isinstance(recursion, Spider):
        if lower_solver.steps < 2:
            raise ValueError(
                f"{name} ends at the y of an estimate, before the step that follows it, so that with one step y would "
                f"never move: give the lower solver steps >= 2, got {lower_solver.steps}"
            )
    elif lower_solver.steps != 1:
        raise ValueError(f"{name} moves y by one step with x: give the lower solver steps=1, got {lower_solver.steps}")
