"""Noise at small gradients, around any torch optimizer."""

from __future__ import annotations

import inspect
import math
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torchbilevel.optim.base import Closure, Loss, Result, Rule, step_within
from torchbilevel.tensors import Tensors, clone


class Perturbed(Rule):
    r"""Any torch optimizer, with a random displacement whenever the gradient is small.

    With v_t the gradient and m the step of the last displacement, over all parameters together:

        x_{t+1} = x_t + xi_t,  xi_t uniform in the ball of radius r  if |v_t| <= epsilon and t - m > t_thres
        x_{t+1} = the step of ``optimizer``                          otherwise

    The first displacement may come at step 0. It is the whole step: ``optimizer`` is not called, and its
    state (momentum, moments) stays as it was. With ``value_test``, at t = m + t_thres the loss is compared
    with the loss at the point x_m before the displacement. Unless it has dropped by ``value_tol``, the
    attempt to escape from x_m has failed: ``result()`` is x_m with the claim "escape test passed", until a
    later attempt succeeds. Without it, ``result()`` is x_m with the claim "stationary" in the t_thres steps
    that follow, and makes no claim otherwise.

    ``param_groups``, ``state`` and ``defaults`` are those of ``optimizer``, always: a scheduler attached to
    either drives both, and hooks on checkpoints belong to it. A hook on steps runs when the one that it was
    registered with steps.

    Args:
        optimizer: a ``torch.optim.Optimizer`` whose ``step`` needs no closure.
        radius: r >= 0, length in units of x. With 0 no step is displaced: the run is that of ``optimizer``,
            bitwise.
        grad_tol: epsilon >= 0, compared with the norm as it is. A paper that reserves a part of its epsilon
            for the error of v passes the rest.
        escape_steps: t_thres >= 1 (>= 2 with ``value_test``), default 50: steps that follow a displacement
            before the next may come.
        value_test: compare losses at the end of each such window. ``step`` then needs a closure.
        value_tol: f_thres > 0, the drop that counts as an escape; required with ``value_test``.
        stop: end the run at the first test passed: x_m is copied into the parameters, ``done`` is true, and
            further steps raise. Needs ``value_test``.
        seed: seed of the displacements.

    Raises:
        TypeError: if ``optimizer`` is not a torch optimizer.
        ValueError: if an argument is out of its range, or ``optimizer`` needs a closure or is itself a
            ``Rule``.

    Cost:
        One gradient per step, one pass over it for its norm, and one copy of x after a displacement; with
        ``value_test`` up to two.

    Reference:
        The timer: Jin, Netrapalli, Ge, Kakade, Jordan, On Nonconvex Optimization for Machine Learning, JACM
        2021, Algorithm 1 (perturbed gradient descent). The value test: Jin, Ge, Netrapalli, Kakade, Jordan,
        How to Escape Saddle Points Efficiently, ICML 2017, Algorithm 2.

    Differs from the paper:
        The papers wrap gradient descent, and for another ``optimizer`` nothing is proved. The displacement is
        the whole step, where the papers add a gradient step to it: the loss is tested one gradient step
        earlier. ``radius`` is the length of the displacement of x, in JACM 2021 it is multiplied by the
        learning rate.
    """

    _saved: ClassVar[tuple[str, ...]] = (
        *Rule._saved,
        *("radius", "grad_tol", "escape_steps", "value_test", "value_tol", "stop"),
        *("last_noise", "origin", "origin_value"),
    )

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        radius: float,
        grad_tol: float,
        escape_steps: int = 50,
        value_test: bool = False,
        value_tol: float | None = None,
        stop: bool = False,
        seed: int = 0,
    ) -> None:
        _check_optimizer(optimizer)
        if not 0 <= radius < math.inf:
            raise ValueError(f"radius must be non-negative and finite, got {radius}")
        if not grad_tol >= 0:
            raise ValueError(f"grad_tol must be non-negative, got {grad_tol}")
        if isinstance(escape_steps, bool) or not isinstance(escape_steps, int) or escape_steps < 1:
            raise ValueError(f"escape_steps must be a positive integer, got {escape_steps!r}")
        if value_test and escape_steps < 2:
            raise ValueError(f"escape_steps must be at least 2 with value_test=True, got {escape_steps}")
        if value_test and (value_tol is None or not 0 < value_tol < math.inf):
            raise ValueError(f"value_tol must be positive and finite with value_test=True, got {value_tol}")
        if not value_test and value_tol is not None:
            raise ValueError(f"value_tol must be None without value_test=True, got {value_tol}")
        if stop and not value_test:
            raise ValueError("stop must be False without value_test=True, got True")
        if value_test and len({bool(group.get("maximize")) for group in optimizer.param_groups}) > 1:
            raise ValueError("maximize must be the same in all groups with value_test=True, got both")
        self.optimizer = optimizer
        groups, state = optimizer.param_groups, optimizer.state
        try:
            super().__init__(groups, optimizer.defaults, seed=seed)
        finally:  # torch's constructor empties both and adds the groups anew, through the properties below
            optimizer.param_groups, optimizer.state = groups, state
        self.radius = float(radius)
        self.grad_tol = float(grad_tol)
        self.escape_steps = escape_steps
        self.value_test = bool(value_test)
        self.value_tol = float(value_tol or 0.0)
        self.stop = bool(stop)
        self.last_noise = -escape_steps - 1
        self.origin: Tensors = ()
        self.origin_value = 0.0

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Loss:  # type: ignore[override]
        """Move the parameters once; nothing has moved when the loss or a gradient is refused.

        Args:
            closure: torch's own: clears the gradients, computes them, returns the loss. Called exactly once.

        Returns:
            What ``closure`` returned, ``None`` without one.

        Raises:
            ValueError: if ``value_test`` has no loss to compare.
        """
        loss, value = self._evaluate(closure)
        points, _, size = self._gradients()
        if not points:
            step_within(self.optimizer)
            return loss
        elapsed = self.steps - self.last_noise
        if self.value_test:
            if value is None:
                raise ValueError("value_test=True compares losses: pass step() a closure that returns the loss")
            if self.origin and elapsed >= self.escape_steps:
                self._test(value)
                if self.done:
                    return loss
        elif elapsed > self.escape_steps:
            self.phase, self.answer = "descent", None
        if self.radius > 0 and size <= self.grad_tol and elapsed > self.escape_steps:
            self._perturb(points, size, value)
        else:
            step_within(self.optimizer)
        self.steps += 1
        return loss

    def _perturb(self, points: Tensors, size: float, value: float | None) -> None:
        """Displace the points, and remember where from."""
        self._record("perturbation", size)
        here = clone(self.parameters())
        if self.answer is None:
            self.answer = Result(here, "stationary", self.steps)
        if self.value_test and value is not None:
            self.origin, self.origin_value = here, value
        self.phase, self.last_noise = "escape", self.steps
        for p, xi in zip(points, self._noise(points, self.radius), strict=True):
            p.add_(xi)

    def _test(self, value: float) -> None:
        """Close the window: has the loss dropped since the displacement?"""
        change = value - self.origin_value
        if self.param_groups[0].get("maximize"):
            change = -change
        origin, self.origin, self.phase = self.origin, (), "descent"
        if change <= -self.value_tol:
            self._record("escaped", change)
            self.answer = None
            return
        self._record("escape test passed", change)
        self.answer = Result(origin, "escape test passed", self.last_noise)
        if self.stop:
            self._stop(self.answer)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the inner optimizer."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The state of the inner optimizer."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer."""
        self.optimizer.add_param_group(param_group)

    def _name(self) -> str:
        return f"{type(self).__name__}({type(self.optimizer).__name__})"

    def state_dict(self) -> dict[str, Any]:
        """The state of the inner optimizer, plus the entry "rule" with the memory of the run."""
        return {**self.optimizer.state_dict(), "rule": self._memory()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, into the inner optimizer too."""
        memory = self._find_memory(state_dict)
        self.optimizer.load_state_dict(deepcopy({k: v for k, v in state_dict.items() if k != "rule"}))
        self._restore(memory)

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """Register the hook with the inner optimizer."""
        return self.optimizer.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """Register the hook with the inner optimizer."""
        return self.optimizer.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """Register the hook with the inner optimizer."""
        return self.optimizer.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """Register the hook with the inner optimizer."""
        return self.optimizer.register_load_state_dict_post_hook(hook, prepend)


def _check_optimizer(optimizer: Optimizer) -> None:
    """Refuse what ``Perturbed`` cannot wrap."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {name}")
    if isinstance(optimizer, Rule):
        raise ValueError(f"optimizer must be a plain torch optimizer, got {name}, which is itself a rule")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(f"optimizer must step without a closure, got {name}, which cannot")
