"""SABA's estimator: SOBA's directions from a table that keeps what every block of data last contributed."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from torchbilevel.derivatives import average
from torchbilevel.draws import BatchSizes, Draws
from torchbilevel.estimators.evaluation import Evaluation, Memory
from torchbilevel.estimators.soba import Soba
from torchbilevel.estimators.vetting import SILENT_ZERO
from torchbilevel.lower import GD
from torchbilevel.lower.hyperparameters import check_flag
from torchbilevel.problem import Problem
from torchbilevel.samples import Block, Sample
from torchbilevel.sources import Blocks, sample
from torchbilevel.tensors import Tensors, flatten, mix_seed, unflatten

Side = Literal["lower", "upper"]


class Saba(Soba):
    """The directions of ``Soba`` with the variance reduction of SAGA.

    The rows of each ``sample`` are cut into fixed blocks. With e_i any part of a direction (f_x, f_y, g_y, g_yy z, g_xy
    z) on block i, w_i the share of its rows, and r_i what the table holds of it, a block i drawn with probability w_i
    gives

        S = e_i(x_t, y_t, z_t) - r_i + sum_j w_j r_j,   then r_i = e_i(x_t, y_t, z_t);

    one block of g serves the three parts of g, one of f the two of f. E S = e, and S = e once x, y and z have settled.
    The first call fills the table at (x_0, y_0, z_0) in one pass over all blocks, and so is exact.

    With ``shuffle`` every block is met once before any is met again: pass after pass, each in a random order of its
    own. The first pass fills the table on its way, and S is the mean of what has been met until it is full.

    Args:
        lower_solver: as in ``Soba``.
        batch_sizes: ``lower`` and ``upper``: rows per block; ``None`` makes one block of all rows.
        shuffle: draw the blocks without replacement. No entry of the table then is older than two passes, where
            independent draws leave the oldest of n about log n passes behind. On one data set that allowed larger
            steps and saved samples, on another it saved little (``docs/rates.md``).
        seed: of the random numbers inside the losses. The orders are those of the sources.

    Raises:
        TypeError: if ``shuffle`` is neither true nor false.
        ValueError: as in ``Soba``.

    Cost: per ``backward`` as ``Soba``, on one block of each loss; the first one on all blocks, unless ``shuffle``.
    Keeps z and the table: n (2 d_y + d_x) + m (d_y + d_x) numbers for n blocks of g and m of f, besides two means.

    Reference: Dagreou, Ablin, Vaiter and Moreau, NeurIPS 2022 (SABA); Defazio, Bach and Lacoste-Julien, NeurIPS 2014.
    ``shuffle``: Ying, Yuan and Sayed, IEEE Trans. Signal Process. 2020 (SAGA so); Schmidt, Le Roux and Bach, Math.
    Program. 2017 (the mean of what has been met).

    Differs from the paper: nothing without ``shuffle``. The paper leaves open where the table starts; the authors'
    published benchmark starts it from zeros, which is unbiased too but has the variance of ``Soba`` until every block
    has been drawn. ``shuffle`` is ours for bilevel problems; S is biased then, given the past, and no proof covers it.
    """

    def __init__(
        self, lower_solver: GD, *, batch_sizes: BatchSizes | None = None, shuffle: bool = False, seed: int = 0
    ) -> None:
        super().__init__(lower_solver, batch_sizes=BatchSizes() if batch_sizes is None else batch_sizes, seed=seed)
        check_flag("shuffle", shuffle)
        self.shuffle = shuffle

    def refuse(self, problem: Problem) -> None:
        """As ``Soba``; and the table is that of one process."""
        super().refuse(problem)
        if problem.ranks.size > 1:
            raise ValueError(
                f"SABA keeps a table of one process's data, and this problem is shared by {problem.ranks.size} ranks: "
                "use SOBA, or give the problem a process_group of this rank alone"
            )

    def backward(self, batch: Any = None, *, lower: Any = None, upper: Any = None) -> Tensor:
        """As in ``Estimator``.

        Args:
            batch: refused.
            lower: a ``sample`` for the lower loss, the same data in every call.
            upper: a ``sample`` for the upper loss, likewise.

        Returns:
            f(x, y), detached, on the block drawn.

        A ``TypeError`` says that another source, or a batch, was given; a ``ValueError`` that the data are not those
        of the calls before.
        """
        assert self.batch_sizes is not None
        lower = self._cut("lower", lower, self.batch_sizes.lower)
        return super().backward(batch, lower=lower, upper=self._cut("upper", upper, self.batch_sizes.upper))

    def evaluate(self, x: Tensors, y: Tensors, memory: Memory, draws: Draws) -> Evaluation:
        """Take the parts of the directions on the blocks drawn, and put them in the place of those in the table."""
        z = self.adjoint(y, memory)
        table = dict(memory.tracked)
        if not table and not self.shuffle:
            return self._fill(x, y, z, memory, draws)
        draw = draws.at(0)
        value, of_f, in_f = self.upper_parts(x, y, draw.upper)
        of_g, in_g = self.lower_parts(x, y, z, draw.lower)
        if not in_f and not in_g:
            raise ValueError(SILENT_ZERO)
        if not table:
            drawn = (("upper", draw.upper.block), ("lower", draw.lower.block))
            table = {f"{side} {i}": () for side, block in drawn if block for i in range(len(block.shares))}
        of_f = reduce(table, "upper", of_f, draw.upper.block, memory.calls)
        of_g = reduce(table, "lower", of_g, draw.lower.block, memory.calls)
        return self.move(y, z, memory, value, of_f, of_g, table)

    def _fill(self, x: Tensors, y: Tensors, z: Tensors, memory: Memory, draws: Draws) -> Evaluation:
        """The first evaluation, on all blocks."""
        table: dict[str, Tensors] = {}
        lower, upper = draws.source("lower"), draws.source("upper")
        values, found = [], False
        for i, share in enumerate(upper.shares):
            value, of_f, in_f = self.upper_parts(x, y, Sample(upper[i], mix_seed(draws.seed, 0, i)))
            table[f"upper {i}"] = (flatten(of_f),)
            values.append((share, (value,)))
            found = found or in_f
        for i in range(len(lower.shares)):
            of_g, in_g = self.lower_parts(x, y, z, Sample(lower[i], mix_seed(draws.seed, 1, i)))
            table[f"lower {i}"] = (flatten(of_g),)
            found = found or in_g
        if not found:
            raise ValueError(SILENT_ZERO)
        for side, blocks in (("upper", upper), ("lower", lower)):
            table[side] = mean(table, side, blocks.shares)
        of_f, of_g = unflatten(table["upper"][0], of_f), unflatten(table["lower"][0], of_g)
        return self.move(y, z, memory, average(values)[0], of_f, of_g, table)

    def _cut(self, side: Side, data: Any, size: int | None) -> Blocks:
        if not isinstance(data, sample):
            raise TypeError(
                f"{side}= must be a source sample(tensors, seed), whose blocks SABA tells apart, got "
                f"{type(data).__name__}; for a loss without data give sample(torch.zeros(1), seed=0), for data that "
                "are not in memory use SOBA"
            )
        calls, table = self.memory.calls, self.memory.tracked
        blocks = Blocks(data, size, calls if self.shuffle else None)
        n = len(blocks.shares)
        if table and (f"{side} {n - 1}" not in table or f"{side} {n}" in table):
            raise ValueError(f"{side}= has {n} blocks, and the table another number: give the same data in every call")
        if table and self.shuffle and calls < n and table[f"{side} {data.order(0, n)[calls]}"]:
            raise ValueError(
                f"{side}= is a sample of another seed than in the calls before, within the first pass of shuffle=True, "
                "which meets every block once: give the same sample in every call"
            )
        return blocks


def mean(table: dict[str, Tensors], side: str, shares: tuple[float, ...]) -> Tensors:
    """The mean of one side of the table, all rows weighted by their shares."""
    return average((share, table[f"{side} {i}"]) for i, share in enumerate(shares))


def reduce(table: dict[str, Tensors], side: Side, new: Tensors, block: Block | None, calls: int) -> Tensors:
    """SAGA's estimate of a mean over blocks; the table takes the new entry.

    Args:
        table: flat vectors by side and block, ``()`` for a block not met yet, and the mean of each side; changed.
        side: of the table.
        new: the entry of the block now.
        block: which one.
        calls: so far.

    Returns:
        new - old + mean, in the shapes of ``new``; of a block not met yet the mean of the entries there are with it.
    """
    assert block is not None
    name, share, now = f"{side} {block.index}", block.shares[block.index], flatten(new)
    old_entry, table[name] = table[name], (now,)
    if not old_entry:
        # Every call so far has met another block. Blocks count equally until all are there, the last one too.
        if calls + 1 == len(block.shares):
            table[side] = mean(table, side, block.shares)
        else:
            (before,) = table.get(side, (now,))
            table[side] = (before + (now - before) / (calls + 1),)
        return unflatten(table[side][0], new)
    (before,), (old,) = table[side], old_entry
    # Formed anew once per pass, so that rounding errors do not pile up; of a single block it is the entry itself.
    fresh = calls % len(block.shares) == 0
    table[side] = mean(table, side, block.shares) if fresh else (before + share * (now - old),)
    return unflatten(now + (before - old), new)
