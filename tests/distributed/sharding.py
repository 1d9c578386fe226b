"""The runs of ``cases`` and ``more_methods`` with parameters that are spread over the ranks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import torchbilevel as tb
from tests.distributed import cases, more_methods
from torchbilevel.tensors import flatten, is_finite, norm


@contextmanager
def spreading(*sides: str) -> Iterator[None]:
    """The problems made within have the parameters of these modules spread."""
    cases.SPREAD.update(sides)
    try:
        yield
    finally:
        cases.SPREAD.clear()


def train(name: str, *sides: str) -> dict[str, Any]:
    """A method from its start."""
    with spreading(*sides):
        return (cases if name in cases.METHODS else more_methods).train(name)


def held(name: str) -> dict[str, int]:
    """How many numbers this process holds of y and of what the estimator remembers in its shape, after a few steps."""
    with spreading("upper", "lower"):
        method = cases.METHODS[name][0]()
    cases.go_on(method, {"lower": cases.shard(1), "upper": cases.shard(2)}, 2)
    tensors = {"x": method.problem.x[0], "y": method.problem.y[0], "gradient": method.problem.upper_parameters[0].grad}
    tensors["z"] = method.estimator.memory.z[0]
    assert all(isinstance(t, DTensor) for t in tensors.values())
    parts = {key: t.to_local() for key, t in tensors.items()}
    new = {key: parts[key].untyped_storage().nbytes() // parts[key].itemsize for key in ("gradient", "z")}
    return {key: t.numel() for key, t in parts.items()} | new


def projected(kind: str, *sides: str) -> dict[str, Any]:
    """With y on a sphere, whose projection moves all entries together."""
    with spreading(*sides):
        problem = cases.minimax(projection=lambda t: t / t.norm().clamp_min(0.5))
        rule = torch.optim.SGD(problem.upper_parameters, 0.1)
        estimator = {"unrolled": tb.Unrolled(cases.GD), "Danskin": tb.Danskin(cases.GD)}[kind]
        return cases.go_on(tb.Method(problem, estimator, rule), {"batch": cases.shard(1)}, 4)


def certificate(problem: str) -> tb.Certificate:
    with spreading("upper", "lower"):
        return cases.certificate(problem)


def report() -> str:
    with spreading("upper", "lower"):
        return str(cases.report())


def checked() -> list[str]:
    with spreading("upper", "lower"):
        return cases.warnings_of_check("fine")


def save(path: str, name: str) -> dict[str, Any]:
    with spreading("upper", "lower"):
        return cases.save(path, name)


def resume(path: str, name: str) -> dict[str, Any]:
    with spreading("upper", "lower"):
        return cases.resume(path, name)


class Network(nn.Module):
    """Two layers; of the second only the weight is spread, along its second dimension."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(5, 3).double(), nn.Linear(3, 2).double()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, rows: Tensor) -> Tensor:
        self.calls += 1
        return self.second(torch.tanh(self.first(rows))).sum(1)


def partition(name: str, module: nn.Module, mesh: Any) -> None:
    """The first layer's parameters and one of the second's, as ``distribute_module`` asks."""
    for key, p in list(module.named_parameters(recurse=False)):
        if name == "second" and key == "bias":
            continue
        placement = Shard(0) if name == "first" else Shard(1)
        module.register_parameter(key, nn.Parameter(distribute_tensor(p.detach(), mesh, [placement])))


def _network(upper: cases.Strengths, lower: Network, batch: tuple[Tensor, Tensor]) -> Tensor:
    penalty = (upper.log_l2.exp() @ lower.first.weight.square().sum(0)) + lower.second.weight.square().sum()
    return F.mse_loss(lower(batch[0]), batch[1] / 50) + (penalty + lower.second.bias.square().sum())


