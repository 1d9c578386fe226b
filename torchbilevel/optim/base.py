"""What the outer rules share: the gradients of a step, noise, events, the end of a run, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from torchbilevel.shards import fit
from torchbilevel.tensors import Tensors, as_seed, ball, clone, is_finite, mix_seed, norm

Claim = Literal["running", "stationary", "escape test passed", "verified"]
Loss = Tensor | float | None
Closure = Callable[[], Loss]


@dataclass(frozen=True)
class Event:
    """Something that happened in a run.

    Args:
        step: number of steps done before it.
        kind: "perturbation", "escape test passed" or "escaped"; a rule may add others.
        value: the number it was decided by: the gradient norm at a perturbation, the change of the loss at a
            test.
    """

    step: int
    kind: str
    value: float


@dataclass(frozen=True, eq=False)
class Result:
    """The answer of a run, with what is claimed about it.

    Args:
        x: one detached copy per parameter, in the order of the groups.
        claim: "running": nothing, ``x`` is the current point; "stationary": the gradient at ``x`` was within
            the tolerance; "escape test passed": besides, an attempt to escape from ``x`` failed; "verified":
            besides, the smallest eigenvalue was computed.
        step: number of steps after which ``x`` was reached.
    """

    x: Tensors
    claim: Claim
    step: int


class Rule(torch.optim.Optimizer):
    """Base class of the outer rules: a ``torch.optim.Optimizer`` with a memory of its run.

    A subclass writes ``__init__`` and ``step``, and names in ``_saved`` every attribute that decides what the
    next steps do: its settings as well as its memory. Those attributes hold numbers, strings, or tuples with
    one tensor per parameter. They are the entry "rule" of ``state_dict()``; as in torch, settings loaded
    replace those given to the constructor.

    Parameters without a gradient, and groups whose ``lr`` is 0, are not moved, receive no noise, and do not
    count in the norm of the gradient, which is over all others together.

    Args:
        params: as for every torch optimizer.
        defaults: default options of the groups.
        seed: seed of the noise. Draw k of step t is a function of (seed, t, k) alone; the global random state
            is neither read nor changed.

    Attributes:
        steps: number of steps done. A step that may move no parameter is not counted.
        phase: what the rule is doing: "descent" or "escape".
        events: what happened when, as a list of ``Event``.
        done: whether the run has ended; a further ``step`` raises.
        answer: the point with the strongest claim so far, ``None`` if there is no claim.
    """

    _saved: ClassVar[tuple[str, ...]] = ("seed", "steps", "phase", "events", "done", "answer")

    def __init__(self, params: ParamsT, defaults: dict[str, Any], *, seed: int = 0) -> None:
        seed = as_seed(seed)
        super().__init__(params, defaults)
        self.seed = seed
        self.steps = 0
        self.phase = "descent"
        self.events: list[Event] = []
        self.done = False
        self.answer: Result | None = None

    def _patch_step_function(self) -> None:
        # torch calls this wherever an optimizer comes into being: built, copied or unpickled.
        run_eagerly(type(self))
        super()._patch_step_function()

    def parameters(self) -> Tensors:
        """All parameters, in the order of the groups."""
        return tuple(p for group in self.param_groups for p in group["params"])

    def result(self) -> Result:
        """The point with the strongest claim so far, else the current point; always a copy."""
        if self.answer is None:
            return Result(clone(self.parameters()), "running", self.steps)
        later = self.parameters()[len(self.answer.x) :]  # of groups added since then, which have no earlier value
        return replace(self.answer, x=clone((*self.answer.x, *later)))

    def confirm(self, value: float) -> None:
        """Raise the claim of the answer to "verified": the smallest eigenvalue there, ``value``, is known."""
        if self.answer is None:
            raise RuntimeError("there is no answer to confirm")
        self.answer = replace(self.answer, claim="verified")
        self._record("verified", value)

    def withdraw(self, kind: str, value: float) -> None:
        """Take back an answer that was found wrong, and with it the end of the run; ``kind`` goes on record."""
        self.answer, self.done = None, False
        self._record(kind, value)

    # What a subclass builds its step from.

    def _evaluate(self, closure: Closure | None) -> tuple[Loss, float | None]:
        """What the closure returns, evaluated once with gradients enabled, and its value as a number."""
        if self.done:
            claim = "" if self.answer is None else f" with the claim {self.answer.claim!r}"
            raise RuntimeError(f"{type(self).__name__} has stopped{claim}; result() holds the answer")
        with torch.enable_grad():
            loss = None if closure is None else closure()
        if loss is None:
            return None, None
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss must be finite, got {value}")
        return loss, value

    def _gradients(self) -> tuple[Tensors, Tensors, float]:
        """Find what this step may move; gradients of resting groups are checked too.

        Returns:
            The parameters, their gradients, and the norm over all those gradients together.

        Raises:
            ValueError: if a gradient is sparse or complex.
            FloatingPointError: if a gradient is not finite.
        """
        points: list[Tensor] = []
        gradients: list[Tensor] = []
        resting: list[Tensor] = []
        for group in self.param_groups:
            rests = group.get("lr", 1.0) == 0
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.layout != torch.strided or p.grad.is_complex():
                    kind = "complex" if p.grad.is_complex() else "sparse"
                    raise ValueError(f"gradients must be dense and real, got a {kind} one for {self._describe(p)}")
                if rests:
                    resting.append(p.grad)
                else:
                    points.append(p)
                    gradients.append(p.grad)
        size = float(norm(gradients)) if gradients else 0.0
        # A finite norm has seen finite entries only; an infinite one may come from squares that overflow.
        if not math.isfinite(size) or (resting and not is_finite(resting)):
            for p in self.parameters():
                if p.grad is not None and not is_finite((p.grad,)):
                    raise FloatingPointError(f"gradients must be finite, got nan or inf for {self._describe(p)}")
        return tuple(points), tuple(gradients), size

    def _describe(self, parameter: Tensor) -> str:
        """How an error names a parameter."""
        for i, group in enumerate(self.param_groups):
            for j, p in enumerate(group["params"]):
                if p is parameter:
                    name = f" {group['param_names'][j]!r}" if "param_names" in group else f" {j}"
                    return f"parameter{name} of group {i}, of shape {tuple(p.shape)}"
        raise KeyError("not a parameter of this optimizer")

    def _noise(self, like: Tensors, radius: float, draw: int = 0) -> Tensors:
        """Uniform draw number ``draw`` of this step from the ball over all tensors together."""
        return ball(like, radius, mix_seed(self.seed, self.steps, draw))

    def _record(self, kind: str, value: float) -> None:
        """Append an event of this step."""
        self.events.append(Event(self.steps, kind, value))

    @torch.no_grad()
    def _stop(self, answer: Result) -> None:
        """End the run at an earlier point: it becomes the answer, and the value of the parameters."""
        self.answer, self.done = answer, True
        # A group added since then has no earlier value to return to.
        for p, x in zip(self.parameters(), answer.x, strict=False):
            p.copy_(x)

    # Checkpoints and copies. torch would keep state and param_groups alone.

    def _name(self) -> str:
        """Who may load a checkpoint of this rule."""
        return type(self).__name__

    def _memory(self) -> dict[str, Any]:
        """The entry "rule" of the state dict: plain containers of tensors, numbers and strings."""
        memory = {name: getattr(self, name) for name in self._saved}
        # What grows or may be absent is in tuples, which torch.distributed.checkpoint loads whole; of lists and dicts
        # it loads only the entries that the optimizer has already.
        memory["events"] = tuple(dict(vars(event)) for event in self.events)
        memory["answer"] = None if self.answer is None else tuple(vars(self.answer).items())
        return {"name": self._name(), **memory}

    def _find_memory(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The entry "rule" of a state dict of the same kind of rule."""
        if "rule" not in state_dict:
            raise ValueError(
                f"state_dict must have the entry 'rule' of {self._name()}, got {sorted(state_dict)}; "
                "torch.distributed.checkpoint and plain torch optimizers do not keep it"
            )
        memory = state_dict["rule"]
        if not isinstance(memory, dict) or memory.get("name") != self._name():
            other = memory.get("name") if isinstance(memory, dict) else memory
            raise ValueError(f"state_dict must come from {self._name()}, got one of {other}")
        if missing := [name for name in self._saved if name not in memory]:
            raise ValueError(f"state_dict['rule'] must hold {', '.join(self._saved)}; {', '.join(missing)} missing")
        return memory

    def _restore(self, memory: dict[str, Any]) -> None:
        """Take over a copy of what ``_find_memory`` returned."""
        memory = deepcopy(memory)
        parameters = self.parameters()

        def place(x: Tensors) -> Tensors:
            return fit(x, parameters[: len(x)])

        for name in self._saved:
            if name not in ("events", "answer"):
                setattr(self, name, place(memory[name]) if isinstance(memory[name], tuple) else memory[name])
        self.events = [Event(**event) for event in memory["events"]]
        answer = memory["answer"]
        self.answer = None if answer is None else Result(**{**dict(answer), "x": place(dict(answer)["x"])})

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer as torch has it, plus the entry "rule" with the memory of the run."""
        return {**super().state_dict(), "rule": self._memory()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; the run then goes on bit by bit as the saved one would have.

        Args:
            state_dict: from the same kind of rule over the same groups, else it is refused before anything
                has changed. It is not changed itself.
        """
        memory = self._find_memory(state_dict)
        # A copy, because torch takes over the tensors themselves, and later steps would change them.
        super().load_state_dict(deepcopy(state_dict))
        self._restore(memory)

    def __getstate__(self) -> dict[str, Any]:
        # For deepcopy and pickle. Hooks stay behind, as in torch, and so does the ``step`` that a scheduler
        # patches in: both are bound to the original, and would move it.
        return {k: v for k, v in vars(self).items() if k != "step" and not k.startswith("_optimizer_")}


