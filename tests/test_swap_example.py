"""The swap example: equal numbers before and after, and what the stand-in for Lightning has to get right."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchbilevel as tb
from examples import lightning_stand_in, swap

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swap.main(["--smoke", "--output", str(tmp_path)])
    with (tmp_path / "swap.csv").open(newline="") as file:
        loss, number = {}, {}
        for row in csv.DictReader(file):
            key = (row["part"], row["what"])
            loss[key], number[key] = float(row["loss"]), float(row["accuracy or difference"])
    for start in ("random", "zero"):
        assert loss["i", f"{start} start, Adam"] == loss["i", f"{start} start, Perturbed(Adam), radius=0"]
    # From zero only the last bias moves, so the loss stays at that of the label frequencies, close to log 10.
    assert 2.29 < loss["i", "zero start, Adam"] < 2.3026 and number["i", "zero start, Adam"] < 20
    assert number["i", "zero start, Perturbed(Adam)"] > 90
    assert 0 < number["ii", "ITDBiO"] < 1e-12 and number["ii", "by hand"] == 0
    assert loss["ii", "ITDBiO"] == pytest.approx(loss["ii", "by hand"], rel=1e-12)
    assert loss["iii", "ITDBiO"] == pytest.approx(loss["iii", "by hand"], rel=1e-12)
    text = capsys.readouterr().out
    assert (
        "(ii) An inner" in text and "(iii) A Light" in text and max(len(line) for line in text.splitlines()[:-1]) <= 120
    )


def test_committed_results_keep_what_they_are_quoted_for() -> None:
    with (Path(__file__).parents[1] / "docs" / "results" / "swap.csv").open(newline="") as file:
        loss, number = {}, {}
        for row in csv.DictReader(file):
            loss[row["part"], row["what"]] = float(row["loss"])
            number[row["part"], row["what"]] = float(row["accuracy or difference"])
    assert number["i", "zero start, Adam"] < 10 < 94 < number["i", "zero start, PerturbedGD"]
    assert number["i", "zero start, Perturbed(Adam)"] > 96 and number["ii", "ITDBiO"] < 1e-15
    assert loss["iii", "ITDBiO"] == pytest.approx(loss["iii", "by hand"], rel=1e-12)


def test_meta_gradient_is_that_of_central_differences() -> None:
    tasks, net = swap.sines(2, "cpu"), swap.meta_network("cpu")
    problem = swap_problem(net, tasks)
    method = tb.ITDBiO(problem, lr=0.0, lower_solver=tb.GD(lr=0.01, steps=5), warm_start=False)
    for support, query in tasks:
        method.backward(lower=support, upper=query)
    weight = net[2].weight
    expected = weight.grad[3, 5].item()
    values = []
    for shift in (1e-5, -1e-5):
        moved = swap.meta_network("cpu")
        with torch.no_grad():
            moved[2].weight[3, 5] += shift
        values.append(adapted_loss(moved, tasks))
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(expected, rel=1e-6)


def swap_problem(net: nn.Module, tasks: Any) -> tb.BilevelProblem:
    def error(upper: nn.Module, lower: nn.Module, batch: Any) -> torch.Tensor:
        return (lower(batch[0]) - batch[1]).square().mean()

    return tb.BilevelProblem(
        net,
        swap.meta_network("cpu"),
        lower_init=lambda upper: dict(upper.named_parameters()),
        lower_loss=error,
        upper_loss=lambda upper, lower, batch: error(upper, lower, batch) / len(tasks),
    )


def adapted_loss(net: nn.Module, tasks: Any) -> float:
    """By torch.optim, without any derivative through it."""
    total = 0.0
    for (x, t), (x2, t2) in tasks:
        adapted = swap.meta_network("cpu")
        adapted.load_state_dict(net.state_dict())
        sgd = torch.optim.SGD(adapted.parameters(), lr=0.01)
        for _ in range(5):
            sgd.zero_grad()
            (adapted(x) - t).square().mean().backward()
            sgd.step()
        total += (adapted(x2) - t2).square().mean().item() / len(tasks)
    return total


def test_wrapper_of_lightning_is_an_instance_and_forwards() -> None:
    """As Lightning's own: of the optimizer's class, with a ``__dict__`` of its own, stepping with a closure always."""
    weight = nn.Parameter(torch.ones(2))
    rule = tb.optim.PerturbedGD([weight], lr=0.5, radius=0.1, grad_tol=1e-3)
    wrapper = lightning_stand_in.LightningOptimizer(rule)
    assert isinstance(wrapper, tb.optim.PerturbedGD) and type(wrapper).__name__ == "LightningPerturbedGD"
    assert wrapper.param_groups is rule.param_groups
    weight.grad = torch.ones(2)
    wrapper.step()
    assert weight.tolist() == [0.5, 0.5] and rule.steps == wrapper.steps == 1
    wrapper.zero_grad()
    assert weight.grad is None
    scheduler = torch.optim.lr_scheduler.StepLR(rule, 1, 0.1)
    weight.grad = torch.ones(2)
    wrapper.step()
    scheduler.step()
    assert wrapper.param_groups[0]["lr"] == pytest.approx(0.05)


def test_trainer_calls_every_batch_of_every_epoch() -> None:
    class Module(lightning_stand_in.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.seen = nn.Parameter(torch.zeros(())), []

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.weight * batch["lower"])
            optimizer.step()
            self.seen.append((batch_idx, batch["lower"] + batch["upper"]))
            self.lr_schedulers().step()

    module = Module()
    lightning_stand_in.Trainer(max_epochs=2, accelerator="cpu").fit(
        module, train_dataloaders={"lower": [1, 2], "upper": [10, 20]}
    )
    assert module.seen == [(0, 11), (1, 22), (0, 11), (1, 22)]
    assert module.weight.item() == -(1 + 0.5 * 2 + 0.25 * 1 + 0.125 * 2)
