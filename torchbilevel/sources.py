"""Sources: where mini-batches come from, ``source(n) -> batch``."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from torchbilevel.samples import Batches, Block, count
from torchbilevel.tensors import as_seed, mix_seed


class sample:  # noqa: N801  (used like a function: lower=tb.sample(...))
    """A source of uniform draws with replacement from tensors in memory, on their device, without workers.

    ``source(n)`` returns n rows; ``source(None)`` and any n that reaches the number of rows return all rows in order.
    Draw number k depends on the seed and k alone.

    Args:
        tensors: a tensor, or a tuple, list or dict of tensors that share their first dimension.
        seed: of the draws.

    Attributes:
        rows: their number.
        row_bytes: the size of one.
        draws: made so far.

    Raises:
        TypeError: if ``tensors`` is of another kind.
        ValueError: if there is no tensor, the first dimensions differ, or ``seed`` is no integer.

    >>> source = sample((torch.arange(4.0), torch.arange(4)), seed=0)
    >>> values, labels = source(2)
    >>> values.shape, bool((values == labels).all())
    (torch.Size([2]), True)
    """

    def __init__(self, tensors: Any, seed: int) -> None:
        if not isinstance(tensors, Tensor | Mapping | list | tuple):
            raise TypeError(f"tensors must be a tensor, tuple, list or dict of tensors, got {type(tensors).__name__}")
        self._form: Any
        # One table for all forms; the form is put back on every draw.
        self._columns: dict[Any, Any]
        if isinstance(tensors, Mapping):
            self._columns, self._form = dict(tensors), dict
        elif isinstance(tensors, Tensor):
            self._columns, self._form = {0: tensors}, Tensor
        else:
            self._columns = dict(enumerate(tensors))
            self._form = getattr(type(tensors), "_make", tuple)  # of a named tuple
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in self._columns.values()]
        rows = {shape[0] if isinstance(shape, tuple) and shape else 0 for shape in shapes}
        if len(rows) != 1 or 0 in rows:
            raise ValueError(f"tensors must be non-empty tensors that share their first dimension, got {shapes}")
        (self.rows,) = rows
        self.row_bytes = sum(t.nbytes for t in self._columns.values()) // self.rows
        self._seed = as_seed(seed)
        self.draws = 0

    def __call__(self, n: int | None = None) -> Any:
        """Draw n rows with replacement, or return all rows when n is ``None`` or reaches their number.

        Args:
            n: number of rows.

        Returns:
            The rows, in the form of ``tensors`` (a tuple for a list).

        Raises:
            ValueError: if n is not positive.
        """
        if n is not None and n < 1:
            raise ValueError(f"batch size must be positive, got {n}")
        if n is None or n >= self.rows:
            return self.take()
        return self.take(self.choose(n))

    def choose(self, n: int) -> Tensor:
        """Draw the numbers of n rows, with replacement.

        Args:
            n: how many.

        Returns:
            A 1-d tensor on the device of the first of ``tensors``.
        """
        device = next(iter(self._columns.values())).device
        generator = _generator(device).manual_seed(mix_seed(self._seed, self.draws))
        self.draws += 1
        return torch.randint(self.rows, (n,), generator=generator, device=device)

    def order(self, k: int, n: int) -> list[int]:
        """Random order number k of n things, which depends on the seed, k and n alone.

        Args:
            k: number of the order.
            n: of how many things.

        Returns:
            0 to n - 1, each once.
        """
        return _order(mix_seed(self._seed, -1, k), n)

    def take(self, index: Tensor | None = None) -> Any:
        """The rows of these numbers.

        Args:
            index: their numbers, 1-d; ``None`` for all rows, which are not copied.

        Returns:
            The rows, in the form of ``tensors`` (a tuple for a list).
        """
        columns = self._columns
        if index is not None:
            # Rows are copied one by one so, and not entry by entry.
            columns = {name: t.index_select(0, index.to(t.device)) for name, t in columns.items()}
        if self._form is dict:
            return dict(columns)
        return columns[0] if self._form is Tensor else self._form(columns.values())

    def state_dict(self) -> dict[str, int]:
        """The number of draws made, from which a resumed run draws on."""
        return {"draws": self.draws}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue after the draws that ``state_dict`` counted."""
        self.draws = int(state["draws"])


