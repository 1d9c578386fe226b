"""An estimator and an outer rule, put together as one torch optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchbilevel.certificate import Certificate
from torchbilevel.estimators.base import Estimator
from torchbilevel.optim.base import Claim, Event, Rule
from torchbilevel.problem import Problem
from torchbilevel.tensors import Tensors, clone, mix_seed
from torchbilevel.verify import Verify


@dataclass(frozen=True, eq=False)
class Result:
    """The answer of a run.

    Attributes:
        x: upper variables, in the order of ``problem.upper.parameters()`` (trainable ones), copied.
        y: lower variables that belong to x, copied. While the claim is ``"running"`` they are those of the last
            ``backward``; ``method.refresh()`` first brings them up to date with the last step.
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
        rule: any torch optimizer over parameters of ``problem.upper``; those of ``torchbilevel.optim`` escape saddles.
        verify: how the claim of a rule that tests its answer is checked; see ``Verify``.

    Attributes:
        problem: as given.
        estimator: as given; its ``counts`` holds the oracle calls.
        rule: as given.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if the rule holds a parameter that is not a trainable one of ``problem.upper``, the estimator cannot
            work on the problem, or the rule tests values of Phi that the estimator does not give accurately.

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
        >>> estimator = Implicit(GD(lr=0.5, steps=1), CG(max_iter=1))
        >>> method = Method(problem, estimator, torch.optim.SGD([upper.value], lr=0.125))
        >>> for _ in range(3):
        ...     method.zero_grad()
        ...     loss = method.backward()
        ...     method.step()
        >>> upper.value.item(), loss.item()
        (0.5, 0.0)
    """

    def __init__(
        self, problem: Problem, estimator: Estimator, rule: torch.optim.Optimizer, *, verify: Verify | None = None
    ) -> None:
        require_problem(problem)
        if not isinstance(estimator, Estimator):
            raise TypeError(
                f"estimator must be Implicit(...), Unrolled(...) or Danskin(...), got {type(estimator).__name__}"
            )
        if not isinstance(rule, torch.optim.Optimizer) or isinstance(rule, Method):
            raise TypeError(
                f"rule must be a torch optimizer over problem.upper.parameters(), got {type(rule).__name__}"
            )
        self.problem, self.estimator, self.rule = problem, estimator, rule
        self._require_upper(p for group in rule.param_groups for p in group["params"])
        self._require_values()
        if problem.constrains_x and getattr(rule, "needs_probe", False):
            raise ValueError(
                f"{type(rule).__name__} searches for negative curvature, which needs a free x: use a Perturbed rule or "
                "leave out upper_projection"
            )
        if verify is not None:
            verify.require(problem, rule)
        self.verify = verify
        self.certificate: Certificate | None = None
        estimator.bind(problem)
        self._steps = 0
        self._task: Any = None  # the lower batch of the backwards since the last step,
        self._loss: Any = 0.0  # the sum of their losses,
        self._backwards = 0  # and their number
        self._y_anchor: Tensors | None = None  # y at the rule's last perturbation
        self._y_answer: Tensors | None = None  # y at the rule's answer
        super().__setstate__({})  # the hooks of torch.optim.Optimizer, without groups and state of our own

    # --- one outer iteration -----------------------------------------------------------------------------------------

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
            RuntimeError: if the run has ended, or the tasks of several calls would mix their memories.
        """
        self._require_running()
        task = batch if self.problem.minimax else lower
        if self._backwards and self.estimator.warm_start and (callable(task) or not _same(task, self._task)):
            kind = "batch" if self.problem.minimax else "lower batch"
            raise RuntimeError(
                f"backward was called again before step() with another {kind}, and warm_start=True would carry y from "
                "one to the other: for tasks use warm_start=False, for the parts of one data set Batches([...])"
            )
        loss = self.estimator.backward(batch, lower=lower, upper=upper)
        self._task, self._loss, self._backwards = task, self._loss + loss, self._backwards + 1
        return loss

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the rule move x.

        A rule that probes, as ``torch.optim.LBFGS`` does, evaluates hypergradients itself, on the samples of the last
        ``backward``; what was done to ``.grad`` since then is lost on it.

        Args:
            closure: may call ``zero_grad`` and ``backward`` and return the loss; it is called once, first.

        Returns:
            What the closure returned, or ``None``.
        """
        self._require_running()
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
        rule, step = self.rule, self.steps
        answer, seen = (rule.answer, len(rule.events)) if isinstance(rule, Rule) else (None, 0)
        with self._constrained():
            if isinstance(rule, torch.optim.LBFGS) or getattr(rule, "needs_probe", False):
                self._probing_step()
            elif getattr(rule, "value_test", False):
                rule.step(self._value)
            else:
                rule.step()
        if isinstance(rule, Rule):
            news = rule.events[seen:]
            self._follow(rule, answer, news, step)
            if self.verify is not None and any(event.kind == "escape test passed" for event in news):
                self._check_claim(rule, self.verify)
        self._steps += 1
        self._forget()
        return returned

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the upper parameters, and with them every ``backward`` since the last step.

        Args:
            set_to_none: as in torch.
        """
        for p in self.problem.upper_parameters:
            if set_to_none or p.grad is None:
                p.grad = None
            else:
                p.grad.zero_()
        self._forget()

    def refresh(self) -> None:
        """Bring y up to date with the x just stepped to: one run of the lower solver on the last samples."""
        self.estimator.refresh()

    # --- where the run stands ----------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Steps done; the rules of ``torchbilevel.optim`` do not count a step that can move nothing."""
        return self.rule.steps if isinstance(self.rule, Rule) else self._steps

    @property
    def events(self) -> list[Event]:
        """What happened when (perturbations, escapes, tests passed), from the rule; empty for plain rules."""
        return self.rule.events if isinstance(self.rule, Rule) else []

    @property
    def phase(self) -> str:
        """What the rule is doing; ``"descent"`` for plain rules."""
        return self.rule.phase if isinstance(self.rule, Rule) else "descent"

    @property
    def done(self) -> bool:
        """Whether the run has ended (a rule with ``stop=True`` whose test passed)."""
        return isinstance(self.rule, Rule) and self.rule.done

    def result(self) -> Result:
        """The answer so far: the point with the rule's strongest claim, else the current one."""
        answer = self.rule.answer if isinstance(self.rule, Rule) else None
        if answer is None or self._y_answer is None:
            return Result(clone(self.problem.x), clone(self.problem.y), "running", self.steps)
        # A group added since then has no earlier value.
        moved = dict(zip((p for group in self.param_groups for p in group["params"]), answer.x, strict=False))
        x = clone(moved.get(p, p) for p in self.problem.upper_parameters)
        return Result(x, clone(self._y_answer), answer.claim, answer.step)

    # --- torch.optim.Optimizer, forwarded to the rule ----------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The rule's parameter groups, live."""
        return self.rule.param_groups

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
        """
        params = param_group["params"]
        if not isinstance(params, Tensor | set):  # torch refuses sets
            params = list(params)
        entries = [params] if isinstance(params, Tensor) else params
        self._require_upper(entry[1] if isinstance(entry, tuple) else entry for entry in entries)
        self.rule.add_param_group({**param_group, "params": params})

    def state_dict(self) -> dict[str, Any]:
        """The rule's state, the estimator's memory and y.

        x is not in it, as in torch, nor are buffers: save ``problem.upper.state_dict()`` beside it, and
        ``problem.lower.state_dict()`` where the lower module has buffers.

        Returns:
            The dict of the rule with one more entry, "method": plain containers of tensors, numbers and strings.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state = {
            **self.rule.state_dict(),
            "method": {
                "kind": self._kind(),
                "steps": self._steps,
                "estimator": self.estimator.state_dict(),
                "y_anchor": self._y_anchor,
                "y_answer": self._y_answer,
            },
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
            ValueError: if it does not come from a method of the same parts and shapes; nothing has changed then.
        """
        state = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state)
            state = state if changed is None else dict(changed)
        if "method" not in state:
            raise ValueError(
                f"state_dict must have the entry 'method', got {sorted(state)}: plain torch optimizers and "
                "torch.distributed.checkpoint do not keep it; save method.state_dict() as it is"
            )
        own = state.pop("method")
        if own["kind"] != self._kind():
            raise ValueError(f"state_dict must come from a method with {self._kind()}, got one with {own['kind']}")
        self.rule.load_state_dict(deepcopy(state))  # torch would go on using its tensors
        self.estimator.load_state_dict(own["estimator"])
        self._steps = int(own["steps"])
        self._y_anchor, self._y_answer = (self._place(own[name]) for name in ("y_anchor", "y_answer"))
        self._forget()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # For deepcopy and pickle. Hooks stay behind, as in torch, and so does the ``step`` that a scheduler patches in:
        # both are bound to the original. So do the backwards since the last step, whose gradients torch does not copy.
        # Attributes of the rule that torch leaves behind (LBFGS has some) come along.
        def own(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
            return {k: v for k, v in vars(optimizer).items() if k != "step" and not k.startswith("_optimizer_")}

        return {**own(self), "_task": None, "_loss": 0.0, "_backwards": 0, "rule_attributes": own(self.rule)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        attributes = state.pop("rule_attributes")
        super().__setstate__(state)
        vars(self.rule).update(attributes)

    def __repr__(self) -> str:
        rule = repr(self.rule).replace("\n", "\n  ")
        return f"{type(self).__name__}(\n  estimator={self.estimator}\n  rule={rule}\n)"

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler asks for this before it steps, which makes it the place to refuse.
        raise TypeError(
            "GradScaler scales the loss before backward, and a method's backward starts from its own losses, unscaled: "
            "use bfloat16 autocast inside the losses, without GradScaler"
        )

    # --- inside ------------------------------------------------------------------------------------------------------

    def _require_running(self) -> None:
        if self.done:
            raise RuntimeError(
                "the run has ended (method.done): method.result() has the answer; make a new method to go on"
            )

    def _require_upper(self, params: Iterable[Any]) -> None:
        known = {id(p) for p in self.problem.upper_parameters}
        for i, p in enumerate(params):
            if isinstance(p, Tensor) and id(p) not in known:  # torch refuses what is no tensor
                raise ValueError(
                    "the rule must be over trainable parameters of problem.upper, listed by problem.upper_parameters; "
                    f"got another one of shape {tuple(p.shape)} at position {i}"
                )

    def _require_values(self) -> None:
        """A rule that compares values of f(x, y) needs a y accurate enough for them."""
        if not getattr(self.rule, "value_test", False):
            return
        solver, value_tol = self.estimator.lower_solver, getattr(self.rule, "value_tol", 0.0)
        tol = None if solver is None else solver.tol
        if tol is None or tol >= value_tol:
            raise ValueError(
                "value_test=True compares values of f(x, y), which are biased by the error of y: give the lower solver "
                f"a tol below value_tol={value_tol}, and steps enough to reach it, got tol={tol}"
            )

    def _kind(self) -> str:
        """Whose state fits: the parts, and the shapes of y."""
        estimator, shapes = self.estimator, [tuple(t.shape) for t in self.problem.y]
        parts = (estimator, estimator.lower_solver, self.rule)
        return f"{', '.join(type(part).__name__ for part in parts)} and y of shapes {shapes}"

    def _place(self, y: Tensors | None) -> Tensors | None:
        if y is None:
            return None
        return tuple(t.to(p.device, copy=True) for t, p in zip(y, self.problem.y, strict=True))

    def _forget(self) -> None:
        """Forget the backwards since the last step."""
        self._task, self._loss, self._backwards = None, 0.0, 0

    def _value(self) -> Any:
        if not self._backwards:
            raise RuntimeError("value_test=True compares values of the upper loss: call backward before step")
        return self._loss

    def _probing_step(self) -> None:
        """Hand the rule a probe; should it meet something non-finite, x and ``.grad`` are as before."""
        if self._backwards != 1:
            raise RuntimeError(
                f"{type(self.rule).__name__} probes the samples of exactly one backward before each step, got "
                f"{self._backwards}: for the parts of one data set use Batches([...])"
            )
        parameters = self.problem.upper_parameters
        before = [(p, p.detach().clone(), p.grad) for p in parameters]
        probe: Callable[[], Any] = self.estimator.probe()
        try:
            self.rule.step(probe)
        except Exception:
            with torch.no_grad():
                for p, x, gradient in before:
                    p.copy_(x)
                    p.grad = gradient
            if not isinstance(self.rule, Rule):
                self.rule.state.clear()  # LBFGS broken off within a step cannot go on from its history
            raise

    def _follow(self, rule: Rule, answer: Any, news: list[Event], step: int) -> None:
        """Keep the y that belongs to the rule's answer, which is the point of this step or of the last perturbation."""
        if rule.answer is not None and rule.answer is not answer:
            self._y_answer = clone(self.problem.y) if rule.answer.step == step else self._y_anchor
        if any(event.kind == "perturbation" for event in news):
            self._y_anchor = clone(self.problem.y)
        if rule.done and self._y_answer is not None:
            self.problem.set_y(self._y_answer)

    def _check_claim(self, rule: Rule, verify: Verify) -> None:
        """Certify the rule's answer, and act on the verdict."""
        x = self.result().x
        grad_tol, seed = getattr(rule, "grad_tol", 0.0), mix_seed(rule.seed, rule.steps)
        self.certificate = verify.check(self.problem, x, self.estimator.last_samples, grad_tol, seed)
        self.estimator.counts.include(self.certificate.counts)
        verdict, curvature = self.certificate.verdict, self.certificate.lambda_min
        if verdict == "epsilon-local minimum":
            rule.confirm(curvature)
            return
        rule.withdraw("saddle left" if verdict == "strict saddle" else "claim withdrawn", curvature)
        if verdict == "strict saddle":
            with torch.no_grad():
                for p, t in zip(self.problem.upper_parameters, verify.leave(self.certificate, x), strict=True):
                    p.copy_(t)

    @contextmanager
    def _constrained(self) -> Iterator[None]:
        """Where x is constrained, project what the block has moved.

        A rule that tests stationarity is shown the gradient mapping (x - P(x - lr v)) / lr in the place of v: a
        gradient step along it is the projected step, and its norm is the right measure of stationarity.
        """
        problem = self.problem
        if not problem.constrains_x:
            yield
            return
        rates = {id(p): _rate(group) for group in self.param_groups for p in group["params"]}
        moving = [
            (i, p, p.grad, rates[id(p)])
            for i, p in enumerate(problem.upper_parameters)
            if p.grad is not None and rates.get(id(p))
        ]
        if hasattr(self.rule, "grad_tol"):
            ahead = list(problem.x)
            for i, p, v, rate in moving:
                ahead[i] = p.detach() - rate * v
            trial = problem.project_x(tuple(ahead))
            for i, p, _, rate in moving:
                p.grad = (p.detach() - trial[i]) / rate
        try:
            yield
        finally:
            for _, p, v, _ in moving:
                p.grad = v
        if not self.done:
            projected = problem.project_x(problem.x)
            with torch.no_grad():
                for i, p, _, _ in moving:
                    p.copy_(projected[i])


def require_problem(problem: Any) -> Problem:
    """The argument, which must be a problem.

    Args:
        problem: what was given as one.

    Returns:
        The same object.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"problem must be a BilevelProblem or MinimaxProblem, got {type(problem).__name__}")
    return problem


def _same(a: Any, b: Any) -> bool:
    """Whether two batches hold the same tensors."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b


def _rate(group: dict[str, Any]) -> float:
    lr = float(group.get("lr", 1.0))
    return -lr if group.get("maximize") else lr
