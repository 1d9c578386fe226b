"""What all hypergradient estimators share: ``backward``, the memory between calls, probes and checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from torchbilevel.counts import Counts
from torchbilevel.decay import Decay
from torchbilevel.draws import BatchSizes, Draw, Draws
from torchbilevel.estimators.evaluation import Evaluation, Memory
from torchbilevel.estimators.lower_gradient import LowerGradient
from torchbilevel.estimators.options import require_options
from torchbilevel.estimators.probe import Probe
from torchbilevel.estimators.recursion import Plain, Recursion
from torchbilevel.estimators.tracking import Estimate, remembered, track
from torchbilevel.estimators.vetting import diverged, failed, vet
from torchbilevel.lower import LowerResult, LowerSolver, Unrollable
from torchbilevel.oracle import Oracle
from torchbilevel.problem import Problem
from torchbilevel.shards import fit
from torchbilevel.tensors import Tensors, as_seed, clone, detach, is_finite, mix_seed

# Numbers of the draws of these two, which no step of an iteration reaches.
_INITIAL, _PROBING = 1 << 20, 1 << 30


class Estimator(ABC):
    """A hypergradient estimator: settings, a problem once bound to one, and its memory.

    ``backward`` stands where ``loss.backward()`` stands. It moves y by the lower solver, *adds* the hypergradient to
    the ``.grad`` of the upper parameters (zero where no loss uses one), and returns the upper loss, detached.

    Args:
        lower_solver: how y moves in every ``backward``; ``None`` leaves y where it is.
        warm_start: whether y (and the lower solver's momentum) goes on from where the last ``backward`` left it;
            otherwise every ``backward`` starts from ``problem.lower_init``, or from the y met when the problem was
            bound.
        recursion: how the estimate is carried from one ``backward`` to the next; ``None`` and ``Plain()``: not at all.
            All others need a warm start and a lower solver whose step is a pure function.
        batch_sizes: of independent draws, one for every use; ``None`` (default) draws one sample of each loss per
            ``backward`` for all uses.
        decay: scales the step of y and the weights of the recursion, and under a ``Method`` the step of x.
        initial_solver: brings y close to y*(x) before the first ``backward``.
        probe_solver: brings y close to y*(x) at trial points, for rules that compare hypergradients there while y goes
            with x; its steps, on samples frozen for all of them, make y answer to the trial point.
        seed: of the random numbers inside the losses (dropout).

    Attributes:
        counts: oracle calls so far.
        keeps_past: whether y and the memory from before the last ``backward``, and its hypergradient, are kept for
            ``probe`` (one copy of y, one of x). A ``Method`` keeps them only for rules that probe.
        last: how the last ``backward`` went (value, steps, residuals, iterations), ``None`` before the first. Tensors
            of the size of x or y are left out: they live on in ``.grad``, in the lower module and in the memory.
        differentiates_steps: whether hyperparameters of the lower solver receive derivatives.

    Raises:
        TypeError: if ``lower_solver`` is no lower solver.
        ValueError: if one of its hyperparameters is a function of the upper module, whose derivative would be lost in
            silence. Only ``Unrolled`` has it.
    """

    differentiates_steps = False

    def __init__(
        self,
        lower_solver: LowerSolver | None,
        *,
        recursion: Recursion | None = None,
        batch_sizes: BatchSizes | None = None,
        decay: Decay | None = None,
        initial_solver: LowerSolver | None = None,
        probe_solver: LowerSolver | None = None,
        warm_start: bool = True,
        seed: int = 0,
    ) -> None:
        require_options(
            type(self).__name__,
            self.differentiates_steps,
            lower_solver,
            recursion,
            batch_sizes,
            decay,
            initial_solver,
            probe_solver,
            warm_start,
        )
        self.lower_solver, self.initial_solver, self.probe_solver = lower_solver, initial_solver, probe_solver
        self.recursion = Plain() if recursion is None else recursion
        self.batch_sizes, self.decay, self.warm_start, self.seed = batch_sizes, decay, warm_start, as_seed(seed)
        self.keeps_past = True
        self.memory = Memory()
        self.last: Evaluation | None = None
        self._problem: Problem | None = None
        self._draws: Draws | None = None
        self._past: tuple[Tensors, Memory, Tensors] | None = None
        self._last_moves: list[int] | None = None
        self._reset: Tensors | None = None

    def __repr__(self) -> str:
        hidden = ("memory", "last", "oracle", "keeps_past")
        shown = {k: v for k, v in vars(self).items() if not k.startswith("_") and k not in hidden}
        shown = {k: v for k, v in shown.items() if v is not None and v != Plain()}
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in shown.items())})"

    # --- what a subclass defines ---

    @abstractmethod
    def evaluate(self, x: Tensors, y: Tensors, memory: Memory, draws: Draws) -> Evaluation:
        """The hypergradient at x when the lower solver starts at y. Changes nothing but the oracle counts.

        Args:
            x: upper variables.
            y: where the lower solver starts.
            memory: as the last ``backward`` left it.
            draws: the samples on which the losses are evaluated.

        Returns:
            The evaluation.
        """

    def refuse(self, problem: Problem) -> None:  # noqa: B027  (by default any problem will do)
        """Raise if the estimator cannot work on the problem, saying why."""

    # --- the user's side ---

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
            problem.ranks.require_same("seed", self.seed, problem.x[0].device)
            if problem.tasks is not None and self.lower_solver is not None:
                self.lower_solver.refuse_tasks(self.warm_start)
            self._problem, self.oracle = problem, Oracle(problem)
            if not self.warm_start and self.lower_solver is not None and self._reset is None:
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
            FloatingPointError: if the loss, y, the linear solve or the hypergradient is not finite. Whatever is raised,
                a warning made an error included, nothing has changed then but the oracle counts.

        Warns:
            LinearSolveWarning: if the linear solve met non-positive curvature or diverged.
        """
        problem = self.problem
        draws = problem.draws(batch, lower, upper, mix_seed(self.seed, self.memory.calls), self.batch_sizes)
        if self._draws is not None:
            self._draws.put_away()
        x, y, memory = problem.x, self.start(draws.seed), self.memory
        if memory.calls == 0 and self.initial_solver is not None:
            initial = self._run(self.initial_solver, x, y, None, draws, first=_INITIAL)
            if not is_finite(y := initial.y):
                raise FloatingPointError(diverged(initial, self.initial_solver))
        evaluation = self.evaluate(x, y, memory, draws)
        self.vet(evaluation)
        problem.commit_buffers(x, evaluation.y, draws.at(0))
        self._past = (clone(y), memory, evaluation.hypergradient) if self.keeps_past else None
        problem.set_y(evaluation.y)
        self.memory = self.advance(evaluation)
        lower, solve = LowerResult((), None, evaluation.lower.steps, evaluation.lower.residual), evaluation.solve
        solve = None if solve is None else replace(solve, z=())
        self.last = Evaluation(evaluation.value, (), None, (), None, lower, solve)
        self._draws, self._last_moves = draws, self.moves()
        for p, v in zip(problem.upper_parameters, evaluation.hypergradient, strict=True):
            if p.grad is None:
                p.grad = v.clone()  # autograd may have given several parameters one tensor
            else:
                p.grad += v
        return evaluation.value

    def probe(self) -> Probe:
        """The hypergradient as a function of x that commits nothing, on the samples of the last ``backward``."""
        return Probe(self)

    def refresh(self) -> None:
        """Bring y up to date with x: one run of the lower solver on the samples of the last ``backward``.

        Raises:
            FloatingPointError: if y is not finite after it; nothing has changed then.
        """
        result = self.solve_lower(self.problem.x, self.start(self.last_draws.seed), self.memory, self.last_draws)
        if not is_finite(result.y):
            raise FloatingPointError(diverged(result, self.lower_solver))
        self.problem.set_y(result.y)
        self._last_moves = None
        if self.warm_start:
            self.memory = replace(self.memory, solver_state=result.state)

    @property
    def last_value(self) -> Tensor | None:
        """The upper loss of the last ``backward``, ``None`` if x or y has moved since."""
        return None if self.last is None or self._last_moves != self.moves() else self.last.value

    def moves(self) -> list[int]:
        """Counts of in-place changes of the upper parameters, which tell whether x has moved."""
        return [p._version for p in self.problem.upper_parameters]

    @property
    def last_draws(self) -> Draws:
        """The samples of the last ``backward``."""
        if self._draws is None:
            raise RuntimeError(
                "there has been no backward yet (or none since the checkpoint was loaded); call backward first"
            )
        return self._draws

    @property
    def past(self) -> tuple[Tensors, Memory, Tensors]:
        """Where the lower solver started in the last ``backward``, the memory before it, and its hypergradient."""
        self.last_draws  # noqa: B018  (raises where there is none)
        if self._past is None:
            raise RuntimeError(
                "the state before the last backward was not kept; set estimator.keeps_past = True before backward"
            )
        return self._past

    def state_dict(self) -> dict[str, Any]:
        """The memory, y, its reset value and the oracle counts, as plain containers of tensors and numbers."""
        return {
            "calls": self.memory.calls,
            "z": self.memory.z,
            # In tuples, which torch.distributed.checkpoint loads whole: their entries are others before the first call.
            "solver_state": (self.memory.solver_state,),
            "tracked": tuple(self.memory.tracked.items()),
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
        y = self.problem.y
        shapes, expected = [tuple(t.shape) for t in state["y"]], [tuple(t.shape) for t in y]
        if shapes != expected:
            raise ValueError(f"the checkpoint's lower variables have shapes {shapes}, the lower module's {expected}")

        def place(tensors: Tensors | None) -> Tensors | None:
            return None if tensors is None else self.place(tensors)

        (solver_state,) = state["solver_state"]
        if self.lower_solver is not None:
            solver_state = self.lower_solver.place(solver_state, y)
        tracked = {name: self.place(tensors) for name, tensors in state["tracked"]}
        memory = Memory(int(state["calls"]), place(state["z"]), solver_state, tracked)
        reset = place(state["reset"])
        self.counts.load_state_dict(state["counts"])
        self.problem.set_y(state["y"])
        self.memory, self._reset = memory, self._reset if reset is None else reset
        self.last = self._draws = self._past = None

    # --- for subclasses ---

    def place(self, tensors: Tensors) -> Tensors:
        """Tensors of a checkpoint on the devices of the variables that have their shapes, else on that of y."""
        x, y = self.problem.x, self.problem.y
        for like in (x, y, (*x, *y)):
            if [t.shape for t in like] == [t.shape for t in tensors]:
                return fit(clone(tensors), like)
        return tuple(t.to(y[0].device, copy=True) for t in tensors)

    def start(self, seed: int) -> Tensors:
        """Where the next lower solve starts, detached; the seed is that of random numbers in ``lower_init``."""
        problem = self.problem
        if self.warm_start and self.memory.calls > 0:
            return problem.y
        initial = problem.start(problem.x, seed)
        if initial is not None:
            return detach(initial)
        return problem.y if self._reset is None else self._reset

    def solve_lower(self, x: Tensors, y: Tensors, memory: Memory, draws: Draws) -> LowerResult:
        """Run the lower solver from y, without a graph; every step on a draw of its own."""
        if self.lower_solver is None:
            return LowerResult(y, None, 0, None)
        solver = self.lower_solver
        if self.decay is not None:
            assert isinstance(solver, Unrollable)
            solver = solver.scaled(self.decay.lower(memory.calls))
        return self._run(solver, x, y, memory.solver_state if self.warm_start else None, draws)

    def value(self, x: Tensors, y: Tensors, memory: Memory, draws: Draws) -> tuple[Tensor, Tensors]:
        """F alone at x when the lower solver starts at y, and the y reached. Cost: the lower solve and one value."""
        if self.follows:
            evaluation = self.evaluate(x, y, memory, draws)
            return evaluation.value, evaluation.y
        y = self.solve_lower(x, y, memory, draws).y
        return self.oracle.upper_value(x, y, draws.at(0).upper), y

    def approach(self, x: Tensors, y: Tensors, draws: Draws) -> Tensors:
        """Y brought close to y*(x) at a trial point by ``probe_solver``, where there is one."""
        return y if self.probe_solver is None else self._run(self.probe_solver, x, y, None, draws, first=_PROBING).y

    def _run(
        self, solver: LowerSolver, x: Tensors, y: Tensors, state: Any, draws: Draws, first: int = 0
    ) -> LowerResult:
        solver = solver.bind(lambda function: self.problem.call_upper(function, x))
        gradient = LowerGradient(self.oracle, x, draws, first)
        return solver.run(gradient, y, state, self.problem.project_y, self.problem.tasks)

    def follow(self, x: Tensors, y: Tensors, memory: Memory, draws: Draws) -> tuple[Estimate, LowerResult]:
        """Carry the estimates of the recursion to x and move y; the subclass observes and finishes."""
        decay, t, solver = self.decay, memory.calls, self.lower_solver
        assert isinstance(solver, Unrollable)
        factors = (1.0, 1.0) if decay is None else (decay.upper(max(t - 1, 0)), decay.lower(t))

        def observe(x: Tensors, y: Tensors, draw: Draw) -> Estimate:
            return self.observe(x, y, memory, draw)

        return track(self.recursion, solver, x, y, memory, draws, factors, observe, self.problem.project_y)

    def observe(self, x: Tensors, y: Tensors, memory: Memory, draw: Draw) -> Estimate:
        """What the recursion tracks, at a point on a sample.

        Args:
            x: upper variables.
            y: lower variables, which stay where they are.
            memory: as the last ``backward`` left it.
            draw: the sample.

        Returns:
            The quantities.
        """
        raise NotImplementedError

    def remember(self, estimate: Estimate) -> Mapping[str, Tensors]:
        """What the memory keeps of an estimate: nothing where none is carried on."""
        return {} if isinstance(self.recursion, Plain) else remembered(estimate)

    @property
    def follows(self) -> bool:
        """Whether estimates are carried along, or y moves with x."""
        return not isinstance(self.recursion, Plain) or self.recursion.simultaneous

    @property
    def answers(self) -> bool:
        """Whether y moves with a trial point within one evaluation; where it stays, Phi is not seen to curve."""
        moves = self.lower_solver is not None and not (self.follows and self.recursion.selects == "next")
        return moves or self.probe_solver is not None

    def vet(self, evaluation: Evaluation) -> None:
        """Refuse an evaluation that is not finite, and warn of one whose linear solve failed."""
        vet(evaluation, self.lower_solver)

    def advance(self, evaluation: Evaluation) -> Memory:
        """The memory after a ``backward`` that ended in this evaluation."""
        calls = self.memory.calls + 1
        if not self.warm_start:
            return Memory(calls)
        z = None if failed(evaluation.solve) else evaluation.z
        return Memory(calls, z, evaluation.lower.state, evaluation.tracked)
