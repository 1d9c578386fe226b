"""Moving a cloud of points onto another by entropic optimal transport, as a minimax problem.

    min over positions x of max over potentials y   mean_i y_i + mean_j v_j(y) - mean(y)^2 / 2,
    v_j(y) = -eps log mean_i exp((y_i - |x_i - target_j|^2 / 2) / eps)

The maximum is the entropic cost of transport (the last term only makes y unique), and the gradient in x is Danskin's.
Both are checked against Sinkhorn's iterations. From a cloud spread at random GDmax is all it takes, and displacements
give nothing. A cloud in one point, at the mean of the target, is stationary by symmetry, and a strict saddle where the
largest variance of the target exceeds eps: the smallest eigenvalue of hess Phi is (1 - variance / eps) / n. There GDmax
stays.

    python -m examples.optimal_transport
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import torchbilevel as tb
from examples.common import BLUE, GREY, ORANGE, arguments, mean_and_deviation, panels, save, seeds_named

N, EPS, STEPS, INNER = 40, 0.1, 100, 10
NAMES = [f"{method}, {start}" for start in ("spread", "one point") for method in ("GDmax", "PerturbedGDmax")]


class Vector(nn.Module):
    """Positions, or potentials."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)


def costs(x: Tensor, target: Tensor) -> Tensor:
    """|x_i - target_j|^2 / 2."""
    return (x[:, None] - target).square().sum(-1) / 2


def softmin(t: Tensor, dim: int) -> Tensor:
    """-eps log mean exp(-t / eps): the best potential of one side, given that of the other."""
    return EPS * math.log(t.shape[dim]) - EPS * torch.logsumexp(-t / EPS, dim)


def dual(positions: nn.Module, potentials: nn.Module, target: Tensor) -> Tensor:
    """What the positions minimise and the potentials maximise."""
    y = potentials.values
    v = softmin(costs(positions.values, target) - y[:, None], 0)
    return y.mean() + v.mean() - y.mean().square() / 2


def sinkhorn(x: Tensor, target: Tensor, iterations: int = 1000) -> tuple[Tensor, Tensor]:
    """The cost of transport and its gradient in x, without autograd."""
    c, y = costs(x, target), torch.zeros_like(x[:, 0])
    for _ in range(iterations):
        v = softmin(c - y[:, None], 0)
        y = softmin(c - v, 1)
    plan = ((y[:, None] + v - c) / EPS).exp() / (len(x) * len(target))
    return y.mean() + v.mean(), plan.sum(1, keepdim=True) * x - plan @ target


class Run(NamedTuple):
    seed: int
    name: str
    cloud: Tensor
    target: Tensor
    curve: list[float]  # cost of transport as the method sees it
    cost: float  # at the end, by Sinkhorn's iterations
    error: float  # of n times the gradient at the end: root of the mean square over the points
    curvature: float  # n times the smallest eigenvalue of hess Phi at the end
    verdict: str
    gradients: int
    displacements: int


def move(seed: int, name: str, steps: int, device: str, bar: Any) -> Run:
    """Move one cloud; all methods of a seed have the same target, and cost INNER + 1 gradients per step."""
    bar.set_description(f"seed {seed}, {name}")
    generator = torch.Generator().manual_seed(seed)
    angle = 2 * math.pi * torch.rand(N, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, N, 2, generator=generator, dtype=torch.float64)
    target = (torch.stack([1.5 * angle.cos(), angle.sin()], 1) + 0.1 * noise[0]).to(device)
    start = 0.3 * noise[1].to(device) if name.endswith("spread") else target.mean(0).expand(N, 2).clone()
    positions, potentials = Vector(start), Vector(torch.zeros_like(start[:, 0]))
    problem = tb.MinimaxProblem(positions, potentials, dual)
    lr, solver = 0.2 * N, tb.GD(lr=N * EPS, steps=INNER, momentum=0.5)
    if name.startswith("GDmax"):
        method: tb.Method = tb.GDmax(problem, lr, lower_solver=solver, seed=seed)
    else:
        method = tb.PerturbedGDmax(problem, lr, radius=1e-2, grad_tol=1e-3, lower_solver=solver, seed=seed)
    curve = []
    for _ in range(steps):
        method.zero_grad()
        curve.append(method.backward(target).item())
        method.step()
        bar.update()
    gradients = method.estimator.counts.upper_gradients
    method.zero_grad()
    method.backward(target)
    cost, gradient = sinkhorn(positions.values.detach(), target)
    assert positions.values.grad is not None
    error = N * (positions.values.grad - gradient).square().sum(1).mean().sqrt().item()
    found = tb.certify(problem, target, grad_tol=2e-3, curvature_tol=0.1 / N)
    cloud = positions.values.detach().cpu()
    moved = sum(event.kind == "perturbation" for event in method.events)
    numbers = curve, cost.item(), error, N * found.lambda_min, found.verdict, gradients, moved
    return Run(seed, name, cloud, target.cpu(), *numbers)


