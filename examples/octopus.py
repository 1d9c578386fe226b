"""Ten saddles in a row: AIDBiO waits longer at each of them, PerturbedAID does not.

The octopus of Du et al. (2017) has d saddles, one after the other, before its minimum. Here it is the upper loss of a
bilevel problem whose lower level is a quadratic with y*(x) = x, so that both methods see hypergradients through 20 steps
on y and 20 terms of a Neumann series. While plain descent grows out of one saddle it is drawn into the next, and so each
wait is a multiple of the one before. A random displacement, taken where the hypergradient is small, makes all waits equal.

    python -m examples.octopus
"""

from __future__ import annotations

import csv
import math
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import torchbilevel as tb
from benchmarks import octopus
from examples.common import BLUE, GREY, ORANGE, arguments, axes, save

D, GAMMA, KAPPA = 10, 1.0, 10.0
RADIUS = GRAD_TOL = math.e / 100
METHODS = ("AIDBiO", "PerturbedAID")


class Run(NamedTuple):
    L: float
    method: str
    seed: int
    values: Tensor  # Phi(x_0), Phi(x_1), ...
    times: list[int]  # the step at which saddle 1, 2, ... was left behind
    counts: Any  # oracle calls


def train(L: float, name: str, seed: int, steps: int, device: str, bar: Any) -> Run:
    """One run of one method from a random start."""
    upper, lower = octopus.modules(D, L, GAMMA, KAPPA, seed=seed)  # two nn.Modules: upper.x and lower.y are the variables
    problem = tb.BilevelProblem(
        upper.to(device), lower.to(device), upper_loss=octopus.upper_loss, lower_loss=octopus.lower_loss
    )
    settings: dict[str, Any] = {
        "lr": 1 / (4 * L),
        "lower_solver": tb.GD(lr=1.0, steps=20),
        "linear_solver": tb.Neumann(steps=20, lr=1.0),
    }
    if name == "AIDBiO":
        method = tb.AIDBiO(problem, **settings)
    else:
        method = tb.PerturbedAID(problem, radius=RADIUS, grad_tol=GRAD_TOL, escape_steps=10, seed=seed, **settings)
    path = [upper.x.detach().clone()]
    bar.set_description(f"L = {L:g}, seed {seed}, {name:12}")
    for _ in range(steps):
        method.zero_grad()
        method.backward()
        method.step()
        path.append(upper.x.detach().clone())
        bar.update()
    points = torch.stack(path).cpu()
    return Run(L, name, seed, octopus.octopus(points, L, GAMMA), octopus.left_behind(points), method.estimator.counts)


def predicted_gap(L: float) -> float:
    """Steps from one saddle to the next with perturbations: the way in, then the way out.

    In: |grad Phi| starts at 4 L tau and halves in each step until it is below 4/5 grad_tol. Out: a coordinate of the
    displacement, typically radius / sqrt(d + 2), grows by 1 + gamma / (2 L) per step until it passes 2 tau.
    """
    way_in = math.log2(4 * L * octopus.TAU / (0.8 * GRAD_TOL))
    return way_in + math.log(2 * octopus.TAU * math.sqrt(D + 2) / RADIUS) / math.log1p(GAMMA / (2 * L))


def time(run: Run, k: int) -> float:
    """When saddle k (from 1) was left behind; infinity if it never was."""
    return run.times[k - 1] if k <= len(run.times) else math.inf


def median_and_range(values: list[float], form: str = ".0f") -> tuple[str, str]:
    """Texts; a ``+`` stands for never within the run, a ``-`` for no value at all."""
    low, middle, high = (f"{v:{form}}" for v in (min(values), statistics.median_low(values), max(values)))
    if math.isinf(min(values)):
        return "-", ""
    return "-" if math.isinf(statistics.median_low(values)) else middle, f"{low}+" if high == "inf" else f"{low}-{high}"


def report(runs: list[Run], L: float, steps: int) -> None:
    """Print when saddles were left behind, how this compares with the prediction, and what it cost."""
    runs = [run for run in runs if run.L == L]
    seeds = len(runs) // len(METHODS)
    print(f"\nOctopus, d = {D}, L = {L:g}, gamma = {GAMMA:g}, kappa = {KAPPA:g}: seeds 0-{seeds - 1}, {steps} steps each")
    print("Step at which each saddle was left behind: median, and min-max over the seeds (+: some never)\n")
    print(f"{'saddle':13}" + "".join(f"{k:>8}" for k in range(1, D + 1)))
    for name in METHODS:
        texts = [median_and_range([time(run, k) for run in runs if run.method == name]) for k in range(1, D + 1)]
        print(f"{name:13}" + "".join(f"{middle:>8}" for middle, _ in texts))
        print(f"{'':13}" + "".join(f"{spread:>8}" for _, spread in texts))
    ratios, gaps = growth(runs)
    ratio, gap = median_and_range(ratios, ".2f"), median_and_range(gaps, ".1f")
    closed = octopus.time_ratio(L, GAMMA)
    print(f"\nAIDBiO        each time is {ratio[0]} ({ratio[1]}) times the one before; closed form {closed:.2f}")
    print(f"PerturbedAID  one saddle every {gap[0]} ({gap[1]}) steps; estimate {predicted_gap(L):.1f}")
    last = statistics.median_low(len(run.times) for run in runs if run.method == "AIDBiO")
    reached = statistics.median_low(time(run, last) for run in runs if run.method == "AIDBiO")
    print(f"At its rate AIDBiO would leave saddle {D} behind at step {reached * closed ** (D - last):,.0f}.\n")
    print(f"{'oracle calls':13}{'grad f':>9}{'grad g':>9}{'g_yy s':>9}{'g_xy s':>9}{'saddles left':>14}{'calls per saddle':>18}")
    for name in METHODS:
        own = [run for run in runs if run.method == name]
        c = own[0].counts  # the same for every seed: no step stops early
        calls = (c.upper_gradients, c.lower_gradients, c.hessian_products, c.jacobian_products)
        left, spread = median_and_range([len(run.times) for run in own])
        until = [run.times[-1] / len(run.times) * sum(calls) / steps for run in own]
        cost = f"{statistics.median(until):,.0f}"
        print(f"{name:13}" + "".join(f"{n:>9,}" for n in calls) + f"{f'{left} ({spread})':>14}{cost:>18}")


