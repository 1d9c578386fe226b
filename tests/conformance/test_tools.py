"""What others do with an optimizer: scale, compile, average, wrap, checkpoint; and what a long run may cost."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import swa_utils

import torchbilevel as tb
from tests.conformance.entries import ENTRIES, METHODS, RULES, Entry, over, well
from tests.memory import live_tensors
from tests.problems import Split
from torchbilevel import methods, optim

every = over(ENTRIES)
every_method = over(METHODS)


# --- GradScaler ------------------------------------------------------------------------------------------------------


@over(RULES, "clip")
def test_grad_scaler_scales_back_and_skips_what_overflows(entry: Entry) -> None:
    """Where `step` takes no closure; torch's scaler refuses closures."""
    if "value_test" in entry.options:
        entry = Entry(entry.kind, {k: v for k, v in entry.options.items() if not k.startswith("value")})
    run, twin = entry.run(), entry.run()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for overflow in (False, True, False):
        for each in (run, twin):
            each.gradients()
        scaler.scale(torch.zeros(()))
        for p in run.params:
            p.grad.mul_(torch.inf if overflow else scaler.get_scale())
        scaler.step(run.optimizer)
        scaler.update()
        if not overflow:
            twin.optimizer.step()
    assert run.standing() == twin.standing() and run.optimizer.steps == 2


@every_method
def test_grad_scaler_is_refused_by_methods_with_the_reason(entry: Entry) -> None:
    run = entry.run()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(run.gradients())
    before = run.points
    with pytest.raises(TypeError, match="GradScaler scales .* bfloat16 autocast"):
        scaler.step(run.optimizer)
    assert all(torch.equal(p, q) for p, q in zip(run.points, before, strict=True))


# --- torch.compile ---------------------------------------------------------------------------------------------------

FAMILIES = [
    *("PerturbedGD", "Perturbed(Adam)", "Pullback", "NEON", "CubicNewton", "SSRGD"),
    *("AIDBiO", "SUSTAIN", "PRGDA", "StocBiOiNEON", "PerturbedGDmax", "CubicGDA"),
]
families = over({name: ENTRIES[name] for name in FAMILIES})


@families
@pytest.mark.filterwarnings("ignore")  # of Dynamo's own
def test_a_compiled_step_is_a_step(entry: Entry) -> None:
    torch._dynamo.reset()
    run, twin = entry.run(), entry.run()
    step = torch.compile(run.optimizer.step, backend="eager")
    for _ in range(4):
        if run.lower is None:
            step(run.closure())
        else:
            run.gradients()
            step()
        twin.advance()
    assert run.standing() == twin.standing()


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_loss_stays_compiled_within_a_step() -> None:
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    run, twin = ENTRIES["PerturbedGD"].run(), ENTRIES["PerturbedGD"].run()
    compiled = torch.compile(well, backend=backend)
    for _ in range(3):
        batch = run.draw()

        def closure(batch: Any = batch) -> Tensor:
            run.optimizer.zero_grad()
            loss = compiled(run.upper, batch)
            loss.backward()
            return loss

        run.optimizer.step(closure)
    twin.advance(3)
    assert graphs and run.standing() == twin.standing()


# --- averaging, wrappers, loops of others ----------------------------------------------------------------------------


@families
def test_weights_are_averaged_and_swa_drives_the_lr(entry: Entry) -> None:
    run = entry.run()
    average = swa_utils.AveragedModel(run.upper)
    scheduler = swa_utils.SWALR(run.optimizer, swa_lr=0.01, anneal_epochs=2)
    points = []
    for _ in range(3):
        run.advance()
        average.update_parameters(run.upper)
        scheduler.step()
        points.append([p.detach().clone() for p in run.params])
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    for p, *seen in zip(average.module.parameters(), *points, strict=True):
        torch.testing.assert_close(p.detach(), torch.stack(seen).mean(0))


def test_batch_norm_of_an_average_can_be_updated() -> None:
    upper = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    problem = tb.BilevelProblem(
        upper,
        Split(torch.zeros(3).double(), ((3,),)),
        upper_loss=lambda upper, lower, batch: (lower.flat() - 1).square().sum() + upper(batch).square().mean(),
        lower_loss=lambda upper, lower, batch: (lower.flat() - upper(batch).cos().mean(0)).square().sum(),
    )
    method = tb.AIDBiO(problem, 0.1, lower_solver=tb.GD(0.4, 2))
    rows = torch.randn(16, 2, generator=torch.Generator().manual_seed(0)).double()
    average = swa_utils.AveragedModel(upper)
    for _ in range(3):
        method.zero_grad()
        method.backward(lower=rows, upper=rows)
        method.step()
        average.update_parameters(upper)
    swa_utils.update_bn([rows], average)
    torch.testing.assert_close(average.module[1].running_mean, average.module[0](rows).mean(0).detach())


