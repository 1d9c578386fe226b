"""Ten saddles in a row: AIDBiO waits longer at each of them, PerturbedAID does not.

The octopus of Du et al. (2017) has d saddles, one after the other, before its minimum. Here it is the upper loss of a
bilevel problem whose lower level is a quadratic with y*(x) = x, so that both methods see hypergradients through 20
steps on y and 20 terms of a Neumann series. While plain descent waits at one saddle it is drawn into the next, so each
wait is a multiple of the one before. A random displacement where the hypergradient is small makes all waits alike.

    python -m examples.octopus
"""

from __future__ import annotations

import csv
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import torchbilevel as tb
from benchmarks import octopus
from examples.common import BLUE, GREY, ORANGE, arguments, median_and_range, panels, save, seeds_named, with_range

D, GAMMA, KAPPA = 10, 1.0, 10.0
RADIUS = GRAD_TOL = math.e / 100
METHODS = {"AIDBiO": ORANGE, "PerturbedAID": BLUE}


class Run(NamedTuple):
    L: float
    method: str
    seed: int
    values: Tensor  # Phi at x_0, x_1, ...
    times: list[int]  # the steps at which saddles 1, 2, ... were left behind
    calls: int  # of all oracles together
    certificate: tb.Certificate  # of the answer


def train(L: float, name: str, seed: int, steps: int, device: str, bar: Any) -> Run:
    """One run of one method from x uniform in [-1, 1]^d."""
    upper, lower = octopus.modules(D, L, GAMMA, KAPPA, seed=seed)  # two nn.Modules, with parameters upper.x and lower.y
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
    bar.set_description(f"L = {L:g}, seed {seed}, {name}")
    path = [upper.x.detach().clone()]
    for _ in range(steps):
        method.zero_grad()
        method.backward()  # with data: method.backward(lower=train, upper=validation)
        method.step()
        path.append(upper.x.detach().clone())
        bar.update()
    with torch.no_grad():
        upper.x.copy_(method.result().x[0])  # the point before the last displacement, if that is still being tested
    certificate = tb.certify(problem, grad_tol=GRAD_TOL, curvature_tol=0.1)
    points, c = torch.stack(path).cpu(), method.estimator.counts
    calls = c.upper_gradients + c.lower_gradients + c.hessian_products + c.jacobian_products
    values = octopus.octopus(points, L, GAMMA)
    return Run(L, name, seed, values, octopus.left_behind(points), calls, certificate)


def time(run: Run, k: int) -> float:
    """The step at which saddle k, counted from 1, was left behind; infinity if it never was."""
    return run.times[k - 1] if k <= len(run.times) else math.inf


def estimated_gap(L: float) -> float:
    """Steps from saddle to saddle for PerturbedAID: the way in, then the way out.

    In: |grad Phi| starts at 4 L tau and halves in each step until it is below 4/5 grad_tol. Out: one coordinate of the
    displacement, typically radius / sqrt(d + 2), grows by the factor 1 + gamma / (2 L) per step until it passes 2 tau.
    """
    way_in = math.log2(4 * L * octopus.TAU / (0.8 * GRAD_TOL))
    return way_in + math.log(2 * octopus.TAU * math.sqrt(D + 2) / RADIUS) / math.log1p(GAMMA / (2 * L))


def report(runs: list[Run], steps: int) -> None:
    """Print when saddles were left behind, what theory says about it, what it cost, and where it ended."""
    seeds, L = len(runs) // len(METHODS), runs[0].L
    own = {name: [run for run in runs if run.method == name] for name in METHODS}
    names = seeds_named(seeds)
    print(f"\nOctopus with {D} saddles in a row, L = {L:g}, kappa = {KAPPA:g}; {names}, {steps} steps each.")
    print("Step at which each saddle was left behind: median, below it min-max over the seeds.\n")
    print(f"{'saddle':14}" + "".join(f"{k:>8}" for k in range(1, D + 1)))
    for name in METHODS:
        texts = [median_and_range([time(run, k) for run in own[name]]) for k in range(1, D + 1)]
        print(f"{name:14}" + "".join(f"{middle:>8}" for middle, _ in texts))
        if seeds > 1:
            print(f"{'':14}" + "".join(f"{spread:>8}" for _, spread in texts))
    print(f"-: not within {steps} steps in most seeds; +: in some seeds.\n")

    ratios = [(t[-1] - t[-2]) / (t[-2] - t[-3]) for t in (run.times for run in own["AIDBiO"]) if len(t) > 2]
    gaps = [(r.times[-1] - r.times[0]) / (len(r.times) - 1) for r in own["PerturbedAID"] if len(r.times) > 1]
    closed, last = octopus.time_ratio(L, GAMMA), statistics.median_low(len(run.times) for run in own["AIDBiO"])
    print(f"AIDBiO        last wait / the one before: {with_range(ratios, '.2f')}, closed form {closed:.2f}")
    if 0 < last < D:
        beyond = statistics.median_low(time(run, last) for run in own["AIDBiO"]) * closed ** (D - last)
        print(f"              so exact arithmetic would leave saddle {D} at about step {beyond:,.0f}")
    print(f"PerturbedAID  steps from saddle to saddle: {with_range(gaps, '.1f')}, estimate {estimated_gap(L):.1f}\n")

    row = "{:14}{:>14}{:>23}    {:<33}{:>10}"
    print(row.format("", "saddles left", "calls per saddle", "certificate of the answer", "lambda_min"))
    for name, group in own.items():
        left = with_range([len(run.times) for run in group])
        calls = with_range([r.calls * r.times[-1] / steps / len(r.times) for r in group if r.times], ",.0f")
        verdict, times = Counter(run.certificate.verdict for run in group).most_common(1)[0]
        curvature = statistics.median(run.certificate.lambda_min for run in group)
        print(row.format(name, left, calls, f"{verdict} ({times} of {seeds})", f"{curvature:+.2f}"))
    print(f"Each step: 1 gradient of f, 21 of g, 21 products with g_yy, 1 with g_xy ({runs[0].calls:,} calls per run).")


