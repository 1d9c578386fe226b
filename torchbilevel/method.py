"""An estimator and an outer rule, put together as one torch optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchbilevel.estimators.base import Estimator
from torchbilevel.optim.base import Claim, Event
from torchbilevel.problem import Problem
from torchbilevel.tensors import Tensors, clone


@dataclass(frozen=True)
class Result:
    """The answer of a run.

    Attributes:
        x: upper variables, in the order of ``problem.upper.parameters()`` (trainable ones), copied.
        y: lower variables that belong to x, copied.
        claim: what the method's own test says of (x, y): ``"running"``, ``"stationary"``, ``"escape test passed"`` or
            ``"verified"``. Only ``"verified"`` rests on a certificate.
        step: the step at which x was reached.
    """

    x: Tensors
    y: Tensors
    claim: Claim
    step: int


class Method(torch.optim.Optimizer):
    """A bilevel or minimax method: an estimator of the hypergradient and a rule that moves x.

    It is a ``torch.optim.Optimizer`` for the upper parameters. ``backward`` stands where ``loss.backward()`` stands and
    moves y; ``step`` lets the rule move x. Parameter groups and state are the rule's own, live, so schedulers and
    everything else that edits them act on the rule.

    Args:
        problem: a ``BilevelProblem`` or ``MinimaxProblem``.
        estimator: ``Implicit``, ``Unrolled`` or ``Danskin``.
        rule: any torch optimizer over parameters of ``problem.upper``; rules from ``torchbilevel.optim`` escape saddles.

    Attributes:
        problem: as given.
        estimator: as given; its ``counts`` holds the oracle calls.
        rule: as given.
        steps: steps done.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if the rule holds a parameter that is not a trainable one of ``problem.upper``, or the estimator cannot
            work on the problem.

    Example:
        >>> class Point(torch.nn.Module):
        ...     def __init__(self, start):
        ...         super().__init__()
        ...         self.value = torch.nn.Parameter(torch.tensor(start))
        >>> from torchbilevel import CG, GD, BilevelProblem, Implicit
        >>> upper, lower = Point(3.0), Point(0.0)
        >>> problem = BilevelProblem(
        ...     upper, lower,
        ...     lower_loss=lambda upper, lower, batch: (lower.value - 2 * upper.value) ** 2,
        ...     upper_loss=lambda upper, lower, batch: (lower.value - 1) ** 2)
        >>> method = Method(problem, Implicit(GD(lr=0.5, steps=1), CG(max_iter=1)), torch.optim.SGD([upper.value], lr=0.125))
        >>> for _ in range(3):
        ...     method.zero_grad()
        ...     loss = method.backward()
        ...     method.step()
        >>> upper.value.item(), loss.item()
        (0.5, 0.0)
    """

    def __init__(self, problem: Problem, estimator: Estimator, rule: torch.optim.Optimizer) -> None:
        if not isinstance(problem, Problem):
            raise TypeError(f"problem must be a BilevelProblem or MinimaxProblem, got {type(problem).__name__}")
        if not isinstance(estimator, Estimator):
            raise TypeError(
                f"estimator must be Implicit(...), Unrolled(...) or Danskin(...), got {type(estimator).__name__}"
            )
        if not isinstance(rule, torch.optim.Optimizer) or isinstance(rule, Method):
            raise TypeError(
                f"rule must be a torch optimizer over problem.upper.parameters(), got {type(rule).__name__}"
            )
        self.problem, self.rule = problem, rule
        self._require_upper(rule.param_groups)
        self.estimator = estimator.bind(problem)
        self.steps = 0
        self._pending: list[Any] = []  # the lower batches of the backwards since the last step
        self._loss: Tensor | None = None
        self._y_anchor: Tensors | None = None
        self._y_answer: Tensors | None = None
        super().__setstate__({})  # the hooks of torch.optim.Optimizer, without groups and state of our own

    # --- one outer iteration -----------------------------------------------------------------------------------------------

    def backward(self, batch: Any = None, *, lower: Any = None, upper: Any = None) -> Tensor:
        """Move y, add the hypergradient to ``.grad`` of the upper parameters, and return the upper loss.

        Several calls before one ``step`` add up their gradients. With ``warm_start=True`` they must be about the same
        lower batch (micro-batches of the upper loss): y would otherwise carry over from one task to the next.

        Args:
            batch: minimax: a batch or a source.
            lower: bilevel: a batch or a source for the lower loss.
            upper: bilevel: a batch or a source for the upper loss.

        Returns:
            f(x, y) at the y reached, detached, 0-d.

        Raises:
            FloatingPointError: if the loss, y or the hypergradient is not finite; nothing has changed then.
            RuntimeError: if the run has ended, or the tasks of several calls would mix their memories.
        """
        self._require_running()
        key = batch if self.problem.minimax else lower
        if self._pending and self.estimator.warm_start and not (self._pending[-1] is key and not callable(key)):
            raise RuntimeError(
                "backward was called again before step() with another lower batch, and warm_start=True would carry y from one to the "
                "other: for tasks use warm_start=False, for micro-batches of one task Batches([...])"
            )
        loss = self.estimator.backward(batch, lower=lower, upper=upper)
        self._pending.append(key)
        self._loss = loss if self._loss is None else self._loss + loss
        return loss

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Let the rule move x.

        Args:
            closure: may call ``zero_grad`` and ``backward`` and return the loss; it is called once, first.

        Returns:
            What the closure returned, or ``None``.

        Raises:
            RuntimeError: if the run has ended.
        """
        self._require_running()
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
        answer, seen = getattr(self.rule, "answer", None), len(self.events)
        gradients = self._project_gradients()
        if isinstance(self.rule, torch.optim.LBFGS) or getattr(self.rule, "needs_probe", False):
            self.rule.step(self.estimator.probe())
        elif getattr(self.rule, "value_test", False):
            self.rule.step(self._value)
        else:
            self.rule.step()
        for p, g in gradients:
            p.grad = g
        if self.problem.constrains_x:
            with torch.no_grad():
                for p, t in zip(self.problem.upper_parameters, self.problem.project_x(self.problem.x), strict=True):
                    p.copy_(t)
        self._follow(answer, self.events[seen:])
        self.steps += 1
        self._pending, self._loss = [], None
        return returned

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the upper parameters, and with them any ``backward`` since the last step."""
        for p in self.problem.upper_parameters:
            if set_to_none or p.grad is None:
                p.grad = None
            else:
                p.grad.zero_()
        self._pending, self._loss = [], None

    def refresh(self) -> None:
        """Bring y up to date with the x just stepped to: one run of the lower solver on the last samples."""
        self.estimator.refresh()

    # --- where the run stands ------------------------------------------------------------------------------------------------

    @property
    def events(self) -> list[Event]:
        """What happened when (perturbations, escapes, tests passed), from the rule; empty for plain rules."""
        return getattr(self.rule, "events", [])

    @property
    def phase(self) -> str:
        """What the rule is doing; ``"descent"`` for plain rules."""
        return getattr(self.rule, "phase", "descent")

    @property
    def done(self) -> bool:
        """Whether the run has ended (a rule with ``stop=True`` whose test passed)."""
        return getattr(self.rule, "done", False)

    def result(self) -> Result:
        """The answer so far: the point with the rule's strongest claim, else the current one."""
        answer = getattr(self.rule, "answer", None)
        if answer is None or self._y_answer is None:
            return Result(clone(self.problem.x), clone(self.problem.y), "running", self.steps)
        moved = dict(zip(self._rule_parameters(), answer.x, strict=True))
        x = tuple(moved.get(p, p).detach().clone() for p in self.problem.upper_parameters)
        return Result(x, clone(self._y_answer), answer.claim, answer.step)

    # --- torch.optim.Optimizer, forwarded to the rule --------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The rule's parameter groups, live."""
        return self.rule.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.rule.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """The rule's state, live."""
        return self.rule.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The rule's defaults."""
        return self.rule.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of upper parameters to the rule.

        Args:
            param_group: as in torch.

        Raises:
            ValueError: if it holds a parameter that is not a trainable one of ``problem.upper``.
        """
        params = param_group["params"]
        self._require_upper([{"params": [params] if isinstance(params, Tensor) else list(params)}])
        self.rule.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The rule's state, the estimator's memory and y, as plain containers of tensors and numbers.

        x is not in it, as in torch: save ``problem.upper.state_dict()`` beside it.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state = self.rule.state_dict()
        state["method"] = {
            "steps": self.steps,
            "estimator": self.estimator.state_dict(),
            "y_anchor": self._y_anchor,
            "y_answer": self._y_answer,
        }
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from where ``state_dict`` was taken; y is written into the lower module.

        Args:
            state_dict: what ``state_dict`` returned; it is not changed.

        Raises:
            ValueError: if it does not come from a method, or does not fit.
        """
        state = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state)
            state = state if changed is None else dict(changed)
        if "method" not in state:
            raise ValueError(
                f"state_dict has no entry 'method' (it has {sorted(state)}); it is not the state of a Method"
            )
        own = state.pop("method")
        self.estimator.load_state_dict(own["estimator"])
        self.rule.load_state_dict(state)
        self.steps = int(own["steps"])
        self._y_anchor, self._y_answer = (None if own[k] is None else clone(own[k]) for k in ("y_anchor", "y_answer"))
        self._pending, self._loss = [], None
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler patches an instance attribute ``step`` bound to this method; a copy must not inherit it.
        return {name: value for name, value in vars(self).items() if name != "step"}

    def __repr__(self) -> str:
        rule = repr(self.rule).replace("\n", "\n  ")
        return f"{type(self).__name__}(\n  estimator={self.estimator}\n  rule={rule}\n)"

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler asks for this before it steps, which makes it the place to refuse.
        raise TypeError(
            "GradScaler scales the loss before backward, and a method's backward starts from its own losses, unscaled: use bfloat16 "
            "autocast inside the losses, without GradScaler"
        )

    # --- inside ----------------------------------------------------------------------------------------------------------------

    def _require_running(self) -> None:
        if self.done:
            raise RuntimeError(
                "the run has ended (method.done): method.result() has the answer; make a new method to go on"
            )

    def _require_upper(self, groups: list[dict[str, Any]]) -> None:
        known = {id(p) for p in self.problem.upper_parameters}
        for i, group in enumerate(groups):
            for j, p in enumerate(group["params"]):
                if id(p) not in known:
                    raise ValueError(
                        f"parameter {j} of the rule's group {i} (shape {tuple(p.shape)}) is not a trainable parameter of problem.upper; "
                        f"build the rule over problem.upper.parameters()"
                    )

    def _rule_parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _value(self) -> Tensor:
        if self._loss is None:
            raise RuntimeError("the rule compares values of the upper loss; call backward before step")
        return self._loss

    def _project_gradients(self) -> list[tuple[Tensor, Tensor | None]]:
        """Where x is constrained and the rule tests stationarity, show it the gradient mapping (x - P(x - lr v)) / lr.

        A gradient step along it is the projected step, and its norm is the right measure of stationarity. Returns
        the gradients to put back.
        """
        if not self.problem.constrains_x or not hasattr(self.rule, "grad_tol"):
            return []
        lrs = {id(p): float(group["lr"]) for group in self.param_groups for p in group["params"]}
        parameters = self.problem.upper_parameters
        moving = [p.grad is not None and lrs.get(id(p), 0.0) > 0 for p in parameters]
        kept = [(p, p.grad) for p, moves in zip(parameters, moving, strict=True) if moves]
        with torch.no_grad():
            trial = self.problem.project_x(
                tuple(
                    p - lrs[id(p)] * p.grad if m and p.grad is not None else p
                    for p, m in zip(parameters, moving, strict=True)
                )
            )
            for p, t, moves in zip(parameters, trial, moving, strict=True):
                if moves:
                    p.grad = (p - t) / lrs[id(p)]
        return kept

    def _follow(self, answer: Any, news: list[Event]) -> None:
        """Keep the y that belongs to the rule's answer, which is always the point of a perturbation."""
        if any(event.kind == "perturbation" for event in news):
            self._y_anchor = clone(self.problem.y)
        if getattr(self.rule, "answer", None) is not answer:
            self._y_answer = self._y_anchor
