"""How the step sizes of a method decay together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch.optim import Optimizer


@dataclass(frozen=True)
class Decay:
    """The factors s_t = (offset / (offset + t))^power by which step t scales the step sizes of a method; s_0 = 1.

    The step of x (``lr`` of the rule, and what a scheduler made of it) is scaled by s_t, that of y by the factor with
    ``lower_power``; the weights of a STORM recursion are scaled by s_{t-1}^2. A paper's eta_t = c / (m + t)^(1/3) is
    ``Decay(offset=m)`` with learning rates multiplied by c / m^(1/3) and weights by the square of that. For y, t counts
    the calls of ``backward``, which are as many as steps unless several of them add up before a step.

    Args:
        power: of the step of x; 1/3 by default.
        offset: m, positive; the step at which s has fallen to 2^-power.
        lower_power: of the step of y; by default ``power``.

    Raises:
        TypeError: if an argument is no number.
        ValueError: if ``offset`` is not positive or a power negative.

    >>> Decay(power=0.5, offset=1).upper(3), Decay(power=0.6, offset=1, lower_power=0.5).lower(3)
    (0.5, 0.5)
    """

    power: float = 1 / 3
    offset: float = 1.0
    lower_power: float | None = None

    def __post_init__(self) -> None:
        for name in ("power", "offset", "lower_power"):
            value = getattr(self, name)
            if value is None and name == "lower_power":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not 0 <= value < math.inf or (name == "offset" and value == 0):
                what = "positive" if name == "offset" else "non-negative"
                raise ValueError(f"{name} must be {what} and finite, got {value}")

    def upper(self, t: int) -> float:
        """The factor of the step of x at step t."""
        return float((self.offset / (self.offset + t)) ** self.power)

    def lower(self, t: int) -> float:
        """The factor of the step of y at step t."""
        power = self.power if self.lower_power is None else self.lower_power
        return float((self.offset / (self.offset + t)) ** power)


@contextmanager
def decayed(rule: Optimizer, decay: Decay | None, t: int) -> Iterator[None]:
    """Scale the step sizes in a rule's groups for the duration of a block.

    Args:
        rule: its class attribute ``decayed`` names the group options to scale, by default ``lr`` and ``escape_lr``.
        decay: gives the factor; ``None`` for none.
        t: number of the step.

    Yields:
        Nothing.
    """
    if decay is None:
        yield
        return
    names, factor = getattr(rule, "decayed", ("lr", "escape_lr")), decay.upper(t)
    kept = [(group, name, group[name]) for group in rule.param_groups for name in names if name in group]
    for group, name, value in kept:
        group[name] = value * factor
    try:
        yield
    finally:
        for group, name, value in kept:
            group[name] = value