def run_eagerly(kind: type[torch.optim.Optimizer]) -> None:
    """Keep ``torch.compile`` out of the steps of a class; where they are compiled with a loop, the graph breaks there.

    Dynamo drops what a traced step writes to attributes of an optimizer (which step it is, when x was last displaced):
    the run would be another one. Losses that are compiled themselves stay so.

    Args:
        kind: the class.
    """
    if not hasattr(kind.step, "runs_eagerly"):
        kind.step = torch.compiler.disable(kind.step)  # type: ignore[method-assign, no-untyped-call]
        kind.step.runs_eagerly = True  # type: ignore[attr-defined]


def step_within(optimizer: torch.optim.Optimizer, *args: Any) -> Any:
    """Step an optimizer as a part of the step of another.

    Hooks on the steps of all optimizers (``torch.optim.optimizer.register_optimizer_step_post_hook``) are called for
    the step of the whole, and once; torch's profiler, for one, counts steps by such a hook.

    Args:
        optimizer: the part.
        *args: of its step.

    Returns:
        What its step returned.
    """
    step = type(optimizer).step
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks or "step" in vars(optimizer)
    if (
        getattr(step, "hooked", False) and not own
    ):  # beneath what torch wraps it in, which takes longer than a small step
        return step.__wrapped__(optimizer, *args)  # type: ignore[attr-defined]
    hooks: tuple[dict[int, Any], ...] = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)
    kept = [dict(table) for table in hooks]
    for table in hooks:
        table.clear()
    try:
        return optimizer.step(*args)
    finally:
        for table, entries in zip(hooks, kept, strict=True):
            table.update(entries)
