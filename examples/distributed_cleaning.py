"""Hyper-cleaning on several processes: the script of one process, each rank with its share of the data.

    python -m examples.distributed_cleaning
    torchrun --nproc-per-node 2 -m examples.distributed_cleaning

Both print the same numbers. What makes the second line work are the six lines marked "ranks": a process group, and
batches that are this rank's rows. Gradients and products of second derivatives are averaged over the ranks inside the
package before they enter a solver; modules need no wrapper. Every rank holds all weights and the whole classifier. A
problem this small is slower on two ranks than on one: the example is about being right (docs/scaling.md is about time).
"""

from __future__ import annotations

import argparse
import os
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

import torchbilevel as tb
from examples.hyper_cleaning import L2, Weights, accuracy, fit, load, penalty, validation_loss

Batch = tuple[Tensor, Tensor, Tensor]  # images, labels, row numbers


def training_loss(weights: nn.Module, model: nn.Module, batch: Batch) -> Tensor:
    """The lower loss on some rows; its mean over equal shards is that over all rows."""
    images, labels, rows = batch
    return (weights()[rows] * F.cross_entropy(model(images), labels, reduction="none")).mean() + penalty(model, L2)


def main(argv: list[str] | None = None) -> None:
    """Train, and print what one process prints."""
    parser = argparse.ArgumentParser(description="Hyper-cleaning with torch.distributed.")
    parser.add_argument("--seed", type=int, default=0, help="of split and wrong labels (default: 0)")
    parser.add_argument("--smoke", action="store_true", help="a few steps: does it work here?")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)

    if "RANK" in os.environ:  # ranks
        dist.init_process_group("gloo")  # ranks; "nccl" where every rank has a GPU
    rank = dist.get_rank() if dist.is_initialized() else 0  # ranks
    size = dist.get_world_size() if dist.is_initialized() else 1  # ranks

    data = load(options.seed, "cpu")
    rows = torch.arange(len(data.train[1]))
    train = tuple(t.chunk(size)[rank] for t in (data.train[0].double(), data.train[1], rows))  # ranks
    validation = tuple(t.chunk(size)[rank] for t in (data.validation[0].double(), data.validation[1]))  # ranks

    weights, model = Weights(len(rows)), fit((data.train[0].double(), data.train[1]))
    problem = tb.BilevelProblem(weights, model, upper_loss=validation_loss, lower_loss=training_loss)
    problem.check(lower=train, upper=validation)
    method = tb.AIDBiO(
        problem,
        lr=100.0,
        lower_solver=tb.GD(lr=1.0, steps=20, momentum=0.9),
        linear_solver=tb.CG(max_iter=20, tol=1e-3),
    )
    steps, start = 5 if options.smoke else 60, time.perf_counter()
    for _ in trange(steps, disable=rank > 0, unit="step", ncols=100):
        method.zero_grad()
        loss = method.backward(lower=train, upper=validation)
        method.step()
    seconds = time.perf_counter() - start

    method.refresh()  # let the classifier follow the last step of the weights: a solve, so all ranks take part
    if rank == 0:
        learned = weights().detach()
        auc = (learned[~data.wrong][:, None] > learned[data.wrong]).double().mean().item()
        test = accuracy(model, (data.test[0].double(), data.test[1]))
        print(f"{size} rank{'s' * (size > 1)}, {steps} steps of AIDBiO, seed {options.seed}")
        print(f"validation loss {loss.item():.10f}, test accuracy {test:.2f} %, AUC of wrong labels {auc:.6f}")
        print(f"{1e3 * seconds / steps:.1f} ms per step")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
