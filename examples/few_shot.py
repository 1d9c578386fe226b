"""Few-shot learning: an initialisation from which a few gradient steps on a few examples are enough.

Two families of tasks, of which new members are met at the end:

* digits: tell 5 classes apart from one noisy image each. A class is one of scikit-learn's digits in one of 4 rotations;
  of these 40 classes 16, drawn by the seed, are kept for the test.
* waves: continue A sin(t + phase) from 10 points, A in [0.1, 5] and phase in [0, pi].

x is the initialisation of a network, y_i(x) the network of task i after it was adapted from there, and x is trained by

    min over x   mean_i loss_i(y_i(x))     on further examples of each task of a batch, all tasks side by side:

MAML differentiates 5 gradient steps (unrolled), ANIL adapts the last layer only, and iMAML adapts under a penalty
|y_i - x|^2 / 2 and differentiates implicitly. Beside them: the same network trained in the ordinary way on all training
classes (waves) at once, on about as many examples as MAML, and not trained at all. The rule is Adam; "escaping" wraps
it in a perturbation rule. Settings were chosen on seed 100, which is not reported.

    python -m examples.few_shot
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import torchbilevel as tb
from examples.common import BLUE, GREEN, GREY, ORANGE, RED, arguments, mean_and_deviation, panels, save, seeds_named

Batch = tuple[Tensor, Tensor]  # inputs and targets, with a leading dimension of tasks
TASKS, TEST_TASKS, STEPS, LONG, PENALTY = 16, 200, 5, 20, 1.0
WAYS, SHOTS, QUERIES = 5, 1, 10
JOINT, NOISE, GRAD_TOL = 2000, 0.4, 0.2


# --- two families of tasks ----------------------------------------------------------------------------------------


class Digits:
    """Episodes of 5 classes; `draw` gives examples to adapt to and further ones of the same tasks."""

    name, unit, form, steps = "digits", "accuracy in %", ".1f", 200
    lr, tuned_lr = 0.1, {"from scratch": 0.9, "joint training": 0.3}
    criterion = staticmethod(F.cross_entropy)

    def __init__(self, seed: int, device: str) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise SystemExit("the digits need scikit-learn: pip install 'torchbilevel[examples]'") from error
        images, labels = load_digits(return_X_y=True)
        pictures = torch.tensor(images / 16 - 0.3, dtype=torch.float32).reshape(-1, 8, 8)
        self.generator = torch.Generator().manual_seed(seed)
        digits = [pictures[torch.tensor(labels) == digit][:174] for digit in range(10)]  # there are 174 of each
        classes = torch.stack([p.rot90(k, (1, 2)).flatten(1) for p in digits for k in range(4)])
        order = torch.randperm(40, generator=self.generator)
        self.device, self.classes = device, {True: classes[order[:24]], False: classes[order[24:]]}

    def network(self, outputs: int = WAYS) -> nn.Sequential:
        return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))

    def draw(self, m: int, training: bool) -> tuple[Batch, Batch]:
        pool, rand = self.classes[training], partial(torch.rand, generator=self.generator)
        classes = rand(m, len(pool)).argsort(1)[:, :WAYS, None]
        images = pool[classes, rand(m, WAYS, pool.shape[1]).argsort(2)[..., : SHOTS + QUERIES]].to(self.device)
        images = images + NOISE * torch.randn(images.shape, generator=self.generator).to(self.device)
        halves = images[:, :, :SHOTS].flatten(1, 2), images[:, :, SHOTS:].flatten(1, 2)
        label = torch.arange(WAYS, device=self.device)
        one, two = ((x, label.repeat_interleave(x.shape[1] // WAYS).expand(m, -1)) for x in halves)
        return one, two

    def score(self, outputs: Tensor, targets: Tensor) -> float:
        return 100 * (outputs.argmax(-1) == targets).float().mean().item()

    def pooled(self) -> tuple[nn.Sequential, Callable[[], Batch]]:
        """For joint training: a network with an output per training class, and batches of all of them."""
        pool = self.classes[True]

        def batch() -> Batch:
            target = torch.randint(len(pool), (256,), generator=self.generator)
            image = torch.randint(pool.shape[1], (256,), generator=self.generator)
            noise = NOISE * torch.randn(256, pool.shape[2], generator=self.generator)
            return (pool[target, image] + noise).to(self.device), target.to(self.device)

        return self.network(len(pool)), batch


class Waves:
    """Sine waves of random amplitude and phase; all of them are new at every draw."""

    name, unit, form, steps = "waves", "mean squared error", ".2f", 400
    lr, tuned_lr = 0.02, {"from scratch": 0.02, "joint training": 0.006}
    criterion = staticmethod(F.mse_loss)

    def __init__(self, seed: int, device: str) -> None:
        self.generator, self.device = torch.Generator().manual_seed(seed), device

    def network(self) -> nn.Sequential:
        return nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))

    def draw(self, m: int, training: bool) -> tuple[Batch, Batch]:
        rand = partial(torch.rand, generator=self.generator)
        amplitude, phase, t = 0.1 + 4.9 * rand(m, 1, 1), torch.pi * rand(m, 1, 1), 10 * rand(m, 30, 1) - 5
        t, values = t.to(self.device), (amplitude * (t + phase).sin()).to(self.device)
        return (t[:, :10], values[:, :10]), (t[:, 10:], values[:, 10:])

    def score(self, outputs: Tensor, targets: Tensor) -> float:
        return F.mse_loss(outputs, targets).item()

    def pooled(self) -> tuple[nn.Sequential, Callable[[], Batch]]:
        """For joint training: one network for all waves, and batches of points of many of them."""

        def batch() -> Batch:
            t, values = self.draw(64, True)[0]
            return t.flatten(0, 1), values.flatten(0, 1)

        return self.network(), batch


# --- the methods --------------------------------------------------------------------------------------------------


def distance(tasks: nn.Module, net: nn.Module) -> Tensor:
    """|y_i - x|^2, summed over the tasks."""
    return sum(
        ((p - q).square().sum() for p, q in zip(tasks.parameters(), net.parameters(), strict=True)), torch.zeros(())
    )


def maml(net: nn.Sequential, family: Any, penalty: float = 0.0) -> tb.BilevelProblem:
    """All of the network is adapted, with a penalty on the way gone for iMAML."""

    def lower_loss(net: nn.Module, tasks: tb.TaskBatch, batch: Batch) -> Tensor:
        losses = tasks.losses(family.criterion, *batch).sum()
        return losses + penalty / 2 * distance(tasks, net) if penalty else losses

    return tb.BilevelProblem(
        upper=net,
        lower=tb.TaskBatch(net, TASKS),
        lower_init=lambda net: net.parameters(),
        lower_loss=lower_loss,
        upper_loss=lambda net, tasks, batch: tasks.losses(family.criterion, *batch).mean(),
    )


def anil(net: nn.Sequential, family: Any) -> tb.BilevelProblem:
    """The last layer is adapted to what the others, which all tasks share, make of the inputs."""

    def losses(net: nn.Sequential, tasks: tb.TaskBatch, batch: Batch) -> Tensor:
        return tasks.losses(family.criterion, net[:-1](batch[0]), batch[1])

    return tb.BilevelProblem(
        upper=net,
        lower=tb.TaskBatch(net[-1], TASKS),
        lower_init=lambda net: net[-1].parameters(),
        lower_loss=lambda *arguments: losses(*arguments).sum(),
        upper_loss=lambda *arguments: losses(*arguments).mean(),
    )


def learn(name: str, net: nn.Sequential, family: Any, steps: int, bar: Any) -> int:
    """Train the initialisation; return how often the rule suspected a saddle."""
    problem = anil(net, family) if name == "ANIL" else maml(net, family, PENALTY if name == "iMAML" else 0.0)
    if name == "iMAML":
        solver, linear = tb.GD(family.lr, 2 * STEPS), tb.CG(max_iter=10, tol=1e-2)
        estimator: tb.Estimator = tb.Implicit(solver, linear, warm_start=False)
    else:
        estimator = tb.Unrolled(tb.GD(family.lr, STEPS), warm_start=False)
    rule: torch.optim.Optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    if name == "MAML, escaping":
        rule = tb.optim.Perturbed(rule, radius=1e-2, grad_tol=GRAD_TOL)
    method = tb.Method(problem, estimator, rule)
    for _ in range(steps):
        support, query = family.draw(TASKS, training=True)
        method.zero_grad()
        loss = method.backward(lower=support, upper=query)
        method.step()
        bar.set_description(f"{family.name}, {name}, loss {loss:.3f}")
        bar.update()
    return sum(event.kind == "perturbation" for event in method.events)


def train_jointly(family: Any, steps: int) -> nn.Sequential:
    """Ordinary training on all training classes (waves) at once; a new last layer where classes change."""
    net, batch = family.pooled()
    net.to(family.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(steps):
        inputs, targets = batch()
        optimizer.zero_grad()
        family.criterion(net(inputs), targets).backward()
        optimizer.step()
    if net[-1].out_features != family.network()[-1].out_features:
        net[-1] = family.network()[-1].to(family.device)
        nn.init.zeros_(net[-1].weight)
    return net


def adapt(net: nn.Sequential, family: Any, test: tuple[Batch, Batch], lr: float, head: bool) -> list[float]:
    """The mean score on the query examples of all test tasks, before and after each of LONG gradient steps."""
    (inputs, targets), (further, wanted) = test
    if head:  # ANIL's body stays as it is
        inputs, further, net = net[:-1](inputs).detach(), net[:-1](further).detach(), net[-1]
    tasks, curve = tb.TaskBatch(net, len(inputs)), []
    optimizer = torch.optim.SGD(tasks.parameters(), lr)
    for _ in range(LONG + 1):
        with torch.no_grad():
            curve.append(family.score(tasks(further), wanted))
        optimizer.zero_grad()
        tasks.losses(family.criterion, inputs, targets).sum().backward()
        optimizer.step()
    return curve


# --- the study ----------------------------------------------------------------------------------------------------

COLORS = {
    "from scratch": GREY,
    "joint training": RED,
    "ANIL": GREEN,
    "iMAML": ORANGE,
    "MAML": BLUE,
    "MAML, escaping": "k",
}
LEARNED = ("ANIL", "iMAML", "MAML", "MAML, escaping")


class Run(NamedTuple):
    family: Any
    seed: int
    method: str
    curve: list[float]  # by number of gradient steps on a new task
    displacements: int


def study(kind: Any, seed: int, options: Any, bar: Any) -> list[Run]:
    """All methods on one family of tasks; they meet the same tasks and start from the same network."""
    runs, share = [], 0.05 if options.smoke else 1.0
    for method in COLORS:
        family, displacements = kind(seed, options.device), 0
        test = family.draw(20 if options.smoke else TEST_TASKS, training=False)
        torch.manual_seed(seed)
        if method == "joint training":
            net = train_jointly(family, round(share * JOINT))
        else:
            net = family.network().to(options.device)
        if method in LEARNED:
            displacements = learn(method, net, family, round(share * family.steps), bar)
        curve = adapt(net, family, test, family.tuned_lr.get(method, family.lr), head=method == "ANIL")
        runs.append(Run(kind, seed, method, curve, displacements))
    return runs


def report(runs: list[Run], seeds: int) -> None:
    """Mean and standard deviation over the seeds, after few and after many steps on a new task."""
    for kind in (Digits, Waves):
        print(
            f"\n{kind.name}: {kind.unit} on other examples of {TEST_TASKS} new tasks; mean, sd, {seeds_named(seeds)}."
        )
        row = "{:<16}|" + "{:>20}" * 3 + " |{:>14}"
        print(row.format("", "before adapting", f"after {STEPS} steps", f"after {LONG} steps", "displacements"))
        for method in COLORS:
            own = [run for run in runs if (run.family, run.method) == (kind, method)]
            cells = [mean_and_deviation([run.curve[k] for run in own], kind.form) for k in (0, STEPS, LONG)]
            moved = f"{sum(run.displacements for run in own)}" if method.endswith("escaping") else ""
            print(row.format(method, *(f"{mean}, sd {deviation}" for mean, deviation in cells), moved))


def draw(runs: list[Run], seeds: int, path: Path) -> None:
    """Scores by number of gradient steps on a new task."""
    figure, ax = panels([["digits", "waves"]], (12.5, 4.6))
    for kind in (Digits, Waves):
        for method, color in COLORS.items():
            curves = torch.tensor([run.curve for run in runs if (run.family, run.method) == (kind, method)])
            low, high = curves.min(0).values.tolist(), curves.max(0).values.tolist()
            style = "--" if method == "MAML, escaping" else "-"
            ax[kind.name].fill_between(range(LONG + 1), low, high, color=color, alpha=0.15, lw=0)
            ax[kind.name].plot(curves.mean(0).tolist(), color=color, lw=2, ls=style, label=method)
        ax[kind.name].axvline(STEPS, color=GREY, lw=0.8, ls=":")
        ax[kind.name].set(xlabel="gradient steps on a new task", ylabel=kind.unit, xlim=(0, LONG))
    ax["digits"].set_title(f"{WAYS} new classes of digits, one image each")
    ax["waves"].set_title("Sine waves from 10 points")
    ax["waves"].set(yscale="log")
    ax["digits"].legend(loc="lower right")
    title = f"Few-shot learning: {TEST_TASKS} new tasks. Lines: mean over {seeds_named(seeds)}; bands: min to max"
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    save(figure, path)


def publish(runs: list[Run], seeds: int, folder: Path) -> None:
    """Print the table, write all numbers, draw."""
    report(runs, seeds)
    folder.mkdir(parents=True, exist_ok=True)
    table, picture = folder / "few_shot.csv", folder / "few_shot.png"
    with table.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["family", "method", "seed", "displacements", *(f"after {k}" for k in range(LONG + 1))])
        for run in runs:
            numbers = [f"{score:.4f}" for score in run.curve]
            writer.writerow([run.family.name, run.method, run.seed, run.displacements, *numbers])
    draw(runs, seeds, picture)
    print(f"\nFigure: {picture}, all numbers: {table}")


def main(argv: list[str] | None = None) -> None:
    """Run, print, draw."""
    options = arguments("Learn initialisations from which few examples are enough.", seeds=5).parse_args(argv)
    seeds = 1 if options.smoke else options.seeds
    total = seeds * len(LEARNED) * sum(round((0.05 if options.smoke else 1.0) * kind.steps) for kind in (Digits, Waves))
    with tqdm(total=total, unit="step", smoothing=0, ncols=100) as bar:
        runs = [run for kind in (Digits, Waves) for seed in range(seeds) for run in study(kind, seed, options, bar)]
    publish(runs, seeds, options.output)


if __name__ == "__main__":
    main()