def report(runs: list[Run]) -> None:
    """Mean and standard deviation over the seeds, a row per method and start."""
    seeds = len({run.seed for run in runs})
    print(f"\n{N} points onto {N} others, eps = {EPS}; mean (sd over {seeds_named(seeds)}).\n")
    row = "{:<27}{:>16}{:>16}{:>15}{:>15}   {}"
    print(row.format("", "cost", "gradient error", "n lambda_min", "displacements", "certificate"))
    for name in NAMES:
        own = [run for run in runs if run.name == name]
        columns = (("cost", ".4f"), ("error", ".0e"), ("curvature", ".2f"))
        cells = [mean_and_deviation([getattr(run, field) for run in own], form) for field, form in columns]
        verdicts = ", ".join(f"{v} ({sum(r.verdict == v for r in own)})" for v in sorted({run.verdict for run in own}))
        moved = f"{sum(run.displacements for run in own) / seeds:.1f}"
        print(row.format(name, *(mean if sd == "-" else f"{mean} ({sd})" for mean, sd in cells), moved, verdicts))
    expected = [1 - torch.linalg.eigvalsh(torch.cov(run.target.T, correction=0))[-1].item() / EPS for run in runs]
    print(f"\nClosed form of n lambda_min for a cloud in one point: {mean_and_deviation(expected, '.2f')[0]}.")
    print("Cost: by Sinkhorn's iterations. Gradient error: against theirs, per point, in units of length.")


def draw(runs: list[Run], path: Path) -> None:
    """Clouds and targets of the first seed, and the costs along the run."""
    figure, ax = panels([[*NAMES[:2], "cost"], [*NAMES[2:], "cost"]], (13, 5.6), width_ratios=(1, 1, 1.1))
    for name, color in zip(NAMES, (ORANGE, BLUE, ORANGE, BLUE), strict=True):
        own = [run for run in runs if run.name == name]
        ax[name].plot(*own[0].target.T.tolist(), "o", ms=6, color=GREY, alpha=0.5)
        ax[name].plot(*own[0].cloud.T.tolist(), ".", ms=6, color=color)
        ax[name].set(xlim=(-2, 2), ylim=(-1.6, 1.6), aspect="equal", title=name)
        for run in own:
            style = "--" if name.endswith("spread") else "-"
            ax["cost"].plot(run.curve, style, color=color, lw=1, label=name if run is own[0] else None)
    ax["cost"].set(xlabel="steps", ylabel="entropic cost", title="A line per seed")
    ax["cost"].legend(fontsize=8)
    figure.suptitle("Optimal transport: clouds after the run (seed 0), targets grey", x=0.01, ha="left", weight="bold")
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Run, print, draw."""
    options = arguments("Move clouds of points by entropic optimal transport.", seeds=5).parse_args(argv)
    seeds, steps = (1, 60) if options.smoke else (options.seeds, STEPS)
    with tqdm(total=seeds * steps * len(NAMES), unit="step", smoothing=0, ncols=100) as bar:
        runs = [move(seed, name, steps, options.device, bar) for seed in range(seeds) for name in NAMES]
    report(runs)
    options.output.mkdir(parents=True, exist_ok=True)
    table, picture = options.output / "optimal_transport.csv", options.output / "optimal_transport.png"
    with table.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = "start,method,seed,gradients,displacements,cost,gradient error,n lambda_min,certificate"
        writer.writerow(columns.split(","))
        for r in runs:
            numbers = (f"{r.cost:.6f}", f"{r.error:.1e}", f"{r.curvature:.4f}")
            method, start = r.name.split(", ")
            writer.writerow([start, method, r.seed, r.gradients, r.displacements, *numbers, r.verdict])
    draw(runs, picture)
    print(f"\nFigure: {picture}, all numbers: {table}")


if __name__ == "__main__":
    main()
