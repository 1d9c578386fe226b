"""One run of each method, on the whole data by one process or on a shard each by several."""

from __future__ import annotations

import os
import pickle
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import torchbilevel as tb
from torchbilevel.tensors import flatten

ROWS, FEATURES = 24, 5
SIZES = {"batch_size": 3, "lower_batch_size": 3}


class Strengths(nn.Module):
    """x: one log L2 strength per feature."""

    def __init__(self) -> None:
        super().__init__()
        # Ranks start at different points on purpose: the first rank's is what counts.
        self.log_l2 = nn.Parameter(torch.full((FEATURES,), -1.0 + rank(), dtype=torch.float64))


class Weights(nn.Module):
    """y: a linear model."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(FEATURES, dtype=torch.float64))

    def forward(self, rows: Tensor) -> Tensor:
        return rows @ self.w


def lower_loss(upper: Strengths, lower: Weights, batch: tuple[Tensor, Tensor]) -> Tensor:
    rows, targets = batch
    return (lower(rows) - targets).square().mean() + (upper.log_l2.exp() * lower.w.square()).sum()


def upper_loss(upper: Strengths, lower: Weights, batch: tuple[Tensor, Tensor]) -> Tensor:
    rows, targets = batch
    return (torch.cos(lower(rows) - targets) + (lower(rows) - targets).square()).mean()


def saddle_loss(upper: Strengths, lower: Weights, batch: tuple[Tensor, Tensor]) -> Tensor:
    rows, targets = batch
    return (torch.sin(rows @ upper.log_l2) * (rows @ lower.w) - targets * lower(rows)).mean() - lower.w.square().sum()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def data(seed: int) -> tuple[Tensor, Tensor]:
    """All rows, those of rank 0 before those of rank 1."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(ROWS, FEATURES, generator=g, dtype=torch.float64)
    targets = rows @ torch.arange(1.0, FEATURES + 1, dtype=torch.float64) + torch.randn(ROWS, generator=g).double()
    return rows, targets


def shard(seed: int) -> tuple[Tensor, Tensor]:
    """This process's rows of ``data``: all of them where it is alone."""
    rows, targets = data(seed)
    if not dist.is_initialized():
        return rows, targets
    share = ROWS // dist.get_world_size()
    own = slice(rank() * share, (rank() + 1) * share)
    return rows[own], targets[own]


def drawn(seed: int) -> Callable[[int | None], tuple[Tensor, Tensor]]:
    """A source whose draws by two ranks, of n rows each, are those of one process that asks for n, joined."""
    rows, targets = data(seed)
    g = torch.Generator().manual_seed(seed + 100)

    def source(n: int | None = None) -> tuple[Tensor, Tensor]:
        n = 4 if n is None else n
        index = torch.randint(ROWS, (2 * n,), generator=g)
        if dist.is_initialized():
            index = index[rank() * n : (rank() + 1) * n]
        return rows[index], targets[index]

    return source


SPREAD: set[str] = set()  # which modules of the problems below have their parameters spread over the ranks


def spread(module: nn.Module, side: str) -> Any:
    """The module, its parameters cut along their first dimension (unevenly: five entries over two ranks)."""
    if side in SPREAD:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for name, p in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
    return module


def bilevel(**options: Any) -> tb.BilevelProblem:
    upper, lower = spread(Strengths(), "upper"), spread(Weights(), "lower")
    return tb.BilevelProblem(upper, lower, upper_loss=upper_loss, lower_loss=lower_loss, **options)


def minimax(**options: Any) -> tb.MinimaxProblem:
    return tb.MinimaxProblem(spread(Strengths(), "upper"), spread(Weights(), "lower"), loss=saddle_loss, **options)


GD = tb.GD(lr=0.1, steps=3)
NEUMANN = tb.Neumann(steps=3, lr=0.1)
ESCAPES = {"radius": 1e-2, "grad_tol": 1e3, "escape_steps": 2, "stop": False}

