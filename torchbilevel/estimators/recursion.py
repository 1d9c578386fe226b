"""Recursions: how an estimate is carried from one point to the next on few samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Tracked = Literal["hypergradient", "gradients"]


class Recursion:
    """What an estimate v_t of a quantity e along points p_t is made of.

    All are cases of v_t = e(p_t; S) + (1 - a) (v_{t-1} - e(p_{t-1}; S)), both ends on the same sample; u_t follows g_y
    likewise and moves y.

    Attributes:
        tracks: ``"hypergradient"``: e is the finished hypergradient; ``"gradients"``: e are f_x and f_y, and the
            hypergradient is finished from their estimates. For minimax problems the two are one.
        selects: which y a ``backward`` ends at: ``"next"`` after the last move, ``"last"`` that of the last estimate,
            ``"argmin"`` that of the estimate after which y moved least.
        anchors: when the estimate starts anew, every ``period`` calls: ``"before"`` y moves, or ``"after"``.
        period: calls from one anchor to the next; ``None`` for the first call alone.
    """

    tracks: str = "hypergradient"
    selects: str = "next"
    anchors: str = "before"
    period: int | None = None

    def weights(self, factor: float) -> tuple[float, float]:
        """The weights a of v and b of u, given the factor by which the last step of x was scaled."""
        raise NotImplementedError

    def is_anchor(self, t: int) -> bool:
        """Whether the estimate starts anew at call t."""
        return t == 0 or (self.period is not None and t % self.period == 0)


@dataclass(frozen=True)
class Plain(Recursion):
    """No recursion: v_t = e(p_t; S).

    Args:
        simultaneous: y moves by one step with x, both from (x_t, y_t); by default it moves before x.
    """

    simultaneous: bool = False

    def weights(self, factor: float) -> tuple[float, float]:
        """Both are one."""
        return 1.0, 1.0


@dataclass(frozen=True)
class Storm(Recursion):
    """STORM: v_t = e(p_t; S) + (1 - a_t) (v_{t-1} - e(p_{t-1}; S)), p_t = (x_t, y_t); y moves with x.

    The first estimate is e alone, on a sample of the anchor size where one is given. A decay scales a_t and b_t by
    s_{t-1}^2, clipped at 1.

    Args:
        weight: a in (0, 1]; 1 is ``Plain(simultaneous=True)``.
        lower_weight: b of the recursion for g_y; by default as ``weight``.
        tracks: ``"hypergradient"`` (SUSTAIN, MRBO) or ``"gradients"``.

    Raises:
        ValueError: if a weight is not in (0, 1], or ``tracks`` is neither.

    Cost: both ends are evaluated on the new sample: two gradients or hypergradients. Keeps x, y, u and v.

    Reference: Cutkosky and Orabona, NeurIPS 2019.

    Differs from the paper: nothing.
    """

    weight: float
    lower_weight: float | None = None
    tracks: Tracked = "hypergradient"

    def __post_init__(self) -> None:
        require_weight("weight", self.weight)
        if self.lower_weight is not None:
            require_weight("lower_weight", self.lower_weight)
        _require_one_of("tracks", self.tracks, ("hypergradient", "gradients"))

    def weights(self, factor: float) -> tuple[float, float]:
        """A and b, scaled by the square of the factor."""
        b = self.weight if self.lower_weight is None else self.lower_weight
        return min(1.0, self.weight * factor**2), min(1.0, b * factor**2)


@dataclass(frozen=True)
class Hybrid(Storm):
    """Hybrid SARAH: v_t = (1 - a_t) (v_{t-1} + e(p_t; S) - e(p_{t-1}; S)) + a_t e(p_t; S'), S and S' independent.

    On one sample S = S' it is ``Storm``.

    Args:
        weight: a in (0, 1], 1 - beta of the paper.
        lower_weight: likewise for g_y; by default as ``weight``.
        tracks: as in ``Storm``.

    Raises:
        ValueError: as in ``Storm``.

    Cost: three gradients or hypergradients. Keeps x, y, u and v.

    Reference: Tran-Dinh, Liu and Nguyen, NeurIPS 2020.

    Differs from the paper: the paper applies it to a map and its Jacobian, see ``HybridVRSGD``.
    """


@dataclass(frozen=True)
class Spider(Recursion):
    """SPIDER (SARAH): an anchor on a large sample every ``period`` calls, corrections v + e(p; S) - e(p'; S) between.

    Each of the lower solver's K steps is preceded by a correction on a new sample, from the point before to the point
    now; the first one takes the estimate from x_{t-1} to x_t. y moves before x.

    Args:
        period: q >= 1, calls from one anchor to the next.
        tracks: ``"gradients"`` (SREDA, PRGDA) or ``"hypergradient"`` (VRBO).
        selects: ``"argmin"``: of the K estimates the one after which y moved least; ``"last"``.
        anchors: ``"before"`` y moves, the first correction being left out then (PRGDA); ``"after"`` y has moved from
            the anchor of the call before, the first call being an anchor alone (SREDA, VRBO); ``"as printed"``: before,
            and the first correction added nonetheless, which counts the last move of x twice.

    Raises:
        ValueError: if an argument is out of range.

    Cost: 2 K gradients on the small sample per call, at an anchor one on the large sample (``"before"``: then 2 K - 2
    on the small one). Keeps x, y, u and v.

    Reference: Fang, Li, Lin and Zhang, NeurIPS 2018; Nguyen, Liu, Scheinberg and Takac, ICML 2017.

    Differs from the paper: nothing; the moves of y within a call are those of Luo, Ye, Huang and Zhang, NeurIPS 2020.
    """

    period: int
    tracks: Tracked = "gradients"
    selects: Literal["argmin", "last"] = "argmin"
    anchors: Literal["before", "after", "as printed"] = "before"

    def __post_init__(self) -> None:
        if isinstance(self.period, bool) or not isinstance(self.period, int) or self.period < 1:
            raise ValueError(f"period must be a positive integer, got {self.period!r}")
        _require_one_of("tracks", self.tracks, ("hypergradient", "gradients"))
        _require_one_of("selects", self.selects, ("argmin", "last"))
        _require_one_of("anchors", self.anchors, ("before", "after", "as printed"))

    def weights(self, factor: float) -> tuple[float, float]:
        """Both are zero."""
        return 0.0, 0.0


def require_weight(name: str, value: Any) -> None:
    """It must be a number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value!r}")


def _require_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
