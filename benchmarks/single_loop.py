"""Samples to a small hypergradient: single-loop stochastic methods, and ours, on regularised logistic regression.

One log penalty per feature is learned on a validation part: of the breast cancer data, or of scikit-learn's digits,
even against odd. A seed draws the split and all samples. Every method has a grid of equal size (16 settings on the
cancer data, 25 on the digits), tuned for every level on seeds that are not reported: all settings on three, the
FINALISTS best for a level on seven more. Samples are all gradients and products times their rows, first passes
included; the exact |grad Phi| is computed off-line and not counted. "Growing" methods see an eighth of the rows in the
first call, and twice as many in every further call. "Shuffled" ones take their blocks without replacement.

    python -m benchmarks.single_loop [--data digits] [--only NAME ...] [--resume] [--smoke] [--output DIRECTORY]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor

from torchbilevel import CG, GD, SABA, SOBA, BatchSizes, BilevelProblem, Implicit, Method, SharedInverse, sample
from torchbilevel.estimators.saba import Saba

LEVELS = (3e-3, 1e-3, 1e-4)
BATCH, RIDGE, START = 20, 0.005, -1.0
FIRST_SEEDS, MORE_SEEDS, SEEDS = (97, 98, 99), range(90, 97), range(10)
FINALISTS = 4  # settings per level
BUDGET = {"cancer": 120_000, "digits": 240_000}
GROWTH = 8  # the first call of a growing method sees rows / GROWTH
# Grids of the step size rho of y (and of z in the single-loop methods), by what it meets.
INNER = {
    "cancer": {"20": (0.1, 0.2, 0.4, 0.8), "5": (0.05, 0.1, 0.2, 0.4), "all": (0.1, 0.2, 0.4, 0.8)},
    "digits": {
        "20": (0.0125, 0.025, 0.05, 0.1, 0.2),
        "5": (0.00625, 0.0125, 0.025, 0.05, 0.1),
        "all": (0.05, 0.1, 0.2, 0.4, 0.8),
    },
}
# lr / rho where the rule is a gradient step with y and z in step
RATIO = {"cancer": (30.0, 75.0, 150.0, 300.0), "digits": (30.0, 75.0, 150.0, 300.0, 600.0)}
ADAM = {"cancer": (0.03, 0.1, 0.3, 1.0), "digits": (0.01, 0.03, 0.1, 0.3, 1.0)}
# lr of steps on deterministic hypergradients
OUTER = {"cancer": (20.0, 40.0, 80.0, 160.0), "digits": (20.0, 40.0, 80.0, 160.0, 320.0)}

Pair = tuple[Tensor, Tensor]


class Vector(torch.nn.Module):
    """One parameter."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(value.clone())


class Task:
    """The problem of one split."""

    def __init__(self, seed: int, data: str = "cancer") -> None:
        loaded = load_breast_cancer() if data == "cancer" else load_digits()
        target = loaded.target if data == "cancer" else loaded.target % 2
        X = torch.tensor(loaded.data)
        X = X[:, X.std(0) > 0]  # some pixels are empty
        t = torch.tensor(2.0 * target - 1, dtype=torch.float64)
        order = torch.randperm(len(t), generator=torch.Generator().manual_seed(seed))
        X, t = ((X - X.mean(0)) / X.std(0))[order], t[order]
        n = 2 * len(t) // 3 + 1  # 380 of 569, 1199 of 1797
        self.train, self.valid = (X[:n], t[:n]), (X[n:], t[n:])
        self.start = torch.full((X.shape[1],), START, dtype=torch.float64)
        self.problem = BilevelProblem(
            Vector(self.start), Vector(torch.zeros_like(self.start)), upper_loss=self.upper, lower_loss=self.lower
        )

    def upper(self, u: Any, v: Any, batch: Pair) -> Tensor:
        return loss(v.value, batch) + RIDGE * (u.value - self.start).square().sum()

    def lower(self, u: Any, v: Any, batch: Pair) -> Tensor:
        return loss(v.value, batch) + 0.5 * (u.value.exp() * v.value.square()).sum()

    def exact(self, x: Tensor) -> float:
        """|grad Phi(x)|, y*(x) by Newton's method."""
        y, weights = torch.zeros_like(x), x.exp()
        for _ in range(60):
            gradient, H = derivatives(y, self.train)
            step = torch.linalg.solve(H + weights.diag(), gradient + weights * y)
            y = y - step
            if not float(step.norm()) > 1e-13:
                break
        H = derivatives(y, self.train)[1] + weights.diag()
        z = torch.linalg.solve(H, derivatives(y, self.valid)[0])
        return float((2 * RIDGE * (x - self.start) - weights * y * z).norm())