# name: (method, on shards of all rows or on draws)
METHODS: dict[str, tuple[Callable[[], tb.Method], bool]] = {
    "AIDBiO, CG": (lambda: tb.AIDBiO(bilevel(), 0.05, lower_solver=GD, linear_solver=tb.CG(20, tol=1e-8)), True),
    "AIDBiO, Direct": (lambda: tb.AIDBiO(bilevel(), 0.05, lower_solver=GD, linear_solver=tb.Direct()), True),
    "AIDBiO, any optimizer on y": (
        lambda: tb.AIDBiO(bilevel(), 0.05, lower_solver=tb.TorchOptim(torch.optim.Adam, 3, lr=0.1)),
        True,
    ),
    "a rule with momentum": (
        lambda: tb.Method(
            problem := bilevel(),
            tb.Implicit(GD, tb.CG(20, tol=1e-8)),
            torch.optim.SGD(problem.upper.parameters(), 0.05, momentum=0.9),
        ),
        True,
    ),
    "ITDBiO": (lambda: tb.ITDBiO(bilevel(), 0.05, lower_solver=GD), True),
    "ITDBiO, recompute": (lambda: tb.ITDBiO(bilevel(), 0.05, lower_solver=GD, recompute=True), True),
    "ITDBiO, learned start": (
        lambda: tb.ITDBiO(
            bilevel(lower_init=lambda upper: upper.log_l2.sin()), 0.05, lower_solver=GD, warm_start=False
        ),
        True,
    ),
    "PerturbedAID": (lambda: tb.PerturbedAID(bilevel(), 0.05, lower_solver=GD, **ESCAPES), True),
    "PerturbedGDmax": (lambda: tb.PerturbedGDmax(minimax(), 0.05, lower_solver=GD, **ESCAPES), True),
    "F2SA": (lambda: tb.F2SA(bilevel(), 0.05, multiplier=5.0, lower_solver=GD, **SIZES), False),
    "StocBiO": (lambda: tb.StocBiO(bilevel(), 0.05, lower_solver=GD, linear_solver=NEUMANN, **SIZES), False),
    "SUSTAIN": (
        lambda: tb.SUSTAIN(
            bilevel(),
            0.05,
            weight=0.3,
            lower_solver=tb.GD(0.1, 1),
            linear_solver=tb.RandomTruncation(3, 0.1),
            **SIZES,
        ),
        False,
    ),
    "SREDA": (
        lambda: tb.SREDA(
            minimax(), 0.05, lower_solver=GD, period=2, anchor_size=8, initial_solver=tb.GD(0.1, 4), batch_size=3
        ),
        False,
    ),
    "PRGDA, bilevel": (
        lambda: tb.PRGDA(
            bilevel(),
            0.01,
            escape_lr=0.01,
            lower_solver=GD,
            linear_solver=NEUMANN,
            period=2,
            anchor_size=8,
            lower_anchor_size=8,
            mean_movement=1.0,
            radius=1e-2,
            grad_tol=1e3,
            escape_steps=2,
            hvp_batch_size=3,
            **SIZES,
        ),
        False,
    ),
    "StocBiOiNEON": (
        lambda: tb.StocBiOiNEON(
            bilevel(),
            0.05,
            lower_solver=GD,
            linear_solver=NEUMANN,
            radius=1e-2,
            grad_tol=1e3,
            curvature_tol=0.1,
            probe_lr=0.1,
            search_steps=3,
            step_length=0.05,
            **SIZES,
        ),
        False,
    ),
}


def go_on(method: tb.Method, given: dict[str, Any], steps: int) -> dict[str, Any]:
    """A few steps: the points met, the losses and the events."""
    points, losses = [], []
    for _ in range(steps):
        method.zero_grad()
        losses.append(method.backward(**given).item())
        method.step()
        points.append(flatten((*method.problem.x, *method.problem.y)))
    return {"points": torch.stack(points), "losses": losses, "events": [e.kind for e in method.events]}


def train(name: str, steps: int = 4) -> dict[str, Any]:
    """A method from its start, on shards or on draws."""
    build, whole = METHODS[name]
    method = build()
    make = shard if whole else drawn
    given = {"batch": make(1)} if method.problem.minimax else {"lower": make(1), "upper": make(2)}
    return go_on(method, given, steps)


def certificate(problem: str) -> tb.Certificate:
    """At a point to which a run has brought x."""
    if problem == "minimax":
        shared = minimax()
        return tb.certify(shared, shard(1), grad_tol=1e3, curvature_tol=10.0)
    return tb.certify(bilevel(), lower=shard(1), upper=shard(2), grad_tol=1e3, curvature_tol=10.0)


def report() -> tb.HypergradientReport:
    estimator = tb.Implicit(GD, tb.CG(20, tol=1e-8))
    return tb.check_hypergradient(bilevel(), estimator, lower=shard(1), upper=shard(2))