class Blocks:
    """A source of the fixed blocks of n consecutive rows into which a ``sample`` is cut; the last may be shorter.

    A block is drawn with a probability that is its share of the rows, so that the mean over draws is that over rows;
    or in passes, each of which takes every block once, in an order of its own.

    Args:
        source: whose rows and whose draws they are.
        n: rows per block; ``None`` or any n that reaches the number of rows makes one block of all of them.
        turn: number of the draw where blocks are drawn in passes, ``None`` where independently.

    Attributes:
        shares: of the rows, by block.

    Raises:
        ValueError: if n is not positive.

    >>> blocks = Blocks(sample(torch.arange(5.0), seed=0), 2)
    >>> blocks.shares, blocks[2]
    ((0.4, 0.4, 0.2), tensor([4.]))
    >>> sorted(Blocks(sample(torch.arange(5.0), seed=0), 2, turn=t)(2).index for t in range(3))
    [0, 1, 2]
    """

    def __init__(self, source: sample, n: int | None, turn: int | None = None) -> None:
        if n is not None and n < 1:
            raise ValueError(f"batch size must be positive, got {n}")
        total = source.rows
        self._source, self._n, self._turn = source, total if n is None else min(n, total), turn
        self.shares = _shares(total, self._n)

    def __getitem__(self, i: int) -> Any:
        return self._source.take(torch.arange(i * self._n, min((i + 1) * self._n, self._source.rows)))

    def __call__(self, n: int | None = None) -> Block:
        """Draw a block.

        Args:
            n: ``None`` for all rows as one block; any number for one of the blocks.

        Returns:
            The block. Where there is one, or ``turn`` was given, no draw is made of the source.
        """
        blocks = len(self.shares)
        if n is None:
            return Block(self._source.take(), 0, (1.0,))
        if blocks == 1:
            i = 0
        elif self._turn is not None:
            i = self._source.order(self._turn // blocks, blocks)[self._turn % blocks]
        else:
            i = int(self._source.choose(1)) // self._n
        return Block(self[i], i, self.shares)


@lru_cache(maxsize=16)
def _shares(total: int, n: int) -> tuple[float, ...]:
    # There may be as many as rows, and they are asked for in every step.
    return tuple(min(n, total - start) / total for start in range(0, total, n))


@lru_cache(maxsize=16)
def _order(seed: int, n: int) -> list[int]:
    # One order serves n draws.
    order: list[int] = torch.randperm(n, generator=_generator(torch.device("cpu")).manual_seed(seed)).tolist()
    return order


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
        if not isinstance(loader, Iterable) or isinstance(loader, Tensor | Mapping):
            raise TypeError(f"loader must be a DataLoader or a list of batches, got {type(loader).__name__}")
        self._loader = loader
        self._batches: Iterator[Any] = iter(())
        self.served = 0

    def __call__(self, n: int | None = None) -> Any:
        """Return the next batch.

        Args:
            n: the number of data points asked for, or ``None``.

        Returns:
            The batch, as the loader made it.

        Raises:
            RuntimeError: if the loader is empty or was an iterator that is exhausted.
            ValueError: if the batch holds more or fewer data points than n.
        """
        batch = next(self._batches, _END)
        if batch is _END:
            self._batches = iter(self._loader)
            batch = next(self._batches, _END)
        if batch is _END:
            raise RuntimeError(
                f"the source is exhausted after {self.served} batches; stream a DataLoader or a non-empty list, which "
                f"can start over"
            )
        if n is not None and count(batch) != n:
            raise ValueError(
                f"a batch of {n} data points was asked of a stream whose loader gave {count(batch)}; "
                f"set the loader's batch_size={n} and drop_last=True, or use sample(tensors, seed)"
            )
        self.served += 1
        return batch


def micro_batches(data: Any, size: int) -> Any:
    """Large batches in pieces that fit into memory: accumulation, in ``.grad`` and inside the solves.

    Every gradient and every product on a batch becomes the average over pieces of ``size`` data points, one piece in
    memory at a time, weighted by their sizes. For losses that are means over data points it equals the whole batch.

    Args:
        data: a batch, or a source of batches: tensors, or nested tuples, lists and dicts of them, that share their
            first dimension. The pieces are views.
        size: data points per piece, at least 1; the last may be smaller.

    Returns:
        ``Batches`` for a batch; for a source, a source of ``Batches``.

    Raises:
        ValueError: if ``size`` is not positive, or the tensors of a batch differ in their first dimension.

    Cost: that of ``Batches``: the graph of every piece is rebuilt for every product.

    >>> [(weight, piece.tolist()) for weight, piece in micro_batches(torch.arange(3.0), 2)]
    [(0.6666666666666666, [0.0, 1.0]), (0.3333333333333333, [2.0])]
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be a positive integer, got {size!r}")
    if callable(data):
        return lambda n=None: micro_batches(data(n), size)
    rows = count(data)
    return Batches([_rows(data, start, min(start + size, rows), rows) for start in range(0, rows, size)])


def _rows(batch: Any, start: int, end: int, rows: int) -> Any:
    if isinstance(batch, Tensor):
        if batch.dim() and len(batch) != rows:
            raise ValueError(
                f"the tensors of a batch must share their first dimension, got {len(batch)} and {rows} data points"
            )
        return batch[start:end] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {name: _rows(value, start, end, rows) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        pieces = [_rows(value, start, end, rows) for value in batch]
        return type(batch)(*pieces) if hasattr(batch, "_fields") else type(batch)(pieces)
    return batch


def _generator(device: torch.device) -> torch.Generator:
    # To make one costs more than a draw. One per thread, so that nobody draws between seeding and drawing.
    made: dict[str, torch.Generator] = vars(_GENERATORS)
    name = str(device)
    return made[name] if name in made else made.setdefault(name, torch.Generator(device))


_GENERATORS = threading.local()
_END = object()