def loss(y: Tensor, batch: Pair) -> Tensor:
    """The logistic loss."""
    return F.softplus(-batch[1] * (batch[0] @ y)).mean()


def derivatives(y: Tensor, batch: Pair) -> Pair:
    """Gradient and Hessian of the logistic loss."""
    A, t = batch
    s = torch.sigmoid(-t * (A @ y))
    return -(A * (t * s)[:, None]).mean(0), (A * (s * (1 - s))[:, None]).T @ A / len(t)


def saba(p: BilevelProblem, rho: float, ratio: float) -> Method:
    return SABA(p, ratio * rho, lower_solver=GD(rho, 1), batch_size=BATCH, lower_batch_size=BATCH)


def saba_small(p: BilevelProblem, rho: float, ratio: float) -> Method:
    return SABA(p, ratio * rho, lower_solver=GD(rho, 1), batch_size=BATCH // 4, lower_batch_size=BATCH // 4)


def saba_shuffled(p: BilevelProblem, rho: float, ratio: float) -> Method:
    return SABA(p, ratio * rho, lower_solver=GD(rho, 1), batch_size=BATCH, lower_batch_size=BATCH, shuffle=True)


def saba_small_shuffled(p: BilevelProblem, rho: float, ratio: float) -> Method:
    n = BATCH // 4
    return SABA(p, ratio * rho, lower_solver=GD(rho, 1), batch_size=n, lower_batch_size=n, shuffle=True)


def soba(p: BilevelProblem, rho: float, ratio: float) -> Method:
    return SOBA(p, ratio * rho, lower_solver=GD(rho, 1), batch_size=BATCH, lower_batch_size=BATCH)


def saba_adam(p: BilevelProblem, rho: float, lr: float) -> Method:
    estimator = Saba(GD(rho, 1), batch_sizes=BatchSizes(BATCH, BATCH))
    return Method(p, estimator, torch.optim.Adam(p.upper.parameters(), lr=lr))


def saba_momentum(p: BilevelProblem, rho: float, ratio: float) -> Method:
    estimator = Saba(GD(rho, 1), batch_sizes=BatchSizes(BATCH, BATCH))
    return Method(p, estimator, torch.optim.SGD(p.upper.parameters(), lr=0.1 * ratio * rho, momentum=0.9))


def aid_momentum(p: BilevelProblem, rho: float, lr: float) -> Method:
    estimator = Implicit(GD(rho, 2, momentum=0.5), CG(2))
    return Method(p, estimator, torch.optim.SGD(p.upper.parameters(), lr=lr, momentum=0.4))


def aid_adam(p: BilevelProblem, rho: float, lr: float) -> Method:
    estimator = Implicit(GD(rho, 2, momentum=0.5), CG(2))
    return Method(p, estimator, torch.optim.Adam(p.upper.parameters(), lr=lr))


def shared_inverse(p: BilevelProblem, rho: float, lr: float) -> Method:
    return Method(p, SharedInverse(GD(rho, 3)), torch.optim.SGD(p.upper.parameters(), lr=lr))


Build = Callable[[BilevelProblem, float, float], Method]
ENTRIES: dict[str, tuple[Build, str, dict[str, tuple[float, ...]]]] = {  # how, rows per step, second setting
    "SABA": (saba, "20", RATIO),
    "Saba + Adam": (saba_adam, "20", ADAM),
    "AID + Adam": (aid_adam, "all", ADAM),
    "Saba + momentum": (saba_momentum, "20", RATIO),
    "AID + momentum": (aid_momentum, "all", OUTER),
    "SOBA": (soba, "20", RATIO),
    "SABA, blocks of 5": (saba_small, "5", RATIO),
    "SABA, shuffled": (saba_shuffled, "20", RATIO),
    "SABA, shuffled, blocks of 5": (saba_small_shuffled, "5", RATIO),
    "AID + momentum, growing": (aid_momentum, "all", OUTER),
    "SharedInverse": (shared_inverse, "all", OUTER),
    "SharedInverse, growing": (shared_inverse, "all", OUTER),
}


def play(
    build: Build, first: float, second: float, seed: int, budget: int, data: str = "cancer", growing: bool = False
) -> list[float]:
    """Samples at which each level is first met; infinite where it is not."""
    task, hits, look, calls = Task(seed, data), [math.inf] * len(LEVELS), 0.0, 0
    method = build(task.problem, first, second)
    counts = method.estimator.counts
    lower, upper = sample(task.train, 2 * seed), sample(task.valid, 2 * seed + 1)
    whole = isinstance(method.estimator, Implicit | SharedInverse)
    while (spent := sum(n for name, n in counts.state_dict().items() if name.endswith("_samples"))) < budget:
        if spent >= look:
            look = 1.03 * spent + 400  # one grid of looks for all: a level is noticed at most 3 % late
            size = task.exact(method.problem.upper.value.detach())
            if not math.isfinite(size):
                break
            hits = [min(hit, spent) if size <= level else hit for hit, level in zip(hits, LEVELS, strict=True)]
            if math.isfinite(max(hits)):
                break
        share = min(1.0, 2**calls / GROWTH) if growing else 1.0
        sources: dict[str, Any] = {"lower": lower, "upper": upper}
        if whole:
            sources = {"lower": part(task.train, share), "upper": part(task.valid, share)}
        method.zero_grad()
        try:
            method.backward(**sources)
        except (FloatingPointError, torch.linalg.LinAlgError):
            break
        method.step()
        calls += 1
    return hits


def part(tensors: Pair, share: float) -> Pair:
    """The first rows; the split has shuffled them."""
    n = math.ceil(share * len(tensors[0]))
    return tensors[0][:n], tensors[1][:n]


def ranked(tuning: list[Any], k: int) -> list[tuple[float, float]]:
    """The settings, those first with which most tuning runs meet level k, and of equals those that meet it earliest."""

    def merit(entry: list[Any]) -> tuple[int, float]:
        met = [hits[k] for hits in entry[1] if math.isfinite(hits[k])]
        return -len(met), sum(met)

    return [tuple(setting) for setting, _ in sorted(tuning, key=merit)]


def finals(play_at: Callable[..., list[float]], tuning: list[Any]) -> list[Any]:
    """The best few settings for each level, run on more seeds."""
    names = sorted({setting for k in range(len(LEVELS)) for setting in ranked(tuning, k)[:FINALISTS]})
    before = {tuple(setting): runs for setting, runs in tuning}
    return [(s, [*before[s], *(play_at(*s, seed) for seed in MORE_SEEDS)]) for s in names]


def report(name: str, data: str, tuning: list[Any], seeds: Sequence[int], budget: int) -> dict[str, Any]:
    """The runs that count: each level with the setting that was best for it, printed and as a row of the file."""
    build, rows_per_step, second = ENTRIES[name]
    inner, outer = INNER[data][rows_per_step], second[data]
    chosen = [ranked(tuning, k)[0] for k in range(len(LEVELS))]
    runs = {s: [play(build, *s, seed, budget, data, name.endswith("growing")) for seed in seeds] for s in set(chosen)}
    inside = [first in inner[1:-1] and second in outer[1:-1] for first, second in chosen]
    hits = [[runs[s][i][k] for k, s in enumerate(chosen)] for i in range(len(seeds))]
    cells = []
    for s, within, column in zip(chosen, inside, zip(*hits, strict=True), strict=True):
        middle, low, high = (show(n) for n in (statistics.median(column), min(column), max(column)))
        cells.append(f"{middle} ({low} to {high}) at {s[0]:g}, {s[1]:g}{'' if within else ' (edge)'}")
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    return {"method": name, "data": data, "settings": chosen, "inside": inside, "tuning": tuning, "hits": hits}


def show(n: float) -> str:
    return f"{n / 1000:.1f}" if math.isfinite(n) else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one setting per method, one seed, a small budget")
    parser.add_argument("--data", choices=BUDGET, default="cancer")
    parser.add_argument(
        "--only", nargs="+", choices=ENTRIES, default=list(ENTRIES), help="rows to run; others are kept"
    )
    parser.add_argument(
        "--resume", action="store_true", help="take the first tuning runs from the file, if they are there"
    )
    parser.add_argument("--budget", type=int, help="samples per run")
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds, budget = (SEEDS[:1], 6_000) if options.smoke else (SEEDS, options.budget or BUDGET[options.data])
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "single_loop.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    print("| method | " + " | ".join(f"{level:g}" for level in LEVELS) + " |  (thousands of samples)")
    for name in options.only:
        build, rows_per_step, second = ENTRIES[name]
        inner, outer = INNER[options.data][rows_per_step], second[options.data]
        settings = [(inner[1], outer[1])] if options.smoke else list(product(inner, outer))
        play_at = partial(play, build, budget=budget, data=options.data, growing=name.endswith("growing"))
        known = [old for old in rows if options.resume and (old["method"], old["data"]) == (name, options.data)]
        if known:
            first = known[0]["first"]
        else:
            first_seeds = FIRST_SEEDS[:1] if options.smoke else FIRST_SEEDS
            first = [(s, [play_at(*s, seed) for seed in first_seeds]) for s in settings]
        row = report(name, options.data, first if options.smoke else finals(play_at, first), seeds, budget)
        row["first"] = first
        rows = [old for old in rows if (old["method"], old["data"]) != (name, options.data)] + [row]
        path.write_text(json.dumps({"levels": LEVELS, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
