"""Tuning many hyperparameters at once, against grid and random search at equal cost.

    min over x   cross entropy of y*(x) on the validation samples,   x in a box
    y*(x) = argmin over y   cross entropy of y on the training samples + sum_i exp(x_i) y_i^2 / 2

(a) breast cancer: logistic regression, one L2 strength per feature (30).
(b) digits: a network 64-32-10, one L2 strength per weight (2368), the hypergradient unrolled through 20 training steps,
    since g is not convex in y: conjugate gradients meet negative curvature there, and AIDBiO is erratic.

One unit of cost is a gradient of either loss or a product with second derivatives, on all samples. All choices of
strengths are judged alike: a fresh model is trained with them, and tested. Settings were chosen on seeds 100-102.

    python -m examples.tuning
"""

from __future__ import annotations

import csv
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import torchbilevel as tb
from examples.common import BLUE, GREEN, GREY, ORANGE, arguments, mean_and_deviation, panels, save, seeds_named

LOW, HIGH = math.log(1e-3), math.log(1e-1)  # the box; x starts in its middle
FIT, LR, MOMENTUM = 100, 0.3, 0.9  # how every model is trained: steps of gradient descent
COLORS = {"grid": GREY, "random": GREEN, "descent": ORANGE, "with escapes": BLUE}
Batch = tuple[Tensor, Tensor]


class Task(NamedTuple):
    name: str
    n_train: int
    n_validation: int
    steps: int
    plain: str  # what the methods are called
    escaping: str


CANCER = Task("breast cancer", 100, 200, 60, "AIDBiO", "PerturbedAID")
DIGITS = Task("digits", 200, 800, 40, "ITDBiO", "ITD with PerturbedGD")


class Strengths(nn.Module):
    """The upper module: logarithms of L2 strengths, one tensor per penalised weight, of a shape that broadcasts."""

    def __init__(self, logs: list[Tensor]) -> None:
        super().__init__()
        self.logs = nn.ParameterList(logs)

    def forward(self, model: nn.Module) -> Tensor:
        weights = [p for p in model.parameters() if p.dim() > 1]  # biases are free
        pairs = zip(self.logs, weights, strict=True)
        return torch.stack([(log.exp() * w.square()).sum() for log, w in pairs]).sum() / 2


def training_loss(strengths: nn.Module, model: nn.Module, batch: Batch) -> Tensor:
    """The lower loss."""
    return F.cross_entropy(model(batch[0]), batch[1]) + strengths(model)


def validation_loss(strengths: nn.Module, model: nn.Module, batch: Batch) -> Tensor:
    """The upper loss."""
    return F.cross_entropy(model(batch[0]), batch[1])


def load(task: Task, seed: int, device: str) -> tuple[Batch, Batch, Batch]:
    """Training, validation and test samples, split at random."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise SystemExit("the data need scikit-learn: pip install 'torchbilevel[examples]'") from error
    inputs, labels = (datasets.load_breast_cancer if task is CANCER else datasets.load_digits)(return_X_y=True)
    order, n = np.random.default_rng(seed).permutation(len(labels)), task.n_train
    x = torch.tensor(inputs[order], dtype=torch.float32, device=device)
    t = torch.tensor(labels[order], device=device)
    x = (x - x[:n].mean(0)) / (x[:n].std(0) if task is CANCER else 4)  # pixels are 0 to 16, some of them always 0
    parts = (slice(n), slice(n, n + task.n_validation), slice(n + task.n_validation, None))
    train, validation, test = ((x[part], t[part]) for part in parts)
    return train, validation, test


def fresh(task: Task, seed: int, device: str) -> tuple[Strengths, nn.Module]:
    """Strengths in the middle of the box, and a model before training, the same for all strategies of a seed."""
    torch.manual_seed(seed)
    if task is CANCER:
        model: nn.Module = nn.Linear(30, 2)
        shapes = [torch.Size([30])]
    else:
        model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        shapes = [p.shape for p in model.parameters() if p.dim() > 1]
    return Strengths([torch.full(shape, (LOW + HIGH) / 2) for shape in shapes]).to(device), model.to(device)


def fit(strengths: nn.Module, model: nn.Module, batch: Batch) -> nn.Module:
    """The model after training; costs FIT gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    for _ in range(FIT):
        optimizer.zero_grad()
        training_loss(strengths, model, batch).backward()
        optimizer.step()
    return model


def scores(model: nn.Module, batch: Batch) -> tuple[float, float]:
    """Cross entropy, and accuracy in percent."""
    with torch.no_grad():
        outputs = model(batch[0])
    return F.cross_entropy(outputs, batch[1]).item(), 100 * (outputs.argmax(1) == batch[1]).float().mean().item()


class Run(NamedTuple):
    seed: int
    strategy: str
    strengths: Strengths
    validation: float  # loss of a model trained afresh, as are the next two
    test: float
    accuracy: float
    calls: int
    seconds: float
    displacements: int
    curve: list[tuple[int, float]]  # calls, and the best validation loss until then; of the methods the current one


