"""What do several ranks cost, and how much do they exchange?

    python -m benchmarks.ranks [--smoke] [--output DIR]

One method at a time, on one rank with all data and on two with half each (gloo, one thread each): time per outer step,
and the all-reduces per step and the numbers that a rank hands to them, counted where they are handed over, beside the
formula

    (p + q + 1) F + (q + 1) G + q H + p J

for p upper and q lower variables, F gradients of f, G of g, H products with g_yy and J with g_xy (a number more or less
per value that is, or is not, asked for). The time of one all-reduce alone is measured too, since it decides how small a
problem may be. The table for more ranks is arithmetic, not a measurement: a ring all-reduce
of b bytes over R ranks sends 2 (R - 1) / R b bytes from each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import torchbilevel as tb

Row = dict[str, Any]
GBIT = 10.0  # of the paper estimate, per second and rank


class Decay(nn.Module):
    """The upper module: one log weight decay per parameter group."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.full((groups,), -4.0))


def lower_loss(upper: Decay, lower: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    penalties = torch.stack([p.square().sum() for p in lower.parameters()])
    return F.cross_entropy(lower(batch[0]), batch[1]) + (upper.log.exp() * penalties).sum()


def upper_loss(upper: Decay, lower: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(lower(batch[0]), batch[1])


GD = tb.GD(lr=0.1, steps=10)
METHODS: dict[str, Callable[[tb.BilevelProblem], tb.Method]] = {
    "AIDBiO": lambda p: tb.AIDBiO(p, 0.1, lower_solver=GD, linear_solver=tb.CG(10, tol=None)),
    "ITDBiO": lambda p: tb.ITDBiO(p, 0.1, lower_solver=GD),
    "F2SA": lambda p: tb.F2SA(p, 0.1, multiplier=2.0, lower_solver=GD, reuse_batch=True),
    "StocBiO": lambda p: tb.StocBiO(p, 0.1, lower_solver=GD, linear_solver=tb.Neumann(10, 0.1), reuse_batch=True),
}


def work(rank: int, size: int, store: str, rows: int, width: int, steps: int) -> None:
    """One rank: all methods; the first rank writes what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    sent, calls, reduce = [0], [0], dist.all_reduce

    def counted(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sent[0] += tensor.numel()
        calls[0] += 1
        return reduce(tensor, *arguments, **options)

    bare, latencies = torch.zeros(10 * width), []
    for _ in range(10 * steps):
        start = time.perf_counter()
        reduce(bare)
        latencies.append(time.perf_counter() - start)
    dist.all_reduce = counted
    found = []
    for name, build in METHODS.items():
        torch.manual_seed(0)
        x = torch.randn(rows, width)
        t = (x @ torch.randn(width, 10)).argmax(1)
        own = tuple(part.chunk(size)[rank] for part in (x, t))
        model = nn.Linear(width, 10)
        method = build(tb.BilevelProblem(Decay(2), model, upper_loss=upper_loss, lower_loss=lower_loss))
        times, before, called = [], sent[0], calls[0]
        for _ in range(steps + 1):
            dist.barrier()
            start = time.perf_counter()
            method.zero_grad()
            method.backward(lower=own, upper=own)
            method.step()
            times.append(time.perf_counter() - start)
        c, p, q = method.estimator.counts, 2, sum(t.numel() for t in method.problem.y)
        formula = (p + q + 1) * c.upper_gradients + (q + 1) * c.lower_gradients
        formula += q * c.hessian_products + p * c.jacobian_products
        found.append(
            {
                "method": name,
                "ranks": size,
                "rows": rows,
                "q": q,
                "seconds": median(times[1:]),
                "numbers": (sent[0] - before) / (steps + 1),
                "formula": formula / (steps + 1),
                "reduces": (calls[0] - called) / (steps + 1),
                "latency": median(latencies),
            }
        )
    if rank == 0:
        Path(f"{store}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure(size: int, rows: int, width: int, steps: int) -> list[Row]:
    """All methods on so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        mp.spawn(work, args=(size, store, rows, width, steps), nprocs=size)
        rows_found: list[Row] = json.loads(Path(f"{store}.json").read_text())
        return rows_found


def report(found: list[Row]) -> str:
    """Two tables."""
    lines = [
        "| method | data points | y | 1 rank, ms | 2 ranks, ms | ratio | all-reduces | alone, ms | numbers | formula |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    pairs = [(a, b) for a in found for b in found if a["ranks"] == 1 and b["ranks"] == 2]
    for a, b in pairs:
        if (a["method"], a["rows"]) == (b["method"], b["rows"]):
            one, two = 1e3 * a["seconds"], 1e3 * b["seconds"]
            lines.append(
                f"| {a['method']} | {a['rows']:,} | {a['q']:,} | {one:.1f} | {two:.1f} | {two / one:.2f} "
                f"| {b['reduces']:.0f} | {1e3 * b['reduces'] * b['latency']:.0f} "
                f"| {b['numbers']:,.0f} | {b['formula']:,.0f} |"
            )
    lines += ["", "| method | bytes per step | 8 ranks, ms | 16 | 32 | 64 |", "|---|---|---|---|---|---|"]
    for b in (b for b in found if b["ranks"] == 2 and b["rows"] == max(r["rows"] for r in found)):
        size = 4 * b["formula"]
        cells = [f"{1e3 * 2 * (r - 1) / r * size / (GBIT * 1e9 / 8):.2f}" for r in (8, 16, 32, 64)]
        lines.append(f"| {b['method']} | {size:,.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time and traffic of several ranks.")
    parser.add_argument("--smoke", action="store_true", help="small and short: does it work here?")
    parser.add_argument("--output", type=Path, help="folder for ranks.json")
    options = parser.parse_args(argv)
    sizes = [(200, 8, 2)] if options.smoke else [(1_000, 100, 15), (40_000, 100, 7)]
    found = [row for rows, width, steps in sizes for size in (1, 2) for row in measure(size, rows, width, steps)]
    print(report(found))
    print(
        f"\nTimes: median over steps. Second table: time of the bytes alone at {GBIT:g} Gbit/s per rank, by arithmetic."
    )
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "ranks.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
