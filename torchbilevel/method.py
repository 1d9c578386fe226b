"""An estimator and an outer rule, put together as one torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchbilevel.certificate import Certificate
from torchbilevel.constraint import constrained
from torchbilevel.decay import decayed
from torchbilevel.estimators.base import Estimator
from torchbilevel.facade import Facade
from torchbilevel.optim.base import Claim, Event, Rule, run_eagerly, step_within
from torchbilevel.pairing import require_pair, require_upper
from torchbilevel.problem import Problem
from torchbilevel.shards import fit
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


@dataclass
class _Since:
    """The backwards since the last step.

    Changed in place: Lightning puts an object of the method's class before the method, which looks up everything behind
    but would keep for itself what ``backward`` assigns.
    """

    task: Any = None  # their lower batch,
    loss: Any = 0.0  # the sum of their losses,
    backwards: int = 0  # and their number


class Method(Facade):
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
        estimator: as given; its ``counts`` holds the oracle calls, its ``decay`` scales the steps of the rule too.
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
        require_pair(problem, estimator, rule)
        if verify is not None:
            if not isinstance(verify, Verify):
                raise TypeError(f"verify must be Verify(step_length=...) or None, got {verify!r}")
            verify.require(problem, rule)
        problem.ranks.require_same("seed", getattr(rule, "seed", 0), problem.x[0].device)
        self.problem, self.estimator, self.verify = problem, estimator, verify
        self.certificate: Certificate | None = None
        estimator.bind(problem)
        estimator.keeps_past = _probes(rule)
        self._steps = 0
        self._since = _Since()
        self._y_anchor: Tensors | None = None  # y at the rule's last perturbation
        self._y_answer: Tensors | None = None  # y at the rule's answer
        super().__init__(rule)

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
        since = self._since
        if since.backwards and self.estimator.warm_start and (callable(task) or not _same(task, since.task)):
            kind = "batch" if self.problem.minimax else "lower batch"
            raise RuntimeError(
                f"backward was called again before step() with another {kind}, and warm_start=True would carry y from "
                "one to the other: for tasks use warm_start=False, for the parts of one data set Batches([...])"
            )
        loss = self.estimator.backward(batch, lower=lower, upper=upper)
        since.task, since.loss, since.backwards = task, since.loss + loss, since.backwards + 1
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
        with decayed(rule, self.estimator.decay, self._steps), constrained(self.problem, rule):
            if _probes(rule):
                self._probing_step()
            elif getattr(rule, "value_test", False):
                step_within(rule, self._value)
            else:
                step_within(rule)
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

    def to(self, device: torch.device | str | int) -> Method:
        """Move both modules, and all that estimator and rule remember, to a device.

        A ``backward`` that no step has followed is forgotten, but for its ``.grad``. Data and sources stay where they
        are. The run goes on with the same numbers up to round-off, but for random numbers (displacements, dropout),
        which differ between kinds of devices.

        Args:
            device: as in ``nn.Module.to``.

        Returns:
            The method itself.
        """
        device = torch.device(device)
        outer, own = deepcopy(self.rule.state_dict()), self._memory()
        self.problem.upper.to(device)
        self.problem.lower.to(device)
        self.rule.load_state_dict(outer)
        self._restore(own)
        return self

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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of upper parameters to the rule.

        Args:
            param_group: as in torch.
        """
        params = param_group["params"]
        if not isinstance(params, Tensor | set):  # torch refuses sets
            params = list(params)
        entries = [params] if isinstance(params, Tensor) else params
        require_upper(self.problem, (entry[1] if isinstance(entry, tuple) else entry for entry in entries))
        self.rule.add_param_group({**param_group, "params": params})

    # --- inside ------------------------------------------------------------------------------------------------------

    def _require_running(self) -> None:
        if self.done:
            raise RuntimeError(
                "the run has ended (method.done): method.result() has the answer; make a new method to go on"
            )

    def _memory(self) -> dict[str, Any]:
        return {
            "steps": self._steps,
            "estimator": self.estimator.state_dict(),
            "y_anchor": self._y_anchor,
            "y_answer": self._y_answer,
        }

    def _restore(self, memory: Mapping[str, Any]) -> None:
        self.estimator.load_state_dict(memory["estimator"])
        self._steps = int(memory["steps"])
        self._y_anchor, self._y_answer = (self._place(memory[name]) for name in ("y_anchor", "y_answer"))
        self._forget()

    def _patch_step_function(self) -> None:
        # torch calls this wherever an optimizer comes into being: built, copied or unpickled.
        run_eagerly(type(self))
        super()._patch_step_function()

    def __getstate__(self) -> dict[str, Any]:
        # The backwards since the last step stay behind: torch does not copy their gradients.
        return {**super().__getstate__(), "_since": _Since()}

    def __repr__(self) -> str:
        rule = repr(self.rule).replace("\n", "\n  ")
        return f"{type(self).__name__}(\n  estimator={self.estimator}\n  rule={rule}\n)"

    def _kind(self) -> str:
        """Whose state fits: the parts, and the shapes of y."""
        estimator, shapes = self.estimator, [tuple(t.shape) for t in self.problem.y]
        parts = (estimator, estimator.lower_solver, self.rule)
        return f"{', '.join(type(part).__name__ for part in parts)} and y of shapes {shapes}"

    def _place(self, y: Tensors | None) -> Tensors | None:
        if y is None:
            return None
        return fit(clone(y), self.problem.y)

    def _forget(self) -> None:
        """Forget the backwards since the last step."""
        vars(self._since).update(vars(_Since()))

    def _value(self) -> Any:
        if not self._since.backwards:
            raise RuntimeError("value_test=True compares values of the upper loss: call backward before step")
        return self._since.loss

    def _probing_step(self) -> None:
        """Hand the rule a probe; should it meet something non-finite, x and ``.grad`` are as before."""
        if self._since.backwards != 1:
            raise RuntimeError(
                f"{type(self.rule).__name__} probes the samples of exactly one backward before each step, got "
                f"{self._since.backwards}: for the parts of one data set use Batches([...])"
            )
        parameters = self.problem.upper_parameters
        before = [(p, p.detach().clone(), p.grad) for p in parameters]
        probe: Callable[[], Any] = self.estimator.probe()
        try:
            step_within(self.rule, probe)
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
        self.certificate = verify.check(self.problem, x, self.estimator.last_draws.pair, grad_tol, seed)
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


def _probes(rule: torch.optim.Optimizer) -> bool:
    return isinstance(rule, torch.optim.LBFGS) or bool(getattr(rule, "needs_probe", False))


def _same(a: Any, b: Any) -> bool:
    """Whether two batches hold the same tensors."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b
