"""What one iteration draws: a sample for every use, made when it is first asked for and the same ever after."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from torchbilevel.samples import Sample, Samples, Tasks, draw
from torchbilevel.sources import sample as table
from torchbilevel.tensors import mix_seed

Role = Literal["upper", "lower", "jvp", "hvp"]
_ROLES: tuple[Role, ...] = ("upper", "lower", "jvp", "hvp")
_LARGE = 1 << 17  # bytes
# A size by its name here and, for those who have never met this class, as an argument of a method.
_ARGUMENTS = {
    "upper": "batch_size (upper)",
    "lower": "lower_batch_size (lower)",
    "jvp": "jvp_batch_size (jvp)",
    "hvp": "hvp_batch_size (hvp)",
    "anchor": "anchor_size (anchor)",
    "lower_anchor": "lower_anchor_size (lower_anchor)",
}


@dataclass(frozen=True)
class BatchSizes:
    """How many data points each use of an iteration draws; every use draws its own, independent of all others.

    ``None`` takes what the source gives by itself: the loader's batch of ``stream``, all rows of ``sample``.

    Args:
        upper: for every gradient of f; S2, D_F.
        lower: for every gradient of g; S4, S. By default, of a minimax problem, as ``upper``.
        jvp: for every product with g_xy; S5, D_G. By default as ``lower``.
        hvp: for every product with g_yy; B. By default as ``lower``.
        anchor: in place of ``upper`` where a recursion starts anew; S1.
        lower_anchor: in place of ``lower``, ``jvp`` and ``hvp`` there; S3. By default as ``anchor``.
        reuse_batch: let a plain batch stand for all draws of its loss, which then are not independent.

    Raises:
        TypeError: if ``reuse_batch`` is neither true nor false.
        ValueError: if a size is not a positive integer.
    """

    upper: int | None = None
    lower: int | None = None
    jvp: int | None = None
    hvp: int | None = None
    anchor: int | None = None
    lower_anchor: int | None = None
    reuse_batch: bool = False

    def __post_init__(self) -> None:
        for name in _ARGUMENTS:
            size = getattr(self, name)
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ValueError(f"{_ARGUMENTS[name]} must be a positive integer or None, got {size!r}")
        if not isinstance(self.reuse_batch, bool):
            raise TypeError(f"reuse_batch must be True or False, got {self.reuse_batch!r}")

    def size(self, role: Role, anchor: bool) -> int | None:
        """The number of data points that a use draws.

        Args:
            role: of the use.
            anchor: whether a recursion starts anew.

        Returns:
            The number, or ``None``.
        """
        if anchor:
            return self.anchor if role == "upper" or self.lower_anchor is None else self.lower_anchor
        size: int | None = getattr(self, role)
        return self.lower if size is None and role != "upper" else size


class Draws:
    """The samples of one iteration, by use.

    Evaluating at several points, or again in a probe, meets the same samples, since a draw is remembered: of a large
    one from a ``tb.sample`` the numbers of its rows, which are taken again where a later step has met others since.
    Without batch sizes there is one lower and one upper sample, for all uses.

    Args:
        lower: a batch or a source for g.
        upper: a batch or a source for f, for minimax problems the same object as ``lower``.
        seed: from which the seeds of all samples come.
        sizes: of the independent draws; ``None`` for one sample of each loss.
        minimax: whether both losses are evaluated on one sample where ``sizes`` is ``None``.

    Raises:
        TypeError: if a DataLoader or an iterator stands for a batch.
        ValueError: if independent draws are asked of a plain batch.
    """

    def __init__(self, lower: Any, upper: Any, seed: int, sizes: BatchSizes | None, minimax: bool) -> None:
        self._data: dict[str, Any] | None = {"lower": lower, "upper": upper}
        self._names = dict.fromkeys(self._data, "batch") if minimax else {name: name for name in self._data}
        if sizes is not None and minimax and sizes.lower is None:
            sizes = replace(sizes, lower=sizes.upper)
        self.seed, self._sizes, self._minimax = seed, sizes, minimax
        self._samples: dict[tuple[int, ...], Sample] = {}
        self._numbers: dict[tuple[int, ...], Tensor] = {}  # of the rows of large ones
        self._pair: Samples | None = None
        self._tasks: list[Draws] = []
        self._lengths = [len(data) for data in (lower, upper) if isinstance(data, Tasks)]
        if sizes is None:
            self._pair = self._draw_pair()
        for side, data in self._data.items():
            if sizes is not None and not sizes.reuse_batch and data is not None and not callable(data):
                draw(data, None, 0, self._names[side])  # a loader has a message of its own
                raise ValueError(
                    f"{self._names[side]}= got one batch ({type(data).__name__}), and this method draws several "
                    "independent ones per step: pass a source such as sample(tensors, seed) or stream(loader), or set "
                    "reuse_batch=True"
                )

    @property
    def single(self) -> bool:
        """Whether one lower and one upper sample serve all uses."""
        return self._sizes is None

    @property
    def anchored(self) -> bool:
        """Whether a size was given for where a recursion starts anew."""
        return self._sizes is not None and self._sizes.anchor is not None

    @property
    def pair(self) -> Samples:
        """One sample of each loss, of the size that the sources give by themselves: what a certificate is about."""
        if self._pair is None:
            self._pair = self._draw_pair()
        return self._pair

    @property
    def tasks(self) -> list[Draws]:
        """The draws of each task where ``Tasks`` were given for a loss, else these alone."""
        if not self._lengths:
            return [self]
        if not self._tasks:
            if len(set(self._lengths)) > 1:
                raise ValueError(f"lower= and upper= must have the same number of tasks, got {self._lengths}")
            lower, upper = self._sources()["lower"], self._sources()["upper"]
            self._tasks = [
                Draws(_of(lower, i), _of(upper, i), mix_seed(self.seed, -1, i), self._sizes, self._minimax)
                for i in range(self._lengths[0])
            ]
        return self._tasks

    def at(self, k: int, anchor: bool = False) -> Draw:
        """The samples of inner step k.

        Args:
            k: number of the step.
            anchor: whether a recursion starts anew, on larger batches.

        Returns:
            The samples by use.
        """
        return Draw(self, k, anchor)

    def sample(self, role: Role, anchor: bool, *index: int, size: int | None = None) -> Sample:
        """The sample of one use, drawn when it is first asked for.

        Args:
            role: of the use.
            anchor: whether a recursion starts anew.
            index: which of them.
            size: number of data points, by default that of the role.

        Returns:
            The sample.
        """
        if self._sizes is None:
            return self.pair.upper if role == "upper" else self.pair.lower
        key = (_ROLES.index(role), int(anchor), *index)
        found = self._samples.get(key)
        if found is None:
            size = self._sizes.size(role, anchor) if size is None else size
            found = self._samples[key] = self._take(key, "upper" if role == "upper" else "lower", size)
        return found

    def put_away(self, but: tuple[int, ...] = ()) -> None:
        """Free the rows of large samples that can be taken again, but for those of one inner step.

        The next ones then lie where they lay, in place of pages that the system hands out, and takes back, every time.

        Args:
            but: the step, as (anchor, k).
        """
        for key in self._numbers:
            if key[1:3] != but:
                self._samples.pop(key, None)

    def size(self, role: Role, anchor: bool) -> int | None:
        """The number of data points that a use draws, where it is known beforehand."""
        return None if self._sizes is None else self._sizes.size(role, anchor)

    def source(self, side: Literal["lower", "upper"]) -> Any:
        """What the user gave for one loss."""
        return self._sources()[side]

    def _draw_pair(self) -> Samples:
        lower = self._draw("lower", None, mix_seed(self.seed, 0))
        return Samples(lower, lower if self._minimax else self._draw("upper", None, mix_seed(self.seed, 1)))

    def _take(self, key: tuple[int, ...], side: str, size: int | None) -> Sample:
        seed, source = mix_seed(self.seed, *key), self._sources()[side]
        if type(source) is not table or size is None or size >= source.rows or size * source.row_bytes < _LARGE:
            return self._draw(side, size, seed)
        self.put_away(key[1:3])
        if key not in self._numbers:
            self._numbers[key] = source.choose(size)
        return Sample(source.take(self._numbers[key]), seed)

    def _draw(self, side: str, size: int | None, seed: int) -> Sample:
        return draw(self._sources()[side], size, seed, self._names[side])

    def _sources(self) -> dict[str, Any]:
        if self._data is None:
            raise RuntimeError("a copy has the samples of the last backward, but not its sources: call backward first")
        return self._data

    def __getstate__(self) -> dict[str, Any]:
        # A source is the user's: a copy of the estimator neither copies it nor draws from the original's.
        away = {key: self._take(key, "upper" if key[0] == 0 else "lower", len(n)) for key, n in self._numbers.items()}
        return {**vars(self), "_data": None, "_samples": {**self._samples, **away}, "_numbers": {}}


class Draw:
    """The samples of one inner step, by use.

    Args:
        draws: where they are remembered.
        k: number of the step.
        anchor: whether a recursion starts anew.
    """

    def __init__(self, draws: Draws, k: int, anchor: bool) -> None:
        self._draws, self._k, self._anchor = draws, k, anchor
        self.single = draws.single

    @property
    def upper(self) -> Sample:
        """For the gradient of f."""
        return self._draws.sample("upper", self._anchor, self._k)

    @property
    def lower(self) -> Sample:
        """For the gradient of g."""
        return self._draws.sample("lower", self._anchor, self._k)

    @property
    def jvp(self) -> Sample:
        """For the product with g_xy."""
        return self._draws.sample("jvp", self._anchor, self._k)

    def hvp(self, i: int = 0, size: int | None = None) -> Sample:
        """For product number i with g_yy.

        Args:
            i: number of the product.
            size: number of data points, by default that of the role.

        Returns:
            The sample.
        """
        return self._draws.sample("hvp", self._anchor, self._k, i, size=size)

    @property
    def hvp_size(self) -> int | None:
        """The number of data points of a product with g_yy, where it is known beforehand."""
        return self._draws.size("hvp", self._anchor)

    @property
    def seed(self) -> int:
        """Of the random choices that a linear solver makes."""
        return mix_seed(self._draws.seed, int(self._anchor), self._k)


def _of(data: Any, task: int) -> Any:
    return data[task] if isinstance(data, Tasks) else data
