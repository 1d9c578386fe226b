"""Samples as values, and the sources they are drawn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from torchbilevel.tensors import mix_seed

Source = Callable[[int | None], Any]


@dataclass(frozen=True)
class Sample:
    """A batch together with the seed under which losses are evaluated on it.

    Evaluating a loss on the same sample twice, at any two points, meets the same data and the same random numbers
    (dropout masks included).

    Attributes:
        batch: what the loss receives as its third argument; a ``Batches`` stands for the average over its parts.
        seed: the random seed of every evaluation on this sample.
    """

    batch: Any
    seed: int

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

    @property
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

    Tuples, lists and dictionaries are searched in order; 0-d tensors are passed over. A batch without tensors
    (``None``, say, for a loss that needs no data) counts as one data point.

    >>> count((torch.zeros(5, 3), torch.zeros(5))), count({"image": torch.zeros(7, 2)}), count(None)
    (5, 7, 1)
    """
    return _first_dimension(batch) or 1


def _first_dimension(batch: Any) -> int | None:
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() > 0 else None
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif not isinstance(batch, list | tuple):
        return None
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
    if isinstance(data, DataLoader) or isinstance(data, Iterator):
        raise TypeError(
            f"{name}= got a {type(data).__name__}; pass one batch, or the source stream(loader), "
            f"or Batches(loader) for the average over the whole data set"
        )
    return Sample(data(size) if callable(data) else data, seed)


class Batches:
    """A whole data set that is too large for one batch: losses, gradients and products are averaged over its parts.

    The loss on ``Batches`` is sum_i (n_i / n) loss(batch_i), n_i the number of data points of part i. For a loss that
    is a mean over data points (plus terms that do not depend on the data) this equals the loss on one large batch.

    Args:
        batches: a list of batches, or a DataLoader that does not shuffle. It is iterated once on construction, to
            count the data points, and once for every gradient and product.

    Raises:
        TypeError: if ``batches`` can be iterated only once.
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
        if isinstance(batches, DataLoader) and isinstance(batches.sampler, RandomSampler):
            raise ValueError(
                "batches is a DataLoader with shuffle=True; Batches needs the same parts every time: shuffle=False"
            )
        self._batches = batches
        self._sizes = [count(batch) for batch in batches]
        self.size = sum(self._sizes)
        if not self._sizes:
            raise ValueError("batches is empty; Batches needs at least one batch")

    def __iter__(self) -> Iterator[tuple[float, Any]]:
        """Yield (weight, batch) pairs; weights are shares of the data points and add up to one."""
        for size, batch in zip(self._sizes, self._batches, strict=True):
            yield size / self.size, batch


class sample:  # noqa: N801  (used like a function: lower=tb.sample(...))
    """A source of uniform draws with replacement from tensors in memory, on their device, without workers.

    ``source(n)`` returns n rows; ``source(None)`` and any n that reaches the number of rows return all rows in order.
    Draw number k depends on the seed and k alone.

    Args:
        tensors: a tensor, or a tuple, list or dict of tensors that share their first dimension.
        seed: of the draws.

    Raises:
        ValueError: if there is no tensor, or the first dimensions differ.

    >>> source = sample((torch.arange(4.0), torch.arange(4)), seed=0)
    >>> values, labels = source(2)
    >>> values.shape, bool((values == labels).all())
    (torch.Size([2]), True)
    """

    def __init__(self, tensors: Any, seed: int) -> None:
        leaves = (
            [tensors]
            if isinstance(tensors, Tensor)
            else list(tensors.values() if isinstance(tensors, Mapping) else tensors)
        )
        sizes = {t.shape[0] if isinstance(t, Tensor) and t.dim() > 0 else None for t in leaves}
        if len(sizes) != 1 or None in sizes or 0 in sizes:
            raise ValueError(
                f"tensors must be non-empty tensors that share their first dimension, got first dimensions {sizes}"
            )
        self._tensors, self._first = tensors, leaves[0]
        self._seed = seed
        self.draws = 0

    def __call__(self, n: int | None = None) -> Any:
        """Draw n rows with replacement, or return all rows when n is ``None`` or reaches their number."""
        rows = self._first.shape[0]
        if n is None or n >= rows:
            return self._tensors
        if n < 1:
            raise ValueError(f"batch size must be positive, got {n}")
        generator = torch.Generator(self._first.device).manual_seed(mix_seed(self._seed, self.draws))
        self.draws += 1
        index = torch.randint(rows, (n,), generator=generator, device=self._first.device)
        if isinstance(self._tensors, Tensor):
            return self._tensors[index]
        if isinstance(self._tensors, Mapping):
            return {key: t[index] for key, t in self._tensors.items()}
        return tuple(t[index] for t in self._tensors)

    def state_dict(self) -> dict[str, int]:
        """The number of draws made, from which a resumed run draws on."""
        return {"draws": self.draws}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue after the draws that ``state_dict`` counted."""
        self.draws = int(state["draws"])


class stream:  # noqa: N801  (used like a function: lower=tb.stream(loader))
    """A source that serves the batches of a loader one after the other and starts over at its end.

    The loader decides the batch size; a method that asks for another size is refused.

    Args:
        loader: a DataLoader or any other iterable of batches. A plain iterator is served once and then exhausted.

    >>> source = stream([torch.zeros(2), torch.ones(2)])
    >>> source(None), source(None), source(None)
    (tensor([0., 0.]), tensor([1., 1.]), tensor([0., 0.]))
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        if not isinstance(loader, Iterable):
            raise TypeError(f"loader must be an iterable of batches, got {type(loader).__name__}")
        self._loader = loader
        self._batches = iter(loader)
        self.served = 0

    def __call__(self, n: int | None = None) -> Any:
        """Return the next batch.

        Args:
            n: the number of data points asked for, or ``None``.

        Raises:
            RuntimeError: if the loader is empty or was an iterator that is exhausted.
            ValueError: if the batch holds more or fewer data points than n.
        """
        batch = next(self._batches, _END)
        if batch is _END and not isinstance(self._loader, Iterator):
            self._batches = iter(self._loader)
            batch = next(self._batches, _END)
        if batch is _END:
            raise RuntimeError(
                f"the source is exhausted after {self.served} batches; stream a DataLoader or a list, which can start over"
            )
        if n is not None and count(batch) != n:
            raise ValueError(
                f"a batch of {n} data points was asked of a stream whose loader gave {count(batch)}; "
                f"set the loader's batch_size={n} and drop_last=True, or use sample(tensors, seed)"
            )
        self.served += 1
        return batch


_END = object()
