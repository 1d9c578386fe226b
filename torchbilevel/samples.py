"""Samples as values: a batch and the seed under which losses are evaluated on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import count as numbers
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from torchbilevel.tensors import mix_seed


@dataclass(frozen=True)
class Block:
    """One block of a data set that is cut into fixed blocks, for methods that keep something of each.

    Attributes:
        rows: the batch.
        index: its number.
        shares: of the data points, by block.
    """

    rows: Any
    index: int
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Sample:
    """A batch together with the seed under which losses are evaluated on it.

    Evaluating a loss on the same sample twice, at any two points, meets the same data and the same random numbers
    (dropout masks included).

    Attributes:
        batch: what the loss receives as its third argument; a ``Batches`` stands for the average over its parts.
        seed: the random seed of every evaluation on this sample.
        block: which block of a data set it is, where the source gave one.
    """

    batch: Any
    seed: int
    block: Block | None = None

    def parts(self) -> Iterator[tuple[float, Any, int]]:
        """Yield (weight, batch, seed) triples whose weighted losses add up to the loss on the sample."""
        if isinstance(self.batch, Batches):
            for i, (weight, batch) in enumerate(self.batch):
                yield weight, batch, mix_seed(self.seed, i)
        else:
            yield 1.0, self.batch, self.seed

    @property
    def whole(self) -> bool:
        """Whether the sample is one batch, so that one graph serves all products."""
        return not isinstance(self.batch, Batches)

    @cached_property
    def size(self) -> int:
        """Number of data points, as the oracle counts count them."""
        return self.batch.size if isinstance(self.batch, Batches) else count(self.batch)


@dataclass(frozen=True)
class Samples:
    """The lower and the upper sample of one evaluation; a minimax problem uses one sample for both."""

    lower: Sample
    upper: Sample


def count(batch: Any) -> int:
    """Number of data points in a batch: the first dimension of the first tensor found in it.

    Args:
        batch: tuples, lists and dictionaries are searched in order; 0-d tensors are passed over.

    Returns:
        The number; 1 for a batch without tensors (``None``, say, for a loss that needs no data).

    >>> count((torch.zeros(5, 3), torch.zeros(5))), count({"image": torch.zeros(7, 2)}), count(None)
    (5, 7, 1)
    """
    size = _first_dimension(batch)
    return 1 if size is None else size


def _first_dimension(batch: Any) -> int | None:
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() > 0 else None
    if not isinstance(batch, list | tuple):
        if not isinstance(batch, Mapping):
            return None
        batch = batch.values()
    for entry in batch:
        size = _first_dimension(entry)
        if size is not None:
            return size
    return None


def draw(data: Any, size: int | None, seed: int, name: str) -> Sample:
    """Turn a batch or a source into a sample.

    Args:
        data: a batch, or a source, that is, a callable ``source(n) -> batch``.
        size: number of data points to ask the source for; ``None`` takes what the source gives by itself.
        seed: the seed that the sample carries.
        name: the argument's name, for messages.

    Returns:
        The sample.

    Raises:
        TypeError: if ``data`` is a DataLoader or an iterator.
    """
    if callable(data):
        batch = data(size)
        return Sample(batch.rows, seed, batch) if isinstance(batch, Block) else Sample(batch, seed)
    if isinstance(data, DataLoader | Iterator):
        raise TypeError(
            f"{name}= got a {type(data).__name__}; pass one batch, or the source stream(loader), "
            f"or Batches(loader) for the average over the whole data set"
        )
    return Sample(data, seed)


class Tasks:
    """One source or batch per task, for a method that draws among lower problems (``RSVRB``).

    Every other method evaluates all tasks of a batch at once: the module is a ``TaskBatch``, the data one batch.

    Args:
        sources: of one loss, a source or a batch per task.

    Raises:
        ValueError: if there is none.

    >>> len(Tasks([torch.zeros(3), torch.ones(4)]))
    2
    """

    def __init__(self, sources: Iterable[Any]) -> None:
        self._sources = list(sources)
        if not self._sources:
            raise ValueError("Tasks needs a source or a batch per task, got none")

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, task: int) -> Any:
        return self._sources[task]

    def __call__(self, n: int | None = None) -> Any:
        """Refuse: there is no batch of all tasks.

        Args:
            n: plays no part.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"got Tasks of {len(self)} tasks where one source or batch is needed: only RSVRB draws among tasks, for "
            "modules without buffers in training mode"
        )


class Batches:
    """A whole data set that is too large for one batch: losses, gradients and products are averaged over its parts.

    The loss on ``Batches`` is sum_i (n_i / n) loss(batch_i), n_i the number of data points of part i. For a loss that
    is a mean over data points (plus terms that do not depend on the data) this equals the loss on one large batch.

    The parts are made anew in every pass, under the same torch seed, so that augmentations draw the same numbers.

    Args:
        batches: a list of batches, or a DataLoader that does not shuffle. It is iterated once on construction, to
            count the data points, and once for every gradient and product.

    Attributes:
        size: number of data points.

    Raises:
        TypeError: if ``batches`` can be iterated only once, or not at all.
        ValueError: if it is empty, or a DataLoader that shuffles (a product must see the same parts every time).

    Cost: a Hessian-vector product rebuilds the graph of every part: two to three times a product on a single batch,
    in the memory of one part.

    >>> parts = Batches([torch.zeros(3, 2), torch.zeros(1, 2)])
    >>> parts.size, [weight for weight, batch in parts]
    (4, [0.75, 0.25])
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        if isinstance(batches, Iterator):
            raise TypeError("batches can be iterated only once; pass a list of batches or a DataLoader")
        if isinstance(batches, Tensor | Mapping) or not isinstance(batches, Iterable):
            raise TypeError(f"batches must be a list of batches or a DataLoader, got {type(batches).__name__}")
        if isinstance(batches, DataLoader) and any(isinstance(s, _SHUFFLING) for s in _samplers(batches)):
            raise ValueError(
                "batches is a DataLoader that shuffles; Batches needs the same parts every time: shuffle=False"
            )
        self._batches = batches
        self._sizes = [count(batch) for batch in self._pass()]
        self.size = sum(self._sizes)
        if self.size == 0:
            raise ValueError("batches is empty; Batches needs at least one data point")

    def __iter__(self) -> Iterator[tuple[float, Any]]:
        """Yield (weight, batch) pairs; weights are shares of the data points and add up to one."""
        for size, batch in zip(self._sizes, self._pass(), strict=True):
            yield size / self.size, batch

    def _pass(self) -> Iterator[Any]:
        # A DataLoader draws random numbers of its own when it is iterated, whether it shuffles or not.
        with replay(0):
            batches = iter(self._batches)
        for i in numbers():
            with replay(i):
                batch = next(batches, _END)
            if batch is _END:
                return
            yield batch


_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_END = object()


def _samplers(loader: DataLoader[Any]) -> tuple[Any, Any]:
    return loader.sampler, getattr(loader.batch_sampler, "sampler", None)


class replay:  # noqa: N801  (used like a function: with replay(seed))
    """Run a block under a seed of torch's global generators (CPU and CUDA) and put their states back afterwards.

    Args:
        seed: of all of them.
    """

    # Every evaluation passes through here: ``contextlib.contextmanager`` would more than double the cost.
    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        self._states = []
        for g in (torch.default_generator, *torch.cuda.default_generators):
            self._states.append((g, g.get_state()))
            g.manual_seed(self._seed)

    def __exit__(self, *error: object) -> None:
        for g, state in self._states:
            g.set_state(state)