def growth(runs: list[Run]) -> tuple[list[float], list[float]]:
    """Per seed, the ratio of AIDBiO's last two times, and the mean gap between PerturbedAID's times."""
    ratios = [run.times[-1] / run.times[-2] for run in runs if run.method == "AIDBiO"]
    gaps = [(t[-1] - t[0]) / (len(t) - 1) for t in (run.times for run in runs if run.method == "PerturbedAID")]
    return ratios, gaps


def draw(runs: list[Run], steps: int, path: Path) -> None:
    """Left: the descent, for the smallest L. Right: when each saddle was left behind, for all L."""
    curvatures = sorted({run.L for run in runs})
    seeds = len({run.seed for run in runs})
    figure, ax = axes([["stairs", "times"]], (12.5, 4.8), width_ratios=[1.25, 1])
    for name, color in zip(METHODS, (ORANGE, BLUE), strict=True):
        own = torch.stack([r.values for r in runs if r.method == name and r.L == curvatures[0]])
        own = own / octopus.drop(curvatures[0], GAMMA)
        for curve in own:
            ax["stairs"].plot(curve, color=color, lw=0.8, alpha=0.35)
        ax["stairs"].plot(own.median(0).values, color=color, lw=2.4, label=name)
    ax["stairs"].axhline(-D, color=GREY, lw=1, ls=":")
    ax["stairs"].text(steps, -D + 0.12, "minimum", color=GREY, ha="right", va="bottom")
    ax["stairs"].set(xlabel="outer iteration", ylabel="upper objective, in drops from saddle to saddle", xlim=(0, steps))
    ax["stairs"].set_title(f"L = {curvatures[0]:g}; thick: median of {seeds} seeds, thin: each seed")
    ax["stairs"].set_yticks(range(-D, 1))
    ax["stairs"].legend(loc="upper right", bbox_to_anchor=(1, 0.9))

    numbers = range(1, D + 1)
    for name, color in zip(METHODS, (ORANGE, BLUE), strict=True):
        for L, marker in zip(curvatures, "osD^v" * len(curvatures), strict=False):
            own_times = [[time(r, k) for k in numbers] for r in runs if r.method == name and r.L == L]
            middle = [statistics.median_low(column) for column in zip(*own_times, strict=True)]
            known = [(k, t) for k, t in zip(numbers, middle, strict=True) if t < math.inf]
            ax["times"].plot(*zip(*known, strict=True), marker, color=color, ms=5.5, label=f"{name}, L = {L:g}")
            for k, column in zip(numbers, zip(*own_times, strict=True), strict=True):
                finite = [t for t in column if t < math.inf]
                ax["times"].plot([k] * len(finite), finite, "_", color=color, ms=9, alpha=0.5)
            (k0, t0), first = known[-1], known[0]
            if name == "AIDBiO":
                line = [t0 * octopus.time_ratio(L, GAMMA) ** (k - k0) for k in numbers]
            else:
                line = [first[1] + (k - first[0]) * predicted_gap(L) for k in numbers]
            ax["times"].plot(numbers, line, "--", color=color, lw=1, alpha=0.8)
    ax["times"].axhline(steps, color=GREY, lw=1, ls=":")
    ax["times"].text(1, steps * 1.08, "end of the runs", color=GREY, va="bottom")
    ax["times"].set(xlabel="saddle", ylabel="step at which it was left behind", yscale="log", xticks=numbers)
    ax["times"].set_title("Marks: median; ticks: each seed; dashed: closed-form growth")
    ax["times"].legend(fontsize=8.5)
    figure.suptitle(f"Octopus, d = {D}: {D} saddles in a row, as a bilevel problem", x=0.01, ha="left", weight="bold")
    save(figure, path)


def main(arguments_given: list[str] | None = None) -> None:
    parser = arguments("AIDBiO against PerturbedAID on the bilevel octopus.", seeds=3)
    parser.add_argument("--L", type=float, nargs="+", default=[1.0], help="curvatures; the step size is 1/(4L)")
    parser.add_argument("--steps", type=int, default=1000, help="outer iterations of each run")
    options = parser.parse_args(arguments_given)
    seeds, steps = (1, 120) if options.smoke else (options.seeds, options.steps)
    jobs = [(L, seed, name) for L in options.L for seed in range(seeds) for name in METHODS]
    with tqdm(total=len(jobs) * steps, unit="step", smoothing=0, file=sys.stderr) as bar:
        runs = [train(L, name, seed, steps, options.device, bar) for L, seed, name in jobs]
    for L in options.L:
        report(runs, L, steps)
    options.output.mkdir(parents=True, exist_ok=True)
    table, picture = options.output / "octopus.csv", options.output / "octopus.png"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["L", "method", "seed", "steps", "saddle", "left_behind_at_step"])
        writer.writerows((r.L, r.method, r.seed, steps, k, t) for r in runs for k, t in enumerate(r.times, 1))
    draw(runs, steps, picture)
    print(f"\nWritten: {picture} and {table}")


if __name__ == "__main__":
    main()
