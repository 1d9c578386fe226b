"""RSVRB's estimator: gradients and matrices of every task carried along, of which a few are drawn per call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchbilevel.decay import Decay
from torchbilevel.draws import BatchSizes, Draw, Draws
from torchbilevel.estimators.base import Estimator
from torchbilevel.estimators.evaluation import Evaluation, Memory
from torchbilevel.estimators.matrices import (
    MatrixBounds,
    carry,
    clip_norm,
    clip_spectrum,
    matrices,
    solve,
)
from torchbilevel.estimators.recursion import Storm
from torchbilevel.estimators.vetting import SILENT_ZERO
from torchbilevel.linear_solve.base import positive, positive_int
from torchbilevel.lower import GD, LowerResult
from torchbilevel.problem import Problem
from torchbilevel.tensors import Tensors, clone, flatten, unflatten


class Task(NamedTuple):
    """What is kept of one task: flat vectors and matrices.

    Attributes:
        y: its lower variables.
        y_before: those before the last call.
        f_x: estimate of f_x, as the following ones at (x, y_before) of the last call.
        f_y: estimate of f_y.
        g_y: estimate of g_y.
        g_xy: estimate of g_xy.
        g_yy: estimate of g_yy.
        v: f_x - g_xy g_yy^{-1} f_y of these.
    """

    y: Tensor
    y_before: Tensor
    f_x: Tensor
    f_y: Tensor
    g_y: Tensor
    g_xy: Tensor
    g_yy: Tensor
    v: Tensor


class Rsvrb(Estimator):
    """The mean hypergradient of m tasks, from estimates of all its parts that are carried along.

    Of m tasks, each with its own f_i, g_i and y_i, every call draws n. For e each of f_x, f_y, g_y, g_xy and g_yy of a
    task drawn, p_t = (x_t, y_{i,t}), and one sample xi at both ends,

        e_t = e(p_t; xi) + (1 - b_t) (e_{t-1} - e(p_{t-1}; xi)) + (m / n - 1) (e(p_t; xi) - e(p_{t-1}; xi)),
        f_x, f_y, g_xy clipped to their bounds and g_yy to g_yy >= mu I,
        v_i = f_x - g_xy g_yy^{-1} f_y,   y_{i,t+1} = y_{i,t} - lambda s_t g_y,

    and nothing of the others changes; v_t is the mean of v_1, ..., v_m. The first call evaluates every task afresh.

    Args:
        lower_solver: ``GD(lr, steps=1)`` without momentum, lr below n / (m L).
        weight: b_1 in (0, 1]; b_t = weight s_{t-1}^2.
        bounds: mu, the bound of g_xy, and the largest size accepted.
        max_gradient: bound of |f_x| and of |f_y|; ``None`` for none.
        tasks_per_step: n.
        batch_sizes: of independent draws, one for every one of the five but f_x and f_y, which are taken together.
        decay: gives s_t; ``None`` for constant steps and weights.
        seed: of the choice of tasks, and of the random numbers inside the losses.

    Raises:
        ValueError: if an argument is out of range; on binding to a minimax problem, or to one that is too large.

    Cost: per ``backward`` and task drawn two gradients of f, six of g (four where one sample serves all), two Hessian-
    and two Jacobian-vector products per y, O(k^3) arithmetic for the k lower variables of a task; the first
    ``backward`` takes half of that for all m tasks. Keeps x, and of each task y twice, f_x, f_y, g_y, both matrices, v.

    Reference: Guo, Hu, Zhang and Yang, 2021 (arXiv 2105.02266), SVRB for one task, RSVRB for many.

    Differs from the paper: written from its description. The factor m / n - 1 is derived: it makes the expected error
    of an estimate, over the draw of tasks, (1 - b_t n / m) times that before, as STORM has it for one task. A later
    estimator of such blocks, MSVR of Jiang, Li, Wang, Zhang and Yang, NeurIPS 2022, adds a correction of this kind too.
    """

    def __init__(
        self,
        lower_solver: GD,
        *,
        weight: float,
        bounds: MatrixBounds,
        max_gradient: float | None = None,
        tasks_per_step: int = 1,
        batch_sizes: BatchSizes | None = None,
        decay: Decay | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(lower_solver, recursion=Storm(weight), batch_sizes=batch_sizes, decay=decay, seed=seed)
        if not isinstance(lower_solver, GD) or lower_solver.momentum != 0:
            raise ValueError(f"RSVRB moves y by plain steps: use GD(lr=..., steps=1), got {lower_solver}")
        if max_gradient is not None:
            positive("max_gradient", max_gradient)
        self.bounds, self.max_gradient = bounds, max_gradient
        self.tasks_per_step = positive_int("tasks_per_step", tasks_per_step)

    def refuse(self, problem: Problem) -> None:
        """Minimax problems need no matrix, and large ones have none."""
        self.bounds.refuse("RSVRB", problem)

    def y_of(self, task: int) -> Tensors:
        """The lower variables of a task; the lower module holds those of a task drawn last.

        Args:
            task: its number.

        Returns:
            y, detached copies.

        Raises:
            ValueError: if there is no such task, or there was no ``backward`` yet.
        """
        tracked = self.memory.tracked
        known = max(len(tracked) - 1, 0)  # besides x
        if task not in range(known):
            raise ValueError(f"task must be the number of a task that a backward has met, below {known}, got {task!r}")
        return clone(unflatten(Task(*tracked[str(task)]).y, self.problem.y))

    def refresh(self) -> None:
        """One run of the lower solver, see ``Estimator``; refused for several tasks, of whose y the module holds one.

        Raises:
            RuntimeError: if there are several tasks.
        """
        if "1" in self.memory.tracked:
            raise RuntimeError("RSVRB keeps a y for every task, and moves those of the tasks it draws: see y_of(task)")
        super().refresh()

    def evaluate(self, x: Tensors, y: Tensors, memory: Memory, draws: Draws) -> Evaluation:
        """Carry the estimates of the tasks drawn to x, and take a step of their y."""
        x, tasks, past, t = clone(x), draws.tasks, memory.tracked, memory.calls
        if self.tasks_per_step > len(tasks):
            raise ValueError(f"tasks_per_step={self.tasks_per_step} exceeds the number of tasks, {len(tasks)}")
        known = len(past) - 1  # besides x
        if past and known != len(tasks):
            raise ValueError(
                f"lower= and upper= have {len(tasks)} task(s), and those of the calls before {known}, of each of which "
                "RSVRB keeps estimates: give the same tasks in every call"
            )
        kept = {i: Task(*past[str(i)]) for i in range(len(tasks))} if past else {}
        solver, factor = self.lower_solver, 1.0 if self.decay is None else self.decay.upper(max(t - 1, 0))
        assert isinstance(solver, GD)
        if self.decay is not None:
            solver = solver.scaled(self.decay.lower(t))
        found, values, new = False, [], {i: task._replace(y_before=task.y) for i, task in kept.items()}
        drawn = self._draw_tasks(len(tasks), draws) if past else list(range(len(tasks)))
        for i in drawn:
            here = y if not past or len(tasks) == 1 else unflatten(kept[i].y, y)
            value, estimates, reached = self._observe(x, here, tasks[i].at(0))
            if past:
                before = unflatten(kept[i].y_before, y)
                keep, extra = 1.0 - self.recursion.weights(factor)[0], len(tasks) / len(drawn) - 1.0
                if keep or extra:
                    _, old, _ = self._observe(past["x"], before, tasks[i].at(0))
                    estimates = tuple(
                        carry(carry(e, u, o, keep), e, o, extra)
                        for e, u, o in zip(estimates, kept[i][2:7], old, strict=True)
                    )
            f_x, f_y, g_y, g_xy, g_yy = estimates
            f_x, f_y = clip_norm(f_x, self.max_gradient), clip_norm(f_y, self.max_gradient)
            g_xy = clip_norm(g_xy, self.bounds.max_jacobian)
            g_yy = clip_spectrum(g_yy, self.bounds.min_curvature)
            v = f_x - (g_xy @ solve(g_yy, f_y)).to(f_x)
            ahead, _ = solver.update(here, unflatten(g_y, here), None)
            new[i] = Task(flatten(ahead).clone(), flatten(here).clone(), f_x, f_y, g_y, g_xy, g_yy, v)
            values.append(value)
            found = found or reached
        if not found and not any(bool(new[i].v.any()) for i in drawn):
            raise ValueError(SILENT_ZERO)
        hypergradient = unflatten(torch.stack([task.v for task in new.values()]).mean(0), x)
        # The rest of the estimator sees one y, and all new estimates where it looks for what is not finite.
        tracked = {"x": x, **{str(i): tuple(task) for i, task in new.items()}}
        return Evaluation(
            torch.stack(values).mean(),
            hypergradient,
            tuple(new[i].g_y for i in drawn),
            ahead,
            None,
            LowerResult(ahead, None, 1, None),
            tracked=tracked,
        )

    def _observe(self, x: Tensors, y: Tensors, draw: Draw) -> tuple[Tensor, Tensors, bool]:
        """F, its gradients, g_y and the matrices, flat; and whether a path leads to x."""
        value, f_x, f_y, in_f = self.oracle.upper_gradient(x, y, draw.upper)
        g_y = self.oracle.lower_gradient(x, y, draw.lower)[1]
        g_xy, g_yy, in_g = matrices(self.oracle, x, y, draw.jvp, draw.hvp())
        return value, (flatten(f_x), flatten(f_y), flatten(g_y), g_xy, g_yy), in_f or in_g

    def _draw_tasks(self, m: int, draws: Draws) -> list[int]:
        order: list[int] = torch.randperm(m, generator=torch.Generator().manual_seed(draws.at(0).seed)).tolist()
        return sorted(order[: self.tasks_per_step])