def save(path: str, name: str) -> dict[str, Any]:
    """Run, save (a file is written by the first rank, a folder by all together), run on."""
    method = METHODS[name][0]()
    given = {"lower": shard(1), "upper": shard(2)}
    go_on(method, given, 3)
    state = {"method": method.state_dict(), "upper": method.problem.upper.state_dict()}
    if not path.endswith(".pt"):
        checkpoint.save(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    elif rank() == 0:
        torch.save(state, path)
    return go_on(method, given, 3)


def resume(path: str, name: str) -> dict[str, Any]:
    """Load what a run on as many or other ranks saved, and run on."""
    if dist.is_initialized():
        dist.barrier()
    method = METHODS[name][0]()
    if path.endswith(".pt"):
        state = torch.load(path, weights_only=True)
    else:
        state = {"method": method.state_dict(), "upper": method.problem.upper.state_dict()}
        checkpoint.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    method.problem.upper.load_state_dict(state["upper"])
    method.load_state_dict(state["method"])
    return go_on(method, {"lower": shard(1), "upper": shard(2)}, 3)


def exchanges(name: str) -> tuple[int, dict[str, int]]:
    """How many all-reduces three steps take, and the oracle counts."""
    method, made, reduce = METHODS[name][0](), [0], dist.all_reduce

    def counted(*arguments: Any, **options: Any) -> Any:
        made[0] += 1
        return reduce(*arguments, **options)

    dist.all_reduce = counted
    try:
        go_on(method, {"lower": shard(1), "upper": shard(2)}, 3)
    finally:
        dist.all_reduce = reduce
    return made[0], method.estimator.counts.state_dict()


def wrapped() -> dict[str, Any]:
    """Modules that a training script has wrapped already."""
    upper, lower = (nn.parallel.DistributedDataParallel(m) for m in (Strengths(), Weights()))
    problem = tb.BilevelProblem(upper, lower, upper_loss=upper_loss, lower_loss=lower_loss)
    method = tb.AIDBiO(problem, 0.05, lower_solver=GD, linear_solver=tb.CG(20, tol=1e-8))
    assert isinstance(problem.lower, Weights)
    return go_on(method, {"lower": shard(1), "upper": shard(2)}, 4)


def alone_on_each_rank() -> list[float]:
    """A problem per rank, each kept to itself by a group of one."""
    groups = [dist.new_group([r]) for r in range(dist.get_world_size())]
    problem = bilevel(process_group=groups[rank()])
    method = tb.AIDBiO(problem, 0.05, lower_solver=GD)
    return go_on(method, {"lower": data(1), "upper": data(2)}, 2)["points"][-1].tolist()  # type: ignore[no-any-return]


def warnings_of_check(kind: str) -> list[str]:
    problem, lower, upper = bilevel(), shard(1), shard(2)
    if kind == "unequal" and rank() == 0:
        upper = (upper[0][:-1], upper[1][:-1])
    if kind == "same":
        upper = data(2)
    if kind == "batch norm":
        problem.lower.norm = nn.BatchNorm1d(3, affine=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        problem.check(lower=lower, upper=upper)
    return [str(w.message) for w in caught]


def refusals() -> list[str]:
    found = []
    groups = [dist.new_group([r]) for r in range(dist.get_world_size())]
    for attempt in (
        lambda: tb.SABA(bilevel(), 0.1, lower_solver=tb.GD(0.1, 1)),
        lambda: bilevel(process_group=groups[1 - rank()]),
        lambda: pickle.dumps(bilevel(process_group=dist.group.WORLD)),
    ):
        try:
            attempt()
        except (ValueError, TypeError) as error:
            found.append(str(error))
    return found


def dies(store: str) -> None:
    """A script of two ranks, the second of which fails in its loss after two steps."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=int(os.environ["RANK"]),
        world_size=2,
        timeout=timedelta(seconds=20),
    )
    evaluations = 0

    def failing(upper: Strengths, lower: Weights, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        if rank() == 1 and evaluations > 6:
            raise KeyError("a broken file")
        return lower_loss(upper, lower, batch)

    problem = tb.BilevelProblem(Strengths(), Weights(), upper_loss=upper_loss, lower_loss=failing)
    go_on(tb.AIDBiO(problem, 0.05, lower_solver=GD), {"lower": shard(1), "upper": shard(2)}, 10)


if __name__ == "__main__":
    dies(sys.argv[1])
