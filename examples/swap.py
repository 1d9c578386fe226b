"""Swapping the optimizer in loops that exist already: what changes, and that nothing else does.

(i)   A plain PyTorch loop: one line changes, and from a saddle the loop gets away.
(ii)  An inner loop differentiated by hand, as learn2learn and higher have it (MAML): it becomes a `BilevelProblem` and
      `ITDBiO`, with the same meta-gradient up to round-off.
(iii) A Lightning module with manual optimization: `manual_backward` becomes `method.backward`. Where `lightning` is not
      installed, a stand-in (`lightning_stand_in.py`) drives the same module by the calls that Lightning makes.

Lines that go are marked `# -`, lines that come `# +`.

    python -m examples.swap
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad
from tqdm import tqdm

import torchbilevel as tb
from examples.common import arguments
from examples.hyper_cleaning import N_TRAIN, Weights, accuracy, load, training_loss, validation_loss

try:
    from lightning.pytorch import LightningModule, Trainer

    LIGHTNING = "lightning"
except ImportError:
    from examples.lightning_stand_in import LightningModule, Trainer

    LIGHTNING = "a stand-in for lightning, which is not installed"

Row = tuple[str, str, float, float, float]  # part, what, loss, accuracy or difference, CPU time relative to "before"


# --- (i) a plain loop ------------------------------------------------------------------------------------------------


def fit(optimizer: torch.optim.Optimizer, model: nn.Module, batch: Any, steps: int, bar: Any) -> tuple[float, float]:
    """The loop: nothing in it knows which optimizer it was given."""
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    began = time.process_time()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        scheduler.step()
        bar.update()
    return loss.item(), time.process_time() - began


def before_and_after() -> dict[str, Callable[[Any], torch.optim.Optimizer]]:
    """The line that changes."""
    adam, sgd, tb_optim = torch.optim.Adam, torch.optim.SGD, tb.optim
    return {
        "Adam": lambda params: adam(params, lr=1e-2),  # -
        "Perturbed(Adam)": lambda params: tb_optim.Perturbed(adam(params, lr=1e-2), radius=0.1, grad_tol=1e-2),  # +
        "Perturbed(Adam), radius=0": lambda params: tb_optim.Perturbed(adam(params, lr=1e-2), radius=0, grad_tol=1e-2),
        "SGD": lambda params: sgd(params, lr=0.5),  # -
        "PerturbedGD": lambda params: tb_optim.PerturbedGD(params, lr=0.5, radius=0.1, grad_tol=1e-2),  # +
    }


def plain_loop(steps: int, device: str, bar: Any) -> list[Row]:
    """A small network on digits, from a random start and from zero, where its gradient in all weights vanishes."""
    data = load(0, device)
    train, rows, ends, times = (data.train[0].double(), data.truth), [], {}, {}
    for start in ("random", "zero"):
        for name, optimizer in before_and_after().items():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).to(device, torch.float64)
            if start == "zero":
                for p in model.parameters():
                    nn.init.zeros_(p)
            bar.set_description(f"(i) {name}")
            loss, seconds = fit(optimizer(model.parameters()), model, train, steps, bar)
            ends[start, name] = torch.cat([p.detach().flatten() for p in model.parameters()])
            test = accuracy(model, (data.test[0].double(), data.test[1]))
            times[start, name] = seconds
            rival = times[start, "Adam" if "Adam" in name else "SGD"]
            rows.append(("i", f"{start} start, {name}", loss, test, seconds / rival))
        assert torch.equal(ends[start, "Adam"], ends[start, "Perturbed(Adam), radius=0"]), "not the same bits"
    return rows


# --- (ii) an inner loop differentiated by hand -----------------------------------------------------------------------


def sines(n: int, device: str) -> list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Tasks of MAML: a sine of random amplitude and phase; ten samples to adapt to, ten to be judged by."""
    generator, tasks = torch.Generator().manual_seed(0), []
    for _ in range(n):
        amplitude, phase = torch.rand(2, generator=generator, dtype=torch.float64)
        x = 10 * torch.rand(20, 1, generator=generator, dtype=torch.float64) - 5
        t = (0.1 + 4.9 * amplitude) * torch.sin(x - torch.pi * phase)
        tasks.append(((x[:10].to(device), t[:10].to(device)), (x[10:].to(device), t[10:].to(device))))
    return tasks


