"""A small GAN on a ring of eight Gaussians: min over a generator of max over a discriminator.

    f(x, y) = mean log D_y(real) + mean log(1 - D_y(G_x(noise))) - L2 |y|^2 / 2

The usual loop alternates Adam on both. In one line it is ``Danskin`` with ``tb.Adam`` below and ``torch.optim.Adam``
above; ``Perturbed`` around the latter adds displacements at small gradients, which is no gain here. ``SGDA`` and
``SGDmax`` are plain descent and ascent. All get the same number of gradients of f; ``SGDA`` moves both networks by
each, the others one of them. Settings were chosen on seed 100.

    python -m examples.gan_mixture
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import torchbilevel as tb
from examples.common import BLUE, GREEN, GREY, ORANGE, RED, arguments, mean_and_deviation, panels, save, seeds_named

GRADIENTS, BATCH, NOISE, L2 = 3600, 128, 8, 1e-3
MODES, WIDTH, SHOWN = 8, 0.1, 1000  # Gaussians on a circle of radius 2, their standard deviation; samples to judge by
ADAM: dict[str, Any] = {"lr": 1e-3, "betas": (0.5, 0.9)}
COLORS = {"Adam, torch loop": ORANGE, "Adam, escaping": BLUE, "SGDA": GREEN, "SGDmax": RED}


def circle(points: int, radius: float) -> Tensor:
    """Points on a circle; of radius 2 they are the means of the mixture."""
    angle = torch.arange(points) * 2 * math.pi / points
    return radius * torch.stack([angle.cos(), angle.sin()], 1)


def network(inputs: int, outputs: int) -> nn.Sequential:
    """Generator or discriminator."""
    return nn.Sequential(nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, outputs))


def value(generator: nn.Module, discriminator: nn.Module, real: Tensor) -> Tensor:
    """f; its noise is drawn inside, and replayed where the package evaluates twice on one sample."""
    fake = generator(torch.randn(len(real), NOISE, device=real.device))
    penalty = torch.stack([p.square().sum() for p in discriminator.parameters()]).sum()
    scores = F.logsigmoid(discriminator(real)).mean() + F.logsigmoid(-discriminator(fake)).mean()
    return scores - L2 / 2 * penalty


def build(name: str, generator: nn.Module, discriminator: nn.Module, seed: int) -> tuple[tb.Method, int]:
    """A method of the package, and how many gradients its step costs."""
    problem = tb.MinimaxProblem(generator, discriminator, value)
    if name == "SGDA":
        return tb.SGDA(problem, 0.05, lower_solver=tb.GD(lr=0.2, steps=1), batch_size=BATCH, seed=seed), 1
    if name == "SGDmax":
        return tb.SGDmax(problem, 0.1, lower_solver=tb.GD(lr=0.2, steps=3), batch_size=BATCH, seed=seed), 4
    estimator = tb.Danskin(tb.Adam(steps=1, **ADAM), batch_sizes=tb.BatchSizes(BATCH), seed=seed)
    adam = torch.optim.Adam(generator.parameters(), **ADAM)
    return tb.Method(problem, estimator, tb.optim.Perturbed(adam, radius=0.1, grad_tol=0.03, seed=seed)), 2


def judge(samples: Tensor, means: Tensor) -> tuple[int, float]:
    """Modes covered, and good samples in percent.

    A sample is good within 3 standard deviations of a centre; a mode is covered by a quarter of its share of good ones.
    """
    distance, nearest = torch.cdist(samples, means).min(1)
    good = distance < 3 * WIDTH
    covered = torch.bincount(nearest[good], minlength=MODES) >= len(samples) / MODES / 4
    return int(covered.sum()), 100 * good.float().mean().item()


class Run(NamedTuple):
    seed: int
    method: str
    samples: Tensor  # of the trained generator
    modes: int
    good: float
    gradients: int
    displacements: int


def train(seed: int, name: str, gradients: int, device: str, bar: Any) -> Run:
    """Train one GAN; all methods of a seed start from the same networks."""
    bar.set_description(f"seed {seed}, {name}")
    torch.manual_seed(seed)
    means = circle(MODES, 2.0).to(device)
    generator, discriminator = network(NOISE, 2).to(device), network(2, 1).to(device)
    pool = means.repeat(1000, 1) + WIDTH * torch.randn(1000 * MODES, 2).to(device)
    source, displacements = tb.sample(pool, seed=seed), 0
    if name == "Adam, torch loop":
        below, above = (torch.optim.Adam(net.parameters(), **ADAM) for net in (discriminator, generator))
        for _ in range(gradients // 2):
            for optimizer, sign in ((below, -1), (above, 1)):
                optimizer.zero_grad()
                (sign * value(generator, discriminator, source(BATCH))).backward()
                optimizer.step()
            bar.update(2)
    else:
        method, cost = build(name, generator, discriminator, seed)
        for _ in range(gradients // cost):
            method.zero_grad()
            method.backward(source)
            method.step()
            bar.update(cost)
        displacements = sum(event.kind == "perturbation" for event in method.events)
        gradients = method.estimator.counts.upper_gradients
    with torch.no_grad():
        samples = generator(torch.randn(SHOWN, NOISE, generator=torch.Generator().manual_seed(0)).to(device))
    return Run(seed, name, samples.cpu(), *judge(samples, means), gradients, displacements)


def report(runs: list[Run], gradients: int) -> None:
    """Mean and standard deviation over the seeds, a row per method."""
    seeds = len({run.seed for run in runs})
    print(f"\nRing of {MODES} Gaussians, {gradients} gradients of f each; mean (sd over {seeds_named(seeds)}).\n")
    row = "{:<20}{:>16}{:>20}{:>16}"
    print(row.format("", "modes covered", "good samples in %", "displacements"))
    for name in COLORS:
        own = [run for run in runs if run.method == name]
        cells = [mean_and_deviation([getattr(run, field) for run in own]) for field in ("modes", "good")]
        moved = sum(run.displacements for run in own) / seeds
        print(row.format(name, *(mean if sd == "-" else f"{mean} ({sd})" for mean, sd in cells), f"{moved:.1f}"))
    good = {(run.method, run.seed): run.good for run in runs}
    gain = [good["Adam, escaping", seed] - good["Adam, torch loop", seed] for seed in range(seeds)]
    mean, sd = mean_and_deviation(gain)
    print(f"\nGood: within {3 * WIDTH:.1f} of a centre. Displacements change their share by {mean} points (sd {sd}).")


def draw(runs: list[Run], path: Path) -> None:
    """Samples of the first seed, and the modes of all."""
    figure, ax = panels([[*COLORS, "modes"]], (15, 3.4))
    rim = circle(60, 3 * WIDTH)
    for k, (name, color) in enumerate(COLORS.items()):
        own = [run for run in runs if run.method == name]
        ax[name].plot(*own[0].samples.T.tolist(), ".", ms=2, color=color)
        for mean in circle(MODES, 2.0):
            ax[name].plot(*(mean + rim).T.tolist(), color=GREY, lw=1)
        ax[name].set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", title=f"{name}: {own[0].good:.0f} % good")
        ax["modes"].bar(k, sum(run.modes for run in own) / len(own), color=color, alpha=0.5)
        ax["modes"].plot([k + 0.1 * (run.seed - len(own) // 2) for run in own], [run.modes for run in own], "k.")
    ax["modes"].set_xticks(range(len(COLORS)), [name.replace(", ", ",\n") for name in COLORS], fontsize=8)
    ax["modes"].set(ylabel=f"modes covered, of {MODES}", title="Bars: mean; dots: each seed")
    title = "GAN on a ring of Gaussians, samples of seed 0; good ones are in circles"
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Run, print, draw."""
    options = arguments("Train small GANs on a ring of Gaussians.", seeds=5).parse_args(argv)
    seeds, gradients = (1, 300) if options.smoke else (options.seeds, GRADIENTS)
    with tqdm(total=seeds * gradients * len(COLORS), unit="gradient", smoothing=0, ncols=100) as bar:
        runs = [train(seed, name, gradients, options.device, bar) for seed in range(seeds) for name in COLORS]
    report(runs, gradients)
    options.output.mkdir(parents=True, exist_ok=True)
    table, picture = options.output / "gan_mixture.csv", options.output / "gan_mixture.png"
    with table.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "seed", "gradients", "displacements", "modes", "good samples"])
        for r in runs:
            writer.writerow([r.method, r.seed, r.gradients, r.displacements, r.modes, f"{r.good:.1f}"])
    draw(runs, picture)
    print(f"\nFigure: {picture}, all numbers: {table}")


if __name__ == "__main__":
    main()
