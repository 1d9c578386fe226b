"""Adversarial training on handwritten digits: a network that withstands small changes of the pixels.

    min over x of max over y   mean_i cross entropy of the network x on image_i + y_i,
    |y_i| <= RADIUS in every pixel, and image_i + y_i stays between black and white

PGD training (Madry et al., 2018) is ``GDmax`` with sign steps from a random start, to which ``PerturbedGDmax`` adds
displacements at small gradients; plain training gets as many gradients. From the usual random weights no saddle is in
the way, and displacements give nothing. Weights that are all zero are a saddle, at which GDmax stays. The test is
stronger than the attack trained on: more and finer steps, five restarts, every point on the way counts. Settings were
chosen on seed 100.

    python -m examples.adversarial_digits
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import torchbilevel as tb
from examples.common import BLUE, GREEN, GREY, ORANGE, RED, arguments, mean_and_deviation, panels, save, seeds_named

N_TRAIN, N_TEST, STEPS, LR = 600, 600, 300, 0.5  # every step sees all training images
RADIUS = 0.1  # pixels are 0 to 1
ATTACK, STRONG, RESTARTS = 5, 40, 5  # steps of the attack trained on, steps of the one tested with
RADII = (0.0, 0.05, RADIUS, 0.2)
COLORS = {
    "plain training": GREY,
    "GDmax": ORANGE,
    "PerturbedGDmax": BLUE,
    "GDmax from 0": RED,
    "PerturbedGDmax from 0": GREEN,
}
Batch = tuple[Tensor, Tensor]


class Changes(nn.Module):
    """The lower module: a change of every training image."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.pixels = nn.Parameter(torch.zeros_like(images))


def robust_loss(net: nn.Module, changes: nn.Module, batch: Batch) -> Tensor:
    """What the network minimises and the changes maximise."""
    return F.cross_entropy(net(batch[0] + changes.pixels), batch[1])