def judge(
    task: Task, seed: int, strategy: str, strengths: Strengths, data: Any, joined: bool = False, **how: Any
) -> Run:
    """Train a fresh model with these strengths and test it."""
    train, validation, test = data
    if joined:
        train = tuple(torch.cat(pair) for pair in zip(train, validation, strict=True))
    model = fit(strengths, fresh(task, seed, str(test[0].device))[1], train)
    return Run(seed, strategy, strengths, scores(model, validation)[0], *scores(model, test), **how)


def descend(task: Task, seed: int, escape: bool, steps: int, data: Any, bar: Any) -> Run:
    """All strengths at once, by hypergradients, while one model follows."""
    train, validation, test = data
    began = time.process_time()
    strengths, model = fresh(task, seed, str(test[0].device))
    problem = tb.BilevelProblem(
        strengths,
        fit(strengths, model, train),
        upper_loss=validation_loss,
        lower_loss=training_loss,
        upper_projection=tb.projections.box(LOW, HIGH),
    )
    lower, cg = tb.GD(lr=LR, steps=20, momentum=MOMENTUM), tb.CG(max_iter=10, tol=1e-2)
    if task is CANCER and not escape:
        method: tb.Method = tb.AIDBiO(problem, lr=30.0, lower_solver=lower, linear_solver=cg)
    elif task is CANCER:
        method = tb.PerturbedAID(
            problem, 30.0, radius=1.0, grad_tol=5e-3, escape_steps=10, lower_solver=lower, linear_solver=cg, seed=seed
        )
    elif not escape:
        method = tb.ITDBiO(problem, lr=1e4, lower_solver=lower)
    else:
        options = {"radius": 5.0, "grad_tol": 5e-4, "escape_steps": 10, "seed": seed}
        rule = tb.optim.PerturbedGD(strengths.parameters(), lr=1e4, **options)
        method = tb.Method(problem, tb.Unrolled(lower), rule)
    trace = tb.Trace()
    for _ in range(steps):
        method.zero_grad()
        loss = method.backward(lower=train, upper=validation)
        method.step()
        trace.record(method, loss)
        bar.update()
    seconds, columns = time.process_time() - began, trace.to_dict()
    return judge(
        task,
        seed,
        "with escapes" if escape else "descent",
        strengths,
        data,
        calls=FIT + columns["oracle_calls"][-1],
        seconds=seconds,
        displacements=sum(event.kind == "perturbation" for event in method.events),
        curve=[(FIT + calls, loss) for calls, loss in zip(columns["oracle_calls"], columns["loss"], strict=True)],
    )


