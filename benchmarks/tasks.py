"""Tasks side by side against a loop over them: time per hypergradient of a meta-batch, in one run.

    python -m benchmarks.tasks [--smoke] [--device cpu|cuda] [--output DIR]

The network is that of ``examples.few_shot``, an MLP 64-64-5 with episodes of 5 classes and 5 images each. ``TaskBatch``
evaluates all tasks of a batch in one call; the loop has one problem per task, all over one upper module, whose
hypergradients add up in ``.grad``, and takes the same estimator. That both give the same numbers is what
``tests/test_task_batch.py`` checks, and what is checked here once before the clock runs.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchbilevel as tb
from benchmarks.cost import Meter, describe

WAYS, SHOTS, INPUTS, HIDDEN, PROXIMAL = 5, 5, 64, 64, 2.0
Make = Callable[[], tb.Estimator]
FIELDS: dict[str, Make] = {
    "MAML, 5 steps": lambda: tb.Unrolled(tb.GD(0.1, 5), warm_start=False),
    "iMAML, 5 steps, CG 5": lambda: tb.Implicit(tb.GD(0.1, 5), tb.CG(5, None), warm_start=False),
    "iMAML, tol 1e-2, CG 1e-3": lambda: tb.Implicit(tb.GD(0.1, 30, tol=1e-2), tb.CG(30, 1e-3), warm_start=False),
}


def proximal(tasks: nn.Module, net: nn.Module) -> Tensor:
    """|y - x|^2, summed over tasks where y has them."""
    pairs = zip(tasks.parameters(), net.parameters(), strict=True)
    return torch.stack([(p - q).square().sum() for p, q in pairs]).sum()


def side_by_side(net: nn.Module, m: int) -> tb.BilevelProblem:
    """All tasks in one problem."""

    def loss(tasks: Any, batch: Any) -> Tensor:
        values: Tensor = tasks.losses(F.cross_entropy, *batch)
        return values

    return tb.BilevelProblem(
        net,
        tb.TaskBatch(net, m),
        upper_loss=lambda net, tasks, batch: loss(tasks, batch).mean(),
        lower_loss=lambda net, tasks, batch: loss(tasks, batch).sum() + PROXIMAL / 2 * proximal(tasks, net),
        lower_init=lambda net: net.parameters(),
    )


def single(net: nn.Module) -> tb.BilevelProblem:
    """One task."""
    return tb.BilevelProblem(
        net,
        copy.deepcopy(net),
        upper_loss=lambda net, own, batch: F.cross_entropy(own(batch[0]), batch[1]),
        lower_loss=lambda net, own, batch: F.cross_entropy(own(batch[0]), batch[1]) + PROXIMAL / 2 * proximal(own, net),
        lower_init=lambda net: net.parameters(),
    )


def runs(make: Make, m: int, device: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """One hypergradient of m tasks, side by side and in a loop; both return it as a vector."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WAYS)).to(device)
    labels = torch.arange(WAYS, device=device).repeat_interleave(SHOTS).expand(m, -1)
    train, test = ((torch.randn(m, WAYS * SHOTS, INPUTS, device=device), labels) for _ in range(2))
    together = make().bind(side_by_side(net, m))
    alone = [make().bind(single(net)) for _ in range(m)]

    def gradient() -> Tensor:
        return torch.cat([p.grad.reshape(-1) for p in net.parameters() if p.grad is not None])

    def batched() -> Tensor:
        net.zero_grad()
        together.backward(lower=train, upper=test)
        return gradient()

    def looped() -> Tensor:
        net.zero_grad()
        for i, estimator in enumerate(alone):
            estimator.backward(lower=(train[0][i], train[1][i]), upper=(test[0][i], test[1][i]))
        return gradient() / m

    return looped, batched


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--smoke", action="store_true", help="4 tasks, two repetitions")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, help="folder for tasks.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    meter = Meter(options.device, 1, seconds=0.2 if options.smoke else 8.0)
    rows = []
    for m in (4,) if options.smoke else (8, 32):
        for name, make in FIELDS.items():
            looped, batched = runs(make, m, options.device)
            torch.testing.assert_close(looped(), batched(), rtol=1e-3, atol=1e-5)
            rows.append(meter.time(f"{m} tasks", name, looped, batched))
            print(
                f"{rows[-1].problem:<9} {name:<25} loop {rows[-1].floor:8.1f} ms   side by side {rows[-1].ours:8.1f} ms"
                f"   {1 / rows[-1].ratio:5.1f} times as fast",
                flush=True,
            )
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        record = {"machine": describe(options.device, 1), "rows": [asdict(row) for row in rows]}
        (options.output / "tasks.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
