"""Actor and critic in a grid world, as a bilevel problem.

    max over policies x   mean over states s of y*_s(x)
    y*(x) = argmin over y   mean_s (y_s - E[reward + GAMMA y_next | s, policy x])^2 / 2        (Bellman residual)

The lower problem's solution is the value of the policy, so the hypergradient (``AIDBiO``, ``PerturbedAID``) is the
policy gradient. The usual alternating scheme moves the critic likewise, then the actor by the one-step look-ahead
alone, with the critic held fixed: another direction, but no linear solve, and in grids as small as these the better use
of the same number of gradients. Value iteration gives the optimum. Step sizes were chosen on seeds 100 and 101.

    python -m examples.actor_critic
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import torchbilevel as tb
from examples.common import BLUE, GREEN, ORANGE, arguments, mean_and_deviation, panels, save, seeds_named

SIDE, GAMMA, SLIP, CALLS = 5, 0.9, 0.2, 6000  # of CALLS gradients and products, all methods make about as many
LR = {"alternating": 300.0, "AIDBiO": 10.0, "PerturbedAID": 10.0}  # the look-ahead's gradient is smaller by 1 - GAMMA
INNER, SOLVE = 10, 20  # steps of the critic; products per linear solve
COLORS = {"alternating": ORANGE, "AIDBiO": GREEN, "PerturbedAID": BLUE}


class World(NamedTuple):
    moves: Tensor  # of an action in a state, the probabilities of the next: (actions, states, states)
    reward: Tensor  # on leaving a state


class Table(nn.Module):
    """A number per state, and per action for a policy (logits)."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)