def search(task: Task, seed: int, grid: bool, budget: int, data: Any) -> Run:
    """Train models until the budget is spent, and take the strengths with the smallest validation loss."""
    began, trials = time.process_time(), max(budget // (FIT + 1), 2)
    generator, best, curve = torch.Generator().manual_seed(seed), (math.inf, fresh(task, seed, "cpu")[0]), []
    for k in range(trials):
        strengths, model = fresh(task, seed, str(data[0][0].device))
        with torch.no_grad():
            for log in strengths.logs:  # a grid for one strength shared by all; at random, each on its own
                share = torch.tensor(k / (trials - 1)) if grid else torch.rand(log.shape, generator=generator)
                log.copy_(LOW + (HIGH - LOW) * share)
        best = min(best, (scores(fit(strengths, model, data[0]), data[1])[0], strengths), key=lambda pair: pair[0])
        curve.append(((k + 1) * (FIT + 1), best[0]))
    seconds = time.process_time() - began
    name = "grid" if grid else "random"
    cost = {"calls": trials * (FIT + 1), "seconds": seconds, "displacements": 0}
    return judge(task, seed, name, best[1], data, curve=curve, **cost)


def compare(task: Task, seed: int, steps: int, device: str, bar: Any) -> list[Run]:
    """All strategies on one split, the searches with the cost of plain descent."""
    bar.set_description(f"{task.name}, seed {seed}")
    data = load(task, seed, device)
    plain, escaping = (descend(task, seed, escape, steps, data, bar) for escape in (False, True))
    grid, random = (search(task, seed, kind, plain.calls, data) for kind in (True, False))
    # What were the validation samples worth as training samples?
    joined = [
        judge(task, seed, f"{run.strategy}, all data", run.strengths, data, joined=True, **cost_of(run))
        for run in (grid, plain)
    ]
    return [grid, random, plain, escaping, *joined]


def cost_of(run: Run) -> dict[str, Any]:
    return {"calls": run.calls, "seconds": run.seconds, "displacements": 0, "curve": []}


def names(task: Task) -> dict[str, str]:
    """The strategies in words."""
    n = len(torch.cat([log.flatten() for log in fresh(task, 0, "cpu")[0].logs]))
    return {
        "grid": "one strength, grid",
        "random": f"{n} strengths, random",
        "descent": f"{n} strengths, {task.plain}",
        "with escapes": f"{n} strengths, {task.escaping}",
        "grid, all data": "one strength, grid; then all data",
        "descent, all data": f"{n} strengths, {task.plain}; then all data",
    }


def report(task: Task, runs: list[Run]) -> None:
    """Print mean and standard deviation over the seeds, a row per strategy."""
    seeds = len({run.seed for run in runs})
    print(f"\n{task.name}: {task.n_train} training, {task.n_validation} validation samples; {seeds_named(seeds)}.")
    row = "{:<36}{:>15}{:>15}{:>15}{:>7}{:>8}{:>4}"
    print(row.format("mean (sd over seeds)", "validation loss", "test loss", "test accuracy", "calls", "CPU s", "*"))
    for name, words in names(task).items():
        own = [run for run in runs if run.strategy == name]
        numbers = [mean_and_deviation([getattr(r, k) for r in own], ".3f") for k in ("validation", "test")]
        numbers.append(mean_and_deviation([run.accuracy for run in own]))
        if "all data" in name:
            numbers[0] = ("-", "-")  # those samples were trained on
        cost = [f"{sum(values) / len(own):{form}}" for values, form in
                (([r.calls for r in own], ",.0f"), ([r.seconds for r in own], ".1f"),
                 ([r.displacements for r in own], ".0f"))]  # fmt: skip
        print(row.format(words, *(mean if sd == "-" else f"{mean} ({sd})" for mean, sd in numbers), *cost))
    loss = {(run.strategy, run.seed): run.test for run in runs}
    for a, b in (("descent", "grid"), ("with escapes", "descent")):
        wins = sum(loss[a, seed] < loss[b, seed] for seed in range(seeds))
        print(f"Smaller test loss: {names(task)[a]} than {names(task)[b]} on {wins} of {seeds} seeds.")
    print("All data: training and validation samples together, with the strengths found above. *: displacements.")


def draw(every: dict[Task, list[Run]], path: Path) -> None:
    """Left: validation loss against cost. Right: test loss of fresh models."""
    figure, ax = panels([[task.name, f"{task.name}: test"] for task in every], (12.5, 8.0), width_ratios=[1.3, 1])
    for task, runs in every.items():
        own = {name: [run for run in runs if run.strategy == name] for name in names(task)}
        for name, color in COLORS.items():
            curves = [run.curve for run in own[name]]
            for curve in curves:
                ax[task.name].plot(*zip(*curve, strict=True), color=color, lw=0.6, alpha=0.35)
            at = np.linspace(max(c[0][0] for c in curves), min(c[-1][0] for c in curves), 200)
            middle = np.median([np.interp(at, *zip(*curve, strict=True)) for curve in curves], 0)
            ax[task.name].plot(at, middle, color=color, lw=2.2, label=names(task)[name])
        ax[task.name].set(xlabel="gradients and products", ylabel="validation loss", yscale="log")
        ax[task.name].set_title(f"{task.name}. Thick: median over seeds; thin: each seed; searches: best so far")
        ax[task.name].legend(fontsize=8.5)
        right, losses = ax[f"{task.name}: test"], {name: [run.test for run in group] for name, group in own.items()}
        right.plot(list(losses.values()), color=GREY, lw=0.6, alpha=0.5)
        for k, (name, values) in enumerate(losses.items()):
            right.plot([k] * len(values), values, "o", ms=4, color=COLORS.get(name, "black"), alpha=0.6)
            right.plot([k - 0.3, k + 0.3], [np.mean(values)] * 2, color=COLORS.get(name, "black"), lw=2.5)
        right.set_xticks(
            range(len(losses)), [name.replace(" ", "\n", 1).replace("descent", task.plain) for name in losses]
        )
        right.set(ylabel="test loss", yscale="log")
        right.set_title(f"{task.name}: fresh models. Bars: mean; lines: each seed")
    figure.suptitle("Many hyperparameters at once", x=0.01, ha="left", weight="bold")
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Run, print, draw."""
    options = arguments("Tune one L2 strength per feature and per weight.", seeds=5).parse_args(argv)
    seeds = 1 if options.smoke else options.seeds
    lengths = {task: 5 if options.smoke else task.steps for task in (CANCER, DIGITS)}
    with tqdm(total=2 * seeds * sum(lengths.values()), unit="step", smoothing=0, ncols=100) as bar:
        every = {
            task: [run for seed in range(seeds) for run in compare(task, seed, steps, options.device, bar)]
            for task, steps in lengths.items()
        }
    options.output.mkdir(parents=True, exist_ok=True)
    table, picture = options.output / "tuning.csv", options.output / "tuning.png"
    with table.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["task", "strategy", "seed", "validation", "test", "accuracy", "calls", "displacements"])
        for task, runs in every.items():
            report(task, runs)
            for r in runs:
                losses = (f"{r.validation:.4f}", f"{r.test:.4f}", f"{r.accuracy:.2f}")
                writer.writerow([task.name, r.strategy, r.seed, *losses, r.calls, r.displacements])
    draw(every, picture)
    print(f"\nFigure: {picture}, all numbers: {table}")


if __name__ == "__main__":
    main()
