"""One call of a recursion: estimates of f's and g's derivatives carried along while y moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from torchbilevel.draws import Draw, Draws
from torchbilevel.estimators.evaluation import Memory
from torchbilevel.estimators.recursion import Hybrid, Recursion, Spider
from torchbilevel.linear_solve import SolveResult
from torchbilevel.lower import LowerResult, Unrollable
from torchbilevel.tensors import Scalar, Tensors, axpy, clone, norm, scale, sub


@dataclass(frozen=True, eq=False)
class Estimate:
    """Estimates of e and of g_y, and the point that they belong to.

    Attributes:
        x: upper variables.
        y: lower variables.
        upper: of the hypergradient, or of f_x and f_y in one tuple.
        lower: of g_y.
        value: f there, on the last sample; ``None`` where it comes from the memory.
        z: the adjoint, where e took a linear solve.
        solve: how that ended.
    """

    x: Tensors
    y: Tensors
    upper: Tensors
    lower: Tensors
    value: torch.Tensor | None = None
    z: Tensors | None = None
    solve: SolveResult | None = None


Observe = Callable[[Tensors, Tensors, Draw], Estimate]


def correct(
    recursion: Recursion, past: Estimate, x: Tensors, y: Tensors, draws: Draws, k: int, factor: float, observe: Observe
) -> Estimate:
    """Carry an estimate to (x, y): e(p; S) + (1 - a) (v - e(p'; S)), p' the point that v belongs to.

    Args:
        recursion: gives the weights.
        past: v and u, with their point.
        x: upper variables.
        y: lower variables.
        draws: the samples of this iteration.
        k: number of the correction.
        factor: by which the last step of x was scaled.
        observe: the quantities at a point on a sample.

    Returns:
        The estimate. Cost: two observations, three for ``Hybrid``, one where both weights are 1.
    """
    a, b = recursion.weights(factor)
    new = observe(x, y, draws.at(k))
    if a == b == 1:
        return new
    old = observe(past.x, past.y, draws.at(k))
    if isinstance(recursion, Hybrid):
        # A draw that no step of y uses: those are numbered from 0.
        fresh = observe(x, y, draws.at(-1 - k))
        upper = _mix(a, fresh.upper, _carried(past.upper, new.upper, old.upper, 1.0))
        lower = _mix(b, fresh.lower, _carried(past.lower, new.lower, old.lower, 1.0))
    else:
        upper = _carried(past.upper, new.upper, old.upper, 1.0 - a)
        lower = _carried(past.lower, new.lower, old.lower, 1.0 - b)
    return Estimate(x, y, upper, lower, new.value, new.z, new.solve)


def _carried(past: Tensors, new: Tensors, old: Tensors, keep: float) -> Tensors:
    """The sum new + keep (past - old)."""
    return axpy(keep, sub(past, old), new)


def _mix(a: float, s: Tensors, t: Tensors) -> Tensors:
    """The mean a s + (1 - a) t."""
    return axpy(a, s, scale(1.0 - a, t))


def track(
    recursion: Recursion,
    solver: Unrollable,
    x: Tensors,
    y: Tensors,
    memory: Memory,
    draws: Draws,
    factors: tuple[float, float],
    observe: Observe,
    project: Callable[[Tensors], Tensors],
) -> tuple[Estimate, LowerResult]:
    """One call: carry the estimates to x and move y.

    Args:
        recursion: how.
        solver: moves y along u; its ``steps`` are the corrections.
        x: upper variables.
        y: lower variables, where the last call left them.
        memory: holds the estimates of the last call.
        draws: the samples of this iteration.
        factors: by which the decay scaled the last step of x, and scales this step of y.
        observe: the quantities at a point on a sample.
        project: projection of y.

    Returns:
        The estimate, and the y to go on from.
    """
    x, y, state, factor = clone(x), clone(y), memory.solver_state, factors[1]
    kept = memory.tracked
    past = Estimate(kept["x"], kept["y"], kept["upper"], kept["lower"]) if kept else None
    anchors = recursion.is_anchor(memory.calls) or past is None
    fresh = past is None or (anchors and recursion.anchors != "after")
    here = past
    if fresh:
        # Only SPIDER rests on a large sample; elsewhere the first call is like all others unless asked otherwise.
        large = isinstance(recursion, Spider) or (draws.anchored and memory.calls == 0)
        here = observe(x, y, draws.at(0, anchor=large))
        if recursion.anchors == "after":
            return here, LowerResult(y, state, 0, None)
        if recursion.anchors == "as printed" and past is not None:
            here, fresh = replace(here, x=past.x, y=past.y), False
    assert here is not None
    best, least = here, torch.tensor(torch.inf)
    for k in range(solver.steps):
        if not (fresh and k == 0):
            here = correct(recursion, here, x, y, draws, k, factors[0], observe)
        if recursion.selects == "last":
            best = here
            if k == solver.steps - 1:
                break
        ahead, state = solver.update(y, here.lower, state)
        ahead = _part_way(factor, y, project(ahead))
        if recursion.selects == "argmin":
            length = norm(sub(ahead, y))
            if k == 0 or not bool(length >= least):  # what is not finite must come out
                best, least = here, length
        y = ahead
    if recursion.selects == "next":
        return here, LowerResult(y, state, solver.steps, None)
    if anchors and recursion.anchors == "after":
        best = observe(x, best.y, draws.at(0, anchor=True))
    return best, LowerResult(best.y, state, solver.steps, None)


def _part_way(factor: Scalar, y: Tensors, ahead: Tensors) -> Tensors:
    """The point y + factor (ahead - y)."""
    return ahead if factor == 1 else axpy(factor, sub(ahead, y), y)


def remembered(estimate: Estimate) -> dict[str, Any]:
    """What the memory keeps of an estimate."""
    return {"x": estimate.x, "y": estimate.y, "upper": estimate.upper, "lower": estimate.lower}