class Wrapped(torch.optim.Optimizer):
    """Forwards to an optimizer inside, as accelerate does; its step is skipped while gradients add up."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.ready = optimizer, True

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def add_param_group(self, group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(group)

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.optimizer.load_state_dict(state)

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.ready:
            self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure) if self.ready else None


@every
def test_a_wrapper_that_forwards_is_the_optimizer(entry: Entry) -> None:
    run, twin = entry.run(), entry.run()
    wrapped = Wrapped(run.optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(wrapped, 1, 0.5)
    for _ in range(3):
        if run.lower is None:
            wrapped.step(run.closure())
        else:
            wrapped.zero_grad()
            run.optimizer.backward(**run.data)
            wrapped.step()
        scheduler.step()
        twin.advance()
        twin.optimizer.param_groups[0]["lr"] *= 0.5
    assert [p.tolist() for p in run.points] == [p.tolist() for p in twin.points]
    fresh = entry.run()
    Wrapped(fresh.optimizer).load_state_dict(copy.deepcopy(wrapped.state_dict()))
    assert fresh.optimizer.param_groups[0]["lr"] == run.optimizer.param_groups[0]["lr"]


def test_two_optimizers_in_turns_as_lightning_toggles_them() -> None:
    """`toggle_optimizer` takes requires_grad from the parameters of all other optimizers for the time of a step."""
    runs = []
    for toggled in (False, True):
        run = ENTRIES["AIDBiO"].run()
        head = nn.Linear(2, 1, bias=False).double()
        nn.init.ones_(head.weight)
        other = torch.optim.SGD(head.parameters(), 0.1)
        for _ in range(3):
            for optimizer, idle in ((run.optimizer, head.parameters()), (other, run.params)):
                idle = list(idle)
                for p in idle if toggled else ():
                    p.requires_grad_(False)
                optimizer.zero_grad()
                if optimizer is other:
                    head(torch.ones(3, 2).double()).square().mean().backward()
                else:
                    run.optimizer.backward(**run.data)
                optimizer.step()
                for p in idle if toggled else ():
                    p.requires_grad_(True)
        runs.append((run.standing(), head.weight.tolist()))
    assert runs[0] == runs[1]


# --- torch.distributed.checkpoint ------------------------------------------------------------------------------------


@over(ENTRIES, "distributed checkpoint")
@pytest.mark.filterwarnings("ignore")  # that there is one process only, and of deprecations in torch itself
def test_distributed_checkpoints_are_loaded_into_a_new_optimizer(entry: Entry, tmp_path: Path) -> None:
    run, again = entry.run(), entry.run()
    run.advance(3)
    dcp.save(run.saved(), checkpoint_id=tmp_path, no_dist=True)
    saved = again.saved()
    dcp.load(saved, checkpoint_id=tmp_path, no_dist=True)
    again.load(saved)
    assert again.standing() == run.standing() and again.advance(2) == run.advance(2)


@families
@pytest.mark.filterwarnings("ignore")
def test_what_would_lose_the_memory_of_a_run_is_refused_by_name(entry: Entry) -> None:
    """torch.distributed.checkpoint.state_dict keeps "state" and "param_groups" alone."""
    run = entry.run()
    before = run.points
    # Or the step that torch makes there, to set up the state, is refused already.
    refused = r"torch\.distributed\.checkpoint|pass step\(\) a closure|exactly one backward before each step"
    with pytest.raises((ValueError, RuntimeError), match=refused):
        set_optimizer_state_dict(run.upper, run.optimizer, get_optimizer_state_dict(run.upper, run.optimizer))
    assert all(torch.equal(p, q) for p, q in zip(run.points, before, strict=True))


# --- long runs -------------------------------------------------------------------------------------------------------


LONG = (optim.PerturbedGD, methods.PullbackSTORM, methods.SGDA)  # 1000 steps, or 12


@every
def test_memory_is_flat(entry: Entry) -> None:
    """No tensor stays for each step; without the help of the cycle collector."""
    run = entry.run()
    run.optimizer.param_groups[0]["lr"] *= 0.1
    run.advance(6)
    gc.collect()
    before = live_tensors()
    gc.disable()
    try:
        run.advance(1000 if entry.kind in LONG and "value_test" not in entry.options else 12)
    finally:
        gc.enable()
    assert abs(live_tensors() - before) < 9