def meta_network(device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1)).to(
        device, torch.float64
    )


def by_hand(net: nn.Module, tasks: Any, steps: int, device: str, bar: Any) -> tuple[float, float, Tensor]:
    """Before: MAML with a differentiable inner SGD."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)

    def error(params: dict[str, Tensor], batch: Any) -> Tensor:
        return F.mse_loss(functional_call(net, params, batch[0]), batch[1])

    began = time.process_time()
    for step in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for support, query in tasks:
            params = dict(net.named_parameters())  # -
            for _ in range(5):  # -
                gradient = grad(error)(params, support)  # -
                params = {k: p - 0.01 * gradient[k] for k, p in params.items()}  # -
            loss = error(params, query) / len(tasks)  # -
            loss.backward()  # -
            total += loss.item()
        if step == 0:
            first = torch.cat([p.grad.flatten() for p in net.parameters()])
        optimizer.step()
        bar.update()
    return total, time.process_time() - began, first


def by_problem(net: nn.Module, tasks: Any, steps: int, device: str, bar: Any) -> tuple[float, float, Tensor]:
    """After: the same, stated."""

    def error(upper: nn.Module, lower: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(lower(batch[0]), batch[1])

    problem = tb.BilevelProblem(  # +
        upper=net,  # +
        lower=meta_network(device),  # +  its values do not matter: y starts at x
        lower_init=lambda upper: dict(upper.named_parameters()),  # +
        lower_loss=error,  # +
        upper_loss=lambda upper, lower, batch: error(upper, lower, batch) / len(tasks),  # +
    )  # +
    optimizer = tb.ITDBiO(problem, lr=1e-2, lower_solver=tb.GD(lr=0.01, steps=5), warm_start=False)  # +
    began = time.process_time()
    for step in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for support, query in tasks:
            loss = optimizer.backward(lower=support, upper=query)  # +
            total += loss.item()
        if step == 0:
            first = torch.cat([p.grad.flatten() for p in net.parameters()])
        optimizer.step()
        bar.update()
    return total, time.process_time() - began, first


def inner_loop(steps: int, device: str, bar: Any) -> list[Row]:
    """The same meta-gradient, to round-off."""
    tasks, rows, firsts, times = sines(8, device), [], [], []
    for name, loop in (("by hand", by_hand), ("ITDBiO", by_problem)):
        bar.set_description(f"(ii) {name}")
        loss, seconds, first = loop(meta_network(device), tasks, steps, device, bar)
        firsts.append(first)
        times.append(seconds)
        difference = ((first - firsts[0]).norm() / firsts[0].norm()).item()
        rows.append(("ii", name, loss, difference, seconds / times[0]))
    assert rows[1][3] < 1e-12, f"the meta-gradients differ by {rows[1][3]:.1e}"
    return rows


# --- (iii) Lightning, manual optimization ----------------------------------------------------------------------------


class Before(LightningModule):
    """Weights for training samples with wrong labels, learned through five steps of training unrolled by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weights, self.model = Weights(N_TRAIN).double(), nn.Linear(64, 10).double()
        self.losses: list[float] = []

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.weights.parameters(), lr=100.0)  # -
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.5)}

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        y = {k: p.detach() for k, p in self.model.named_parameters()}  # -
        for _ in range(5):  # -
            g = grad(lambda y: self.on(y, training_loss, batch["lower"]))(y)  # -
            y = {k: p - g[k] for k, p in y.items()}  # -
        loss = self.on(y, validation_loss, batch["upper"])  # -
        self.manual_backward(loss)  # -
        self.model.load_state_dict({k: p.detach() for k, p in y.items()})  # -
        optimizer.step()
        scheduler.step()
        self.losses.append(loss.item())

    def on(self, y: dict[str, Tensor], loss: Callable[..., Tensor], batch: Any) -> Tensor:
        return loss(self.weights, Stateless(self.model, y), batch)


class Stateless:
    """A module with other parameters than its own, for losses that call it and go through its parameters."""

    def __init__(self, module: nn.Module, values: dict[str, Tensor]) -> None:
        self.module, self.values = module, values

    def __call__(self, inputs: Tensor) -> Tensor:
        return functional_call(self.module, self.values, inputs)

    def parameters(self) -> Any:
        return self.values.values()