def draw(runs: list[Run], steps: int, path: Path) -> None:
    """Left: the descent, for the first L. Right: when each saddle was left behind, for all L."""
    curvatures = list(dict.fromkeys(run.L for run in runs))
    figure, ax = panels([["stairs", "times"]], (12.5, 4.8), width_ratios=[1.2, 1])
    for name, color in METHODS.items():
        own = [run.values / octopus.drop(run.L, GAMMA) for run in runs if (run.L, run.method) == (curvatures[0], name)]
        for curve in own:
            ax["stairs"].plot(curve.tolist(), color=color, lw=0.8, alpha=0.35)
        ax["stairs"].plot(torch.stack(own).median(0).values.tolist(), color=color, lw=2.4, label=name)
        for L, marker in zip(curvatures, "os^D", strict=False):
            group = [run for run in runs if (run.L, run.method) == (L, name)]
            columns = [[time(run, k) for run in group] for k in range(1, D + 1)]
            middle = {k: statistics.median_low(c) for k, c in enumerate(columns, 1)}
            known = {k: t for k, t in middle.items() if t < math.inf}
            if not known:
                continue
            ax["times"].plot(*zip(*known.items(), strict=True), marker, color=color, ms=5, label=f"{name}, L = {L:g}")
            for k, column in enumerate(columns, 1):
                ax["times"].plot(
                    [k] * len(column), [t if t < math.inf else math.nan for t in column], "_", c=color, alpha=0.5
                )
            k0, t0 = list(known.items())[-1 if name == "AIDBiO" else 0]
            ratio, gap = octopus.time_ratio(L, GAMMA), estimated_gap(L)
            line = [t0 * ratio ** (k - k0) if name == "AIDBiO" else t0 + gap * (k - k0) for k in middle]
            ax["times"].plot(list(middle), line, "--", color=color, lw=1, alpha=0.7)
    ax["stairs"].axhline(-D, color=GREY, lw=1, ls=":")
    ax["stairs"].text(steps, -D + 0.12, "minimum", color=GREY, ha="right", va="bottom")
    ax["stairs"].set(xlabel="outer iteration", ylabel="upper objective / drop between saddles", xlim=(0, steps))
    seeds = len({run.seed for run in runs})
    ax["stairs"].set_title(f"L = {curvatures[0]:g}. Thick: median over {seeds_named(seeds)}; thin: each seed")
    ax["stairs"].set_yticks(range(-D, 1))
    ax["stairs"].legend(loc="upper right", bbox_to_anchor=(1, 0.9))
    ax["times"].axhline(steps, color=GREY, lw=1, ls=":")
    ax["times"].text(D, steps * 1.15, "end of the runs", color=GREY, ha="right", va="bottom")
    ax["times"].set(xlabel="saddle", ylabel="step at which it was left behind", yscale="log", xticks=range(1, D + 1))
    ax["times"].set_title("Marks: median over seeds; bars: each seed; dashed: theory")
    ax["times"].legend(fontsize=8.5)
    figure.suptitle(f"{D} saddles in a row: the octopus as a bilevel problem", x=0.01, ha="left", weight="bold")
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Run, print, draw."""
    parser = arguments("AIDBiO against PerturbedAID on the bilevel octopus.", seeds=5)
    parser.add_argument("--L", type=float, nargs="+", default=[1.0], help="curvatures; the step size is 1/(4L)")
    parser.add_argument("--steps", type=int, default=800, help="outer iterations of each run")
    options = parser.parse_args(argv)
    seeds, steps = (1, 120) if options.smoke else (options.seeds, options.steps)
    jobs = [(L, name, seed) for L in options.L for seed in range(seeds) for name in METHODS]
    with tqdm(total=len(jobs) * steps, unit="step", smoothing=0, ncols=100) as bar:
        runs = [train(*job, steps, options.device, bar) for job in jobs]
    for L in options.L:
        report([run for run in runs if run.L == L], steps)
    options.output.mkdir(parents=True, exist_ok=True)
    table, picture = options.output / "octopus.csv", options.output / "octopus.png"
    with table.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["L", "method", "seed", "steps", "saddle", "left_behind_at_step"])
        writer.writerows((r.L, r.method, r.seed, steps, k, t) for r in runs for k, t in enumerate(r.times, 1))
    draw(runs, steps, picture)
    print(f"\nFigure: {picture}, all times: {table}")


if __name__ == "__main__":
    main()