def load(seed: int, device: str) -> tuple[Batch, Batch]:
    """Training and test images, split at random."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit("the digits need scikit-learn: pip install 'torchbilevel[examples]'") from error
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, t = torch.tensor(images / 16, dtype=torch.float32)[order].to(device), torch.tensor(labels)[order].to(device)
    test = slice(N_TRAIN, N_TRAIN + N_TEST)
    return (x[:N_TRAIN], t[:N_TRAIN]), (x[test], t[test])


def bounds(images: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """The smallest and the largest change of every pixel."""
    return (-images).clamp(min=-radius), (1 - images).clamp(max=radius)


def withstood(net: nn.Module, test: Batch, radius: float) -> float:
    """Share of the images, in percent, that no point on the way of any attack turned into another digit."""
    x, t = test
    for restart in range(RESTARTS):
        low, high = bounds(x, radius)
        y = low + (high - low) * torch.rand(x.shape, generator=torch.Generator().manual_seed(restart)).to(x)
        kept = net(x).argmax(1) == t
        for step in range(STRONG + 1):
            y.requires_grad_()
            outputs = net(x + y)
            kept &= outputs.argmax(1) == t
            (g,) = torch.autograd.grad(F.cross_entropy(outputs, t), y)
            y = torch.clamp(y.detach() + radius / 2 * (1 - step / STRONG) * g.sign(), low, high)
        x, t = x[kept], t[kept]  # the next attack is on those that are left
        if radius == 0 or not len(x):
            break
    return 100 * len(x) / len(test[0])


class Run(NamedTuple):
    seed: int
    method: str
    accuracies: list[float]  # on test images under the strong attack, in percent, by radius
    curve: list[tuple[int, float]]  # gradients so far, and the training loss under attack
    displacements: int


def train(seed: int, name: str, steps: int, device: str, bar: Any) -> Run:
    """Train one network; all methods of a seed have the same images and the same number of gradients."""
    batch, test = load(seed, device)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).to(device)
    if name.endswith("from 0"):
        for p in net.parameters():
            nn.init.zeros_(p)
    low, high = bounds(batch[0], RADIUS)
    problem = tb.MinimaxProblem(
        net,
        Changes(batch[0]),
        robust_loss,
        projection=tb.projections.box(low, high),
        lower_init=lambda net: torch.empty_like(low).uniform_(-RADIUS, RADIUS),
    )
    how: dict[str, Any] = {"lower_solver": tb.SignGD(lr=RADIUS / 4, steps=ATTACK), "warm_start": False, "seed": seed}
    bar.set_description(f"seed {seed}, {name}")
    trace, events = tb.Trace(), []
    if name == "plain training":
        optimizer = torch.optim.SGD(net.parameters(), lr=LR)
        for step in range(steps * (ATTACK + 1)):
            optimizer.zero_grad()
            F.cross_entropy(net(batch[0]), batch[1]).backward()
            optimizer.step()
            bar.update(step % (ATTACK + 1) == 0)
    else:
        if name.startswith("GDmax"):
            method: tb.Method = tb.GDmax(problem, LR, **how)
        else:
            method = tb.PerturbedGDmax(problem, LR, radius=0.3, grad_tol=0.1, **how)
        for _ in range(steps):
            method.zero_grad()
            loss = method.backward(batch)
            method.step()
            trace.record(method, loss)
            bar.update()
        events = method.events
    accuracies = [withstood(net, test, radius) for radius in RADII]
    curve = [(row["oracle_calls"], row["loss"]) for row in trace.rows]
    return Run(seed, name, accuracies, curve, sum(event.kind == "perturbation" for event in events))


def report(runs: list[Run], steps: int) -> None:
    """Mean and standard deviation over the seeds, a row per method, and what the displacements were good for."""
    seeds = len({run.seed for run in runs})
    print(f"\n{N_TRAIN} training and {N_TEST} test images; {steps * (ATTACK + 1)} gradients per network, attacked by")
    print(f"{ATTACK} steps of radius {RADIUS}; tested by {RESTARTS} times {STRONG} steps, all points on the way count.")
    print(f"Test accuracy in % by radius, mean (sd over {seeds_named(seeds)}).\n")
    row = "{:<22}" + "{:>13}" * len(RADII) + "{:>15}"
    print(row.format("", *RADII, "displacements"))
    means = {}
    for name in COLORS:
        own = [run for run in runs if run.method == name]
        cells = [mean_and_deviation(column) for column in zip(*(run.accuracies for run in own), strict=True)]
        moved = sum(run.displacements for run in own) / seeds
        means[name] = [float(mean) for mean, _ in cells]
        print(row.format(name, *(mean if sd == "-" else f"{mean} ({sd})" for mean, sd in cells), f"{moved:.1f}"))
    print()
    for start, words in (("", "random weights"), (" from 0", "weights zero")):
        gain = means[f"PerturbedGDmax{start}"][2] - means[f"GDmax{start}"][2]
        print(f"From {words}, displacements are worth {gain:+.1f} points at radius {RADIUS}.")


def draw(runs: list[Run], path: Path) -> None:
    """Left: the training loss. Right: accuracy by the radius of the attack."""
    seeds = len({run.seed for run in runs})
    figure, ax = panels([["loss", "radius"]], (12.5, 4.4))
    for name, color in COLORS.items():
        own, style = [run for run in runs if run.method == name], "--" if name == "PerturbedGDmax" else "-"
        for run in own:
            ax["loss"].plot(*zip(*run.curve or [(0, 0)], strict=True), style, color=color, lw=1, alpha=0.7)
        table = torch.tensor([run.accuracies for run in own])
        error = table.std(0).tolist() if seeds > 1 else None
        ax["radius"].errorbar(RADII, table.mean(0).tolist(), error, fmt="o" + style, color=color, label=name)
    ax["loss"].set(xlabel="gradients", ylabel="training loss under attack", ylim=(0, 2.6))
    ax["loss"].set_title("A line per seed")
    ax["radius"].set(xlabel=f"radius of the test's attack (trained on: {RADIUS})", ylabel="test accuracy (%)")
    ax["radius"].set_ylim(0, 100)
    ax["radius"].set_title(f"Mean and standard deviation over {seeds_named(seeds)}")
    ax["radius"].legend(fontsize=9)
    figure.suptitle("Adversarial training on digits", x=0.01, ha="left", weight="bold")
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Run, print, draw."""
    options = arguments("Train networks that withstand small changes of the pixels.", seeds=5).parse_args(argv)
    seeds, steps = (1, 20) if options.smoke else (options.seeds, STEPS)
    with tqdm(total=seeds * steps * len(COLORS), unit="step", smoothing=0, ncols=100) as bar:
        runs = [train(seed, name, steps, options.device, bar) for seed in range(seeds) for name in COLORS]
    report(runs, steps)
    options.output.mkdir(parents=True, exist_ok=True)
    table, picture = options.output / "adversarial_digits.csv", options.output / "adversarial_digits.png"
    with table.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "seed", "gradients", "displacements", *(f"radius {radius}" for radius in RADII)])
        for r in runs:
            numbers = [f"{number:.2f}" for number in r.accuracies]
            writer.writerow([r.method, r.seed, steps * (ATTACK + 1), r.displacements, *numbers])
    draw(runs, picture)
    print(f"\nFigure: {picture}, all numbers: {table}")


if __name__ == "__main__":
    main()