def world(seed: int, device: str) -> World:
    """A grid with a good state that pays 1, and a nearer one that pays 1/2; moves slip in a random direction."""
    n, steps = SIDE * SIDE, ((0, 1), (1, 0), (0, -1), (-1, 0))
    aimed = torch.zeros(4, n, n, dtype=torch.float64)
    for a, (down, right) in enumerate(steps):
        for s in range(n):
            row, column = min(max(s // SIDE + down, 0), SIDE - 1), min(max(s % SIDE + right, 0), SIDE - 1)
            aimed[a, s, row * SIDE + column] = 1
    good = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:2]
    reward = torch.zeros(n, dtype=torch.float64)
    reward[good] = torch.tensor([1.0, 0.5], dtype=torch.float64)
    return World(((1 - SLIP) * aimed + SLIP * aimed.mean(0)).to(device), reward.to(device))


def look_ahead(policy: nn.Module, critic: nn.Module, grid: World) -> Tensor:
    """Expected reward now plus discounted value of the next state, by state."""
    shares = policy.values.softmax(1)
    return grid.reward + GAMMA * torch.einsum("sa,ast,t->s", shares, grid.moves, critic.values)


def bellman(policy: nn.Module, critic: nn.Module, grid: World) -> Tensor:
    """The lower loss."""
    return (critic.values - look_ahead(policy, critic, grid)).square().mean() / 2


def loss_of_value(policy: nn.Module, critic: nn.Module, grid: World) -> Tensor:
    """The upper loss."""
    return -critic.values.mean()


def exact(logits: Tensor, grid: World) -> Tensor:
    """The mean value of a policy, by solving Bellman's equation; autograd gives the exact policy gradient."""
    chain = torch.einsum("sa,ast->st", logits.softmax(1), grid.moves)
    return torch.linalg.solve(torch.eye(len(chain)).to(chain) - GAMMA * chain, grid.reward).mean()


def optimum(grid: World) -> float:
    """The mean value of the best policy, by value iteration."""
    v = torch.zeros_like(grid.reward)
    for _ in range(500):
        v = grid.reward + GAMMA * (grid.moves @ v).amax(0)
    return v.mean().item()


class Run(NamedTuple):
    seed: int
    method: str
    curve: list[tuple[int, float]]  # calls, and the share of the optimum missing, in percent
    alignment: float  # mean cosine between the direction of the actor and the exact policy gradient
    displacements: int


def train(seed: int, name: str, calls: int, device: str, bar: Any) -> Run:
    """Train one policy, from random logits that are the same for all methods."""
    grid = world(seed, device)
    logits = torch.randn(SIDE * SIDE, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    policy, critic = Table(logits.to(device)), Table(torch.zeros_like(grid.reward))
    problem = tb.BilevelProblem(policy, critic, upper_loss=loss_of_value, lower_loss=bellman)
    descent, cg = tb.GD(lr=SIDE * SIDE / (1 + GAMMA) ** 2, steps=INNER, momentum=0.9), tb.CG(max_iter=SOLVE, tol=1e-4)
    if name == "PerturbedAID":
        options: dict[str, Any] = {"radius": 0.1, "grad_tol": 1e-2, "escape_steps": 20, "seed": seed}
        method: tb.Method = tb.PerturbedAID(problem, LR[name], lower_solver=descent, linear_solver=cg, **options)
    else:
        method = tb.AIDBiO(problem, LR[name], lower_solver=descent, linear_solver=cg)
    actor = torch.optim.SGD(policy.parameters(), lr=LR[name])
    below = torch.optim.SGD(critic.parameters(), lr=SIDE * SIDE / (1 + GAMMA) ** 2, momentum=0.9)
    best, cosines, trace = optimum(grid), [], tb.Trace()
    curve: list[tuple[int, float]] = []
    bar.set_description(f"seed {seed}, {name}")
    while not curve or curve[-1][0] < calls:
        if name == "alternating":
            for _ in range(INNER):
                below.zero_grad()
                bellman(policy, critic, grid).backward()
                below.step()
            actor.zero_grad()
            (-look_ahead(policy, critic, grid).mean()).backward()
        else:
            method.zero_grad()
            loss = method.backward(lower=grid, upper=grid)
            trace.record(method, loss)
        x = policy.values.detach().clone().requires_grad_()
        value = exact(x, grid)
        (direction,) = torch.autograd.grad(-value, x)
        assert policy.values.grad is not None
        cosines.append(nn.functional.cosine_similarity(direction.flatten(), policy.values.grad.flatten(), 0).item())
        (actor if name == "alternating" else method).step()
        done = (INNER + 1) * len(cosines) if name == "alternating" else trace.rows[-1]["oracle_calls"]
        bar.update(min(done, calls) - (curve[-1][0] if curve else 0))
        curve.append((done, 100 * (1 - value.item() / best)))
    return Run(seed, name, curve, sum(cosines) / len(cosines), sum(e.kind == "perturbation" for e in method.events))


def report(runs: list[Run], calls: int) -> None:
    """Mean and standard deviation over the seeds, a row per method."""
    seeds = len({run.seed for run in runs})
    print(f"\n{SIDE} x {SIDE} grid worlds, {calls} gradients and products; mean (sd over {seeds_named(seeds)}).\n")
    row = "{:<14}{:>18}{:>22}{:>20}{:>8}{:>15}"
    print(row.format("", "gap at 1/4, in %", "gap at the end, in %", "cosine with exact", "steps", "displacements"))
    for name in COLORS:
        own = [run for run in runs if run.method == name]
        quarter = [next(gap for done, gap in run.curve if done >= calls / 4) for run in own]
        columns = (
            (quarter, ".2f"),
            ([run.curve[-1][1] for run in own], ".2f"),
            ([run.alignment for run in own], ".3f"),
        )
        cells = [mean_and_deviation(values, form) for values, form in columns]
        texts = [mean if sd == "-" else f"{mean} ({sd})" for mean, sd in cells]
        print(row.format(name, *texts, *(f"{sum(v) / seeds:.0f}" for v in
              ([len(run.curve) for run in own], [run.displacements for run in own]))))  # fmt: skip
    print("\nGap: to the value of the best policy. Cosine: of the actor's direction with the exact policy gradient.")


def draw(runs: list[Run], path: Path) -> None:
    """The gap along the run."""
    figure, ax = panels([["gap"]], (7.5, 4.4))
    for name, color in COLORS.items():
        style = "--" if name == "PerturbedAID" else "-"
        for run in (run for run in runs if run.method == name):
            label = name if run.seed == 0 else None
            ax["gap"].plot(*zip(*run.curve, strict=True), style, color=color, lw=1.2, label=label)
    ax["gap"].set(xlabel="gradients and products", ylabel="gap to the best policy (%)", yscale="log")
    ax["gap"].set_title("A line per seed")
    ax["gap"].legend()
    figure.suptitle("Actor and critic in grid worlds", x=0.01, ha="left", weight="bold")
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Run, print, draw."""
    options = arguments("Learn policies in grid worlds.", seeds=5).parse_args(argv)
    seeds, calls = (1, 600) if options.smoke else (options.seeds, CALLS)
    with tqdm(total=seeds * calls * len(COLORS), unit="call", smoothing=0, ncols=100) as bar:
        runs = [train(seed, name, calls, options.device, bar) for seed in range(seeds) for name in COLORS]
    report(runs, calls)
    options.output.mkdir(parents=True, exist_ok=True)
    table, picture = options.output / "actor_critic.csv", options.output / "actor_critic.png"
    with table.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "seed", "calls", "steps", "gap", "cosine", "displacements"])
        for r in runs:
            numbers = (f"{r.curve[-1][1]:.4f}", f"{r.alignment:.5f}", r.displacements)
            writer.writerow([r.method, r.seed, r.curve[-1][0], len(r.curve), *numbers])
    draw(runs, picture)
    print(f"\nFigure: {picture}, all numbers: {table}")


if __name__ == "__main__":
    main()
