"""What all hypergradient estimators share: ``backward``, the memory between calls, probes and checkpoints."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchbilevel.derivatives import Counts, Oracle
from torchbilevel.linear_solve import SolveResult
from torchbilevel.lower import LowerResult, LowerSolver
from torchbilevel.problem import Problem
from torchbilevel.samples import Sample, Samples
from torchbilevel.tensors import Tensors, clone, detach, is_finite, mix_seed


class LinearSolveWarning(UserWarning):
    """A linear solve met non-positive curvature or diverged, so the hypergradient of that step is not to be trusted."""


@dataclass(frozen=True)
class Memory:
    """What an estimator carries from one ``backward`` to the next, besides y itself, which lives in the lower module.

    Attributes:
        calls: ``backward`` calls so far.
        z: the adjoint, from which the next linear solve starts.
        solver_state: the lower solver's own memory (momentum).
    """

    calls: int = 0
    z: Tensors | None = None
    solver_state: Any = None


@dataclass(frozen=True)
class Evaluation:
    """A hypergradient and what came with it; everything is detached.

    Attributes:
        value: f(x, y), 0-d.
        hypergradient: v, of the shapes of x.
        lower_gradient: g_y at (x, y), or ``None`` where the estimator does not see it.
        y: the lower variables reached.
        z: the adjoint, or ``None``.
        lower: how the lower solver ended.
        solve: how the linear solve ended, or ``None``.
    """

    value: Tensor
    hypergradient: Tensors
    lower_gradient: Tensors | None
    y: Tensors
    z: Tensors | None
    lower: LowerResult
    solve: SolveResult | None = None


class Estimator(ABC):
    """A hypergradient estimator: settings, a problem once bound to one, and its memory.

    ``backward`` stands where ``loss.backward()`` stands. It moves y by the lower solver, *adds* the hypergradient to the
    ``.grad`` of the upper parameters, and returns the upper loss, detached.

    Args:
        lower_solver: how y moves in every ``backward``; ``None`` leaves y where it is.
        warm_start: whether y (and the lower solver's momentum) goes on from where the last ``backward`` left it;
            otherwise every ``backward`` starts from ``problem.lower_init``, or from the y met when the problem was bound.
        seed: of the random numbers inside the losses (dropout).

    Attributes:
        counts: oracle calls so far.
        last: the last evaluation (residuals, iterations), ``None`` before the first ``backward``.
    """

    def __init__(self, lower_solver: LowerSolver | None, *, warm_start: bool = True, seed: int = 0) -> None:
        if lower_solver is not None and not isinstance(lower_solver, LowerSolver):
            raise TypeError(
                f"lower_solver must be a lower solver such as GD(lr=0.1, steps=10) or None, got {type(lower_solver).__name__}; "
                f"wrap a torch optimizer as TorchOptim(torch.optim.SGD, steps=10, lr=0.1)"
            )
        self.lower_solver, self.warm_start, self.seed = lower_solver, warm_start, seed
        self.memory = Memory()
        self.last: Evaluation | None = None
        self._problem: Problem | None = None
        self._samples: Samples | None = None
        self._reset: Tensors | None = None

    def __repr__(self) -> str:
        shown = {k: v for k, v in vars(self).items() if not k.startswith("_") and k not in ("memory", "last", "oracle")}
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in shown.items())})"

    # --- what a subclass defines -----------------------------------------------------------------------------------------

    @abstractmethod
    def evaluate(self, x: Tensors, y: Tensors, memory: Memory, samples: Samples) -> Evaluation:
        """The hypergradient at x when the lower solver starts at y. Changes nothing but the oracle counts.

        Args:
            x: upper variables.
            y: where the lower solver starts.
            memory: as the last ``backward`` left it.
            samples: where both losses are evaluated.
        """

    def refuse(self, problem: Problem) -> None:
        """Raise if the estimator cannot work on the problem, saying why; by default any problem will do."""

    # --- the user's side -------------------------------------------------------------------------------------------------

    def bind(self, problem: Problem) -> Estimator:
        """Attach the estimator to its problem, once.

        Args:
            problem: the problem that all later calls are about.

        Returns:
            The estimator itself.

        Raises:
            ValueError: if it is bound to another problem already, or cannot work on this one.
        """
        if self._problem is not None and self._problem is not problem:
            raise ValueError(
                f"this {type(self).__name__} is bound to another problem already; make a new estimator for each problem"
            )
        if self._problem is None:
            self.refuse(problem)
            self._problem, self.oracle = problem, Oracle(problem)
            if not self.warm_start:
                self._reset = clone(problem.y)
        return self

    @property
    def problem(self) -> Problem:
        """The problem the estimator is bound to."""
        if self._problem is None:
            raise RuntimeError(
                f"this {type(self).__name__} has no problem yet; call bind(problem), or hand it to a Method"
            )
        return self._problem

    @property
    def counts(self) -> Counts:
        """Oracle calls so far."""
        self.problem  # noqa: B018  (raises where there is none)
        return self.oracle.counts

    def backward(self, batch: Any = None, *, lower: Any = None, upper: Any = None) -> Tensor:
        """Move y, add the hypergradient to ``.grad`` of the upper parameters, and return the upper loss.

        Args:
            batch: minimax: a batch or a source.
            lower: bilevel: a batch or a source for the lower loss.
            upper: bilevel: a batch or a source for the upper loss.

        Returns:
            f(x, y) at the y reached, detached, 0-d.

        Raises:
            FloatingPointError: if the loss, y or the hypergradient is not finite; nothing has changed then.

        Warns:
            LinearSolveWarning: if the linear solve met non-positive curvature or diverged.
        """
        problem = self.problem
        samples = problem.sample(batch, lower, upper, mix_seed(self.seed, self.memory.calls))
        x = problem.x
        evaluation = self.evaluate(x, self.start(), self.memory, samples)
        self._refuse_non_finite(evaluation)
        if evaluation.solve is not None and evaluation.solve.status in ("non-positive curvature", "diverged"):
            warnings.warn(self._complaint(evaluation.solve), LinearSolveWarning, stacklevel=2)
        problem.commit_buffers(x, evaluation.y, samples)
        problem.set_y(evaluation.y)
        self.memory = self.advance(evaluation)
        self.last, self._samples = evaluation, samples
        for p, v in zip(problem.upper_parameters, evaluation.hypergradient, strict=True):
            if p.grad is None:
                p.grad = v
            else:
                p.grad += v
        return evaluation.value

    def probe(self) -> Probe:
        """The hypergradient on the samples and from the memory of the last ``backward``, as a function of x that commits nothing."""
        return Probe(self)

    def refresh(self) -> None:
        """Bring y up to date with the current x: one run of the lower solver on the samples of the last ``backward``."""
        samples = self.last_samples
        result = self.solve_lower(self.problem.x, self.start(), self.memory, samples.lower)
        self.problem.set_y(result.y)
        if self.warm_start:
            self.memory = replace(self.memory, solver_state=result.state)

    @property
    def last_samples(self) -> Samples:
        """The samples of the last ``backward``."""
        if self._samples is None:
            raise RuntimeError(
                "there has been no backward yet (or none since the checkpoint was loaded); call backward first"
            )
        return self._samples

    def state_dict(self) -> dict[str, Any]:
        """The memory, y, its reset value and the oracle counts, as plain containers of tensors and numbers."""
        return {
            "calls": self.memory.calls,
            "z": None if self.memory.z is None else clone(self.memory.z),
            "solver_state": self.memory.solver_state,
            "y": clone(self.problem.y),
            "reset": self._reset,
            "counts": self.counts.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from where ``state_dict`` was taken; y is written into the lower module.

        Args:
            state: what ``state_dict`` returned.

        Raises:
            ValueError: if y of the checkpoint does not fit the lower module.
        """
        shapes = [tuple(t.shape) for t in state["y"]]
        expected = [tuple(t.shape) for t in self.problem.y]
        if shapes != expected:
            raise ValueError(f"the checkpoint's lower variables have shapes {shapes}, the lower module's {expected}")

        def place(tensors: Tensors | None, like: Tensors) -> Tensors | None:
            return (
                None
                if tensors is None
                else tuple(t.to(p.device, copy=True) for t, p in zip(tensors, like, strict=True))
            )

        y = self.problem.y
        self.problem.set_y(state["y"])
        self._reset = place(state["reset"], y)
        self.memory = Memory(int(state["calls"]), place(state["z"], y), _place_like(state["solver_state"], y))
        self.counts.load_state_dict(state["counts"])
        self.last = self._samples = None

    # --- for subclasses --------------------------------------------------------------------------------------------------

    def start(self) -> Tensors:
        """Where the next lower solve starts, detached."""
        problem = self.problem
        if self.warm_start and self.memory.calls > 0:
            return problem.y
        initial = problem.start(problem.x)
        if initial is not None:
            return detach(initial)
        return problem.y if self._reset is None else self._reset

    def solve_lower(self, x: Tensors, y: Tensors, memory: Memory, sample: Sample) -> LowerResult:
        """Run the lower solver from y, without a graph."""
        if self.lower_solver is None:
            return LowerResult(y, None, 0, None)
        solver = self.lower_solver.bind(lambda function: _detached(self.problem.call_upper(function, x)))
        state = memory.solver_state if self.warm_start else None
        return solver.run(lambda point: self.oracle.lower_gradient(x, point, sample), y, state, self.problem.project_y)

    def advance(self, evaluation: Evaluation) -> Memory:
        """The memory after a ``backward`` that ended in this evaluation."""
        state = evaluation.lower.state if self.warm_start else None
        return Memory(self.memory.calls + 1, evaluation.z, state)

    def _refuse_non_finite(self, e: Evaluation) -> None:
        if is_finite((e.value,), e.y, e.hypergradient):
            return
        if not is_finite(e.y):
            raise FloatingPointError(
                f"the lower variables y are not finite after {e.lower.steps} steps of {self.lower_solver}; a smaller lr may help"
            )
        if not is_finite((e.value,)):
            raise FloatingPointError(f"the upper loss is {e.value.item()}; it must be finite")
        if e.solve is not None and e.solve.status == "non-finite":
            raise FloatingPointError(
                f"the linear solve became non-finite after {e.solve.iterations} iterations of {self.__dict__['linear_solver']}"
            )
        raise FloatingPointError(
            "the hypergradient is not finite although the upper loss and y are; look for a square root, log or norm at zero"
        )

    def _complaint(self, solve: SolveResult) -> str:
        return (
            f"the linear solve ended with {solve.status} after {solve.iterations} iterations (residual {solve.residual.item():.2e} of "
            f"{solve.scale.item():.2e}): "
            + (
                "lower_loss is not strongly convex in y here"
                if solve.status != "diverged"
                else "lr of the solver exceeds 2 / L"
            )
        )


class Probe:
    """The hypergradient as a function of the upper parameters' current values, on frozen samples.

    On construction it takes a snapshot of y, of the memory and of the samples. A call *overwrites* ``.grad`` of the upper
    parameters with the hypergradient there and returns the upper loss; nothing else changes, so calls at one x agree.

    Args:
        estimator: whose last ``backward`` defines samples and memory.

    Raises:
        RuntimeError: if there has been no ``backward``.
    """

    def __init__(self, estimator: Estimator) -> None:
        self._estimator = estimator
        self._samples = estimator.last_samples
        self._y, self._memory = clone(estimator.start()), estimator.memory

    def __call__(self) -> Tensor:
        """Overwrite ``.grad`` with the hypergradient at the current x and return f there. Cost: one ``backward``."""
        problem = self._estimator.problem
        evaluation = self._estimator.evaluate(problem.x, self._y, self._memory, self._samples)
        self._estimator._refuse_non_finite(evaluation)
        for p, v in zip(problem.upper_parameters, evaluation.hypergradient, strict=True):
            p.grad = v
        return evaluation.value

    def value(self) -> Tensor:
        """f at the current x, after the lower solver has run from the snapshot. Cost: the lower solve and one value of f."""
        estimator = self._estimator
        x = estimator.problem.x
        result = estimator.solve_lower(x, self._y, self._memory, self._samples.lower)
        return estimator.oracle.upper_value(x, result.y, self._samples.upper)


def silent_zero() -> ValueError:
    """The error for a hypergradient that is zero because no graph leads to x."""
    return ValueError(
        "no path leads from the losses to the upper parameters, so the hypergradient would be zero in silence: are they "
        "detached in the losses, or used only where Unrolled alone sees them (lower_init, hyperparameters of the lower solver)?"
    )


def _detached(value: Any) -> Any:
    return (
        value.detach()
        if isinstance(value, Tensor)
        else [_detached(v) for v in value]
        if isinstance(value, list | tuple)
        else value
    )


def _place_like(state: Any, like: Tensors) -> Any:
    """Copy a nested container of tensors to the devices of y (all on the first, unless the tuple matches y)."""
    if isinstance(state, Tensor):
        return state.to(like[0].device, copy=True) if state.dim() else state.clone()
    if isinstance(state, dict):
        return {k: _place_like(v, like) for k, v in state.items()}
    if isinstance(state, list | tuple):
        matches = len(state) == len(like) and all(
            isinstance(s, Tensor) and s.shape == p.shape for s, p in zip(state, like, strict=True)
        )
        return (
            type(state)(s.to(p.device, copy=True) for s, p in zip(state, like, strict=True))
            if matches
            else type(state)(_place_like(v, like) for v in state)
        )
    return state
