"""Normalised descent, and an escape phase that is pulled back once it has moved too far."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchbilevel.optim.base import Closure, Loss, Result, Rule
from torchbilevel.tensors import Tensors, clone, norm


class Pullback(Rule):
    r"""Normalised gradient descent with a movement test at small gradients.

    With v_t the gradient, over all parameters together, and m the step at which the current escape phase began:

        descent, |v_t| >= epsilon:   x_{t+1} = x_t - (eta / |v_t|) v_t
        descent, |v_t| < epsilon:    m = t, A = 0, x_{t+1} = x_t + xi, xi uniform in the ball of radius r; escape
        escape:                      x_{t+1} = x_t - eta_H v_t, A += eta_H^2 |v_t|^2

    The escape phase ends in one of two ways. If the next step would bring A above (t - m) D, D the mean squared movement allowed,
    that step is shortened so that A = (t - m) D exactly (the pull-back), and descent goes on: x_m was a saddle. If t_thres
    steps pass without that, x_m passes the escape test and becomes ``result()``.

    Args:
        params: as for every torch optimizer.
        lr: eta > 0, the *length* of a descent step, per group (a group moves lr |v_g| / |v|); schedulers may drive it.
        escape_lr: eta_H > 0, an ordinary learning rate, per group; schedulers may drive it.
        radius: r >= 0, length of the displacement in units of x.
        grad_tol: epsilon >= 0; with 0 no escape phase ever begins.
        escape_steps: t_thres >= 1, about log factors times 1 / (eta_H epsilon_H); too few pass saddles.
        mean_movement: D > 0, in units of x squared; in theory lr^2 up to logs.
        stop: end the run at the first test passed: x_m is copied into the parameters, ``done`` is true, and further
            steps raise. Otherwise descent goes on from the current point.
        seed: seed of the displacements.

    Raises:
        ValueError: if an argument is out of its range.

    Cost:
        One gradient per step, one pass over it for its norm, and one copy of x during an escape phase.

    Reference:
        Xian, Huang and Huang, PRGDA, Algorithm 1; Chen, Zhou and Gu, ALT 2022 (Pullback).

    Differs from the paper:
        The phase counter m_s is one number, since the paper reads it with an index that has already moved on. With
        ``stop=False`` (default) the run goes on after a test passed.
    """

    _saved: ClassVar[tuple[str, ...]] = (
        *Rule._saved,
        *("radius", "grad_tol", "escape_steps", "mean_movement", "stop"),
        *("begun", "escaping", "movement", "origin"),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        escape_lr: float | Tensor,
        *,
        radius: float,
        grad_tol: float,
        escape_steps: int,
        mean_movement: float,
        stop: bool = False,
        seed: int = 0,
    ) -> None:
        for name, value in (("lr", lr), ("escape_lr", escape_lr), ("mean_movement", mean_movement)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        for name, value in (("radius", radius), ("grad_tol", grad_tol)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be non-negative and finite, got {value}")
        if isinstance(escape_steps, bool) or not isinstance(escape_steps, int) or escape_steps < 1:
            raise ValueError(f"escape_steps must be a positive integer, got {escape_steps!r}")
        super().__init__(params, {"lr": lr, "escape_lr": escape_lr}, seed=seed)
        self.radius, self.grad_tol, self.mean_movement = float(radius), float(grad_tol), float(mean_movement)
        self.escape_steps, self.stop = escape_steps, bool(stop)
        self.begun = 0  # m
        self.escaping = 0  # steps of the escape phase done since the displacement
        self.movement = 0.0  # A
        self.origin: Tensors = ()  # x_m

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Loss:  # type: ignore[override]
        """Move the parameters once; nothing has moved when a gradient is refused.

        Args:
            closure: torch's own: clears the gradients, computes them and returns the loss. Called exactly once.

        Returns:
            What ``closure`` returned, ``None`` without one.
        """
        loss, _ = self._evaluate(closure)
        points, gradients, size = self._gradients()
        if not points:
            return loss
        if self.phase == "escape":
            self._escape(points, gradients)
        elif size >= self.grad_tol:
            if size > 0:
                self._move(points, gradients, "lr", 1.0 / size)
        else:
            self._record("perturbation", size)
            self.phase, self.begun, self.escaping, self.movement = "escape", self.steps, 0, 0.0
            self.origin = clone(self.parameters())
            if self.answer is None:
                self.answer = Result(self.origin, "stationary", self.steps)
            for p, xi in zip(points, self._noise(points, self.radius), strict=True):
                p.add_(xi)
        self.steps += 1
        return loss

    def _escape(self, points: Tensors, gradients: Tensors) -> None:
        """One step of an escape phase, which it may end."""
        budget = (self.steps - self.begun) * self.mean_movement
        rates = self._rates(points, "escape_lr")
        planned = float(norm([g * rate for g, rate in zip(gradients, rates, strict=True)])) ** 2
        if self.movement + planned > budget:
            # The steps before kept A within the budget of one step less, so the root is of at least D.
            self._move(points, gradients, "escape_lr", math.sqrt((budget - self.movement) / planned))
            self.movement = budget
            self._record("escaped", budget)
            self.phase, self.origin, self.answer = "descent", (), None
            return
        self._move(points, gradients, "escape_lr", 1.0)
        self.movement += planned
        self.escaping += 1
        if self.escaping == self.escape_steps:
            self._record("escape test passed", self.movement)
            self.answer = Result(self.origin, "escape test passed", self.begun)
            self.phase, self.origin = "descent", ()
            if self.stop:
                self._stop(self.answer)

    def _rates(self, points: Tensors, name: str) -> list[Any]:
        """The group option of each point."""
        rates = {id(p): group[name] for group in self.param_groups for p in group["params"]}
        return [rates[id(p)] for p in points]

    def _move(self, points: Tensors, gradients: Tensors, name: str, factor: float) -> None:
        """Go down the gradients by the rate of each group times a factor."""
        for p, g, rate in zip(points, gradients, self._rates(points, name), strict=True):
            p.sub_(g, alpha=float(rate) * factor)