class After(Before):
    """The same, stated."""

    def configure_optimizers(self) -> Any:
        problem = tb.BilevelProblem(self.weights, self.model, validation_loss, training_loss)  # +
        optimizer = self.method(problem)  # +
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.5)}

    def method(self, problem: tb.BilevelProblem) -> tb.Method:
        return tb.ITDBiO(problem, lr=100.0, lower_solver=tb.GD(lr=1.0, steps=5))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        loss = optimizer.backward(**batch)  # +
        optimizer.step()
        scheduler.step()
        self.losses.append(loss.item())


class Escaping(After):
    """One line more: implicit hypergradients, and displacements where they are small."""

    def method(self, problem: tb.BilevelProblem) -> tb.Method:
        lower, linear = tb.GD(lr=1.0, steps=20, momentum=0.9), tb.CG(max_iter=20, tol=1e-3)
        return tb.PerturbedAID(problem, 100.0, radius=0.1, grad_tol=2e-3, lower_solver=lower, linear_solver=linear)  # +


def lightning(steps: int, device: str, bar: Any) -> list[Row]:
    """The same module before and after, driven by the same trainer."""
    data, rows, learned, times = load(0, device), [], [], []
    batch = {
        name: torch.utils.data.DataLoader([(x.double(), t)], batch_size=None)
        for name, (x, t) in (("lower", data.train), ("upper", data.validation))
    }
    for name, kind in (("by hand", Before), ("ITDBiO", After), ("PerturbedAID", Escaping)):
        bar.set_description(f"(iii) {name}")
        torch.manual_seed(0)
        module = kind()
        quiet = {name: False for name in ("logger", "enable_checkpointing", "enable_progress_bar")}
        trainer = Trainer(
            max_epochs=steps, accelerator={"cuda": "gpu"}.get(device, device), enable_model_summary=False, **quiet
        )
        began = time.process_time()
        trainer.fit(module, train_dataloaders=batch)
        times.append(time.process_time() - began)
        bar.update(steps)
        module.to(device)
        learned.append(module.weights.logits.detach())
        test = accuracy(module.model, (data.test[0].double(), data.test[1]))
        rows.append(("iii", name, module.losses[-1], test, times[-1] / times[0]))
    difference = ((learned[1] - learned[0]).norm() / learned[0].norm()).item()
    assert difference < 1e-10, f"the learned weights differ by {difference:.1e}"
    return rows


def report(rows: list[Row]) -> None:
    """A table per part."""
    titles = {
        "i": ("A plain loop (digits, 600 samples)", "test accuracy", ".1f"),
        "ii": ("An inner loop by hand (MAML on 8 sines)", "meta-gradient: difference", ".1e"),
        "iii": (f"A Lightning module, by {LIGHTNING}", "test accuracy", ".1f"),
    }
    for part, (title, column, form) in titles.items():
        own = [row for row in rows if row[0] == part]
        print(f"\n({part}) {title}")
        print(f"{'':44}{'loss':>22}{column:>27}{'time':>7}")
        for _, name, loss, number, ratio in own:
            print(f"{name:44}{loss:22.15f}{number:27{form}}{ratio:7.2f}")
    print("\nTime: of the CPU, relative to what was there before (Adam, SGD, by hand).")
    print(
        "(i) Zero start: a saddle; every gradient but that of the last bias is zero. radius=0: the same bits as Adam."
    )
    print("(iii) By hand and ITDBiO take 5 steps on y per step, PerturbedAID 20 with momentum, and a linear solve.")


def main(argv: list[str] | None = None) -> None:
    """Run and print."""
    parser = arguments("Swap the optimizer in loops that exist already.", seeds=1)
    options = parser.parse_args(argv)
    plain, meta, module = (100, 3, 5) if options.smoke else (400, 100, 60)
    with tqdm(total=10 * plain + 2 * meta + 3 * module, unit="step", smoothing=0, ncols=100) as bar:
        rows = plain_loop(plain, options.device, bar)
        rows += inner_loop(meta, options.device, bar)
        rows += lightning(module, options.device, bar)
    report(rows)
    options.output.mkdir(parents=True, exist_ok=True)
    table = options.output / "swap.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["part", "what", "loss", "accuracy or difference"])
        writer.writerows((part, name, repr(loss), repr(number)) for part, name, loss, number, _ in rows)
    print(f"\nAll numbers: {table}")


if __name__ == "__main__":
    main()