def _fit(upper: cases.Strengths, lower: Network, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(lower(batch[0]), batch[1] / 50)


def network(kind: str) -> dict[str, Any]:
    """A network of which some parameters are spread, by ``distribute_module``, over ranks or over one alone."""
    lower = Network()
    if dist.is_initialized():
        distribute_module(lower, init_device_mesh("cpu", (dist.get_world_size(),)), partition)
    problem = tb.BilevelProblem(cases.Strengths(), lower, upper_loss=_fit, lower_loss=_network)
    solver = {"GD": tb.GD(0.1, 3, momentum=0.5), "Adam": tb.Adam(0.05, 3), "tol": tb.GD(0.1, 30, tol=0.5)}[kind]
    linear_solver = tb.CG(5, tol=0.3) if kind == "tol" else tb.Neumann(5, 0.05)
    method = tb.AIDBiO(problem, 0.5, lower_solver=solver, linear_solver=linear_solver)
    given = {"lower": cases.shard(1), "upper": cases.shard(2)}
    cases.go_on(method, given, 2)
    other = copy.deepcopy(method)
    ends = [cases.go_on(m, given, 2) for m in (method, other)]
    assert torch.equal(ends[0]["points"], ends[1]["points"])
    return ends[0]


def rule(name: str) -> Tensor:
    """A rule on a plain loss of a network, sharded by FSDP where there are several ranks."""
    lower, (rows, targets) = Network(), cases.shard(1)
    if dist.is_initialized():
        fully_shard(lower, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    parameters = list(lower.parameters())
    build = {
        "PerturbedGD": lambda: tb.optim.PerturbedGD(parameters, 0.05, radius=0.1, grad_tol=1e3, escape_steps=2),
        "Perturbed": lambda: tb.optim.Perturbed(
            torch.optim.Adam(parameters, 0.05), radius=0.1, grad_tol=1e3, escape_steps=2
        ),
        "NormalizedGD": lambda: tb.optim.NormalizedGD(parameters, 0.05),
        "NEON": lambda: tb.optim.NEON(
            parameters,
            0.05,
            grad_tol=1e3,
            curvature_tol=0.1,
            radius=0.01,
            probe_lr=0.1,
            search_steps=3,
            step_length=0.1,
        ),
        "NEON2": lambda: tb.optim.NEON2(
            parameters,
            0.05,
            grad_tol=1e3,
            curvature_tol=0.1,
            radius=0.01,
            probe_lr=0.1,
            search_steps=3,
            step_length=0.1,
        ),
        "Pullback": lambda: tb.optim.Pullback(
            parameters, 0.05, 0.05, radius=0.1, grad_tol=1e3, escape_steps=3, mean_movement=1.0
        ),
        "NegativeCurvature": lambda: tb.optim.NegativeCurvature(
            parameters, 0.05, grad_tol=1e3, curvature_tol=0.1, step_length=0.1
        ),
    }[name]
    optimizer = build()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(lower(rows), targets)
        loss.backward()
        value = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(value)
            value /= dist.get_world_size()
        return value

    for _ in range(5):
        optimizer.step(closure)
    return flatten([p.detach() for p in parameters])


def refusals() -> list[str]:
    """What is said to what cannot be spread."""
    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), []
    alone = [dist.new_group([r]) for r in range(dist.get_world_size())][cases.rank()]
    vertical = parallelize_module(nn.Sequential(nn.Linear(4, 4)), mesh, {"0": ColwiseParallel()})
    unfinished = nn.Linear(4, 4)
    unfinished.weight = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
    copied = nn.Linear(4, 4)
    copied.weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Replicate()]))
    tasks = tb.TaskBatch(cases.Weights(), 2)
    for name, p in list(tasks.named_parameters()):
        owner = tasks.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(1)])))
    for module, options in (
        (nn.Sequential(fully_shard(nn.Linear(4, 4), mesh=mesh)), {}),
        (vertical, {}),
        (unfinished, {}),
        (copied, {"process_group": alone}),
        (tasks, {}),
    ):
        try:
            tb.BilevelProblem(cases.Strengths(), module, upper_loss=_fit, lower_loss=_network, **options)
        except (TypeError, ValueError) as error:
            found.append(str(error))
    return found


def sums() -> list[Any]:
    """Of a tensor with an entry that is not finite on the second rank alone: what both say of it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    t, broken = torch.arange(5.0), torch.tensor([1.0, 1.0, 1.0, 1.0, float("nan")])
    plain = torch.ones(2)
    held, bad = (distribute_tensor(s, mesh, [Shard(0)]) for s in (t, broken))
    same = distribute_tensor(t, mesh, [Replicate()])
    return [float(norm((held, plain))), float(norm((same,))), is_finite((held, plain)), is_finite((plain, bad))]
