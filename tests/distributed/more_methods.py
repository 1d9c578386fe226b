"""The methods, rules and kinds of data that ``cases`` has not, each on shards or draws of two ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import torchbilevel as tb
from tests.distributed.cases import (
    GD,
    NEUMANN,
    ROWS,
    SIZES,
    Strengths,
    Weights,
    bilevel,
    data,
    drawn,
    go_on,
    minimax,
    rank,
    shard,
    upper_loss,
)

Batch = tuple[Tensor, Tensor]

ONE = tb.GD(0.1, 1)
SEARCH = {"grad_tol": 1e3, "curvature_tol": 0.1, "step_length": 0.05}
NEON2 = {"radius": 1e-2, "probe_lr": 0.1, "search_steps": 4, **SEARCH}
BOUNDS = {"weight": 0.3, "min_curvature": 0.1, "lower_solver": ONE}


def shards(method: tb.Method) -> dict[str, Any]:
    """This process's rows of all data."""
    return {"batch": shard(1)} if method.problem.minimax else {"lower": shard(1), "upper": shard(2)}


def draws(method: tb.Method) -> dict[str, Any]:
    """Sources whose draws on two ranks are the halves of those of one process."""
    return {"batch": drawn(1)} if method.problem.minimax else {"lower": drawn(1), "upper": drawn(2)}


def tasks(method: tb.Method) -> dict[str, Any]:
    """Draws for each of three tasks."""
    return {side: tb.Tasks([drawn(10 * i + k) for i in range(3)]) for side, k in (("lower", 1), ("upper", 2))}


def pieces(method: tb.Method) -> dict[str, Any]:
    """Shards in micro-batches; the last one of a shard is shorter."""
    return {side: tb.micro_batches(data, 5) for side, data in shards(method).items()}


def drawn_pieces(method: tb.Method) -> dict[str, Any]:
    """Draws in micro-batches."""
    return {side: tb.micro_batches(data, 2) for side, data in draws(method).items()}


def side_by_side(method: tb.Method) -> dict[str, Any]:
    """The rows of a shard for three tasks, which see them scaled."""
    scales = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)

    def stacked(seed: int) -> Batch:
        rows, targets = shard(seed)
        return scales[:, None, None] * rows, targets.expand(3, -1)

    return {"lower": stacked(1), "upper": stacked(2)}


class Net(nn.Module):
    """A linear model of one task."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1.0, 1.0, 5, dtype=torch.float64) + rank())

    def forward(self, rows: Tensor) -> Tensor:
        return rows @ self.w


def _errors(lower: tb.TaskBatch, batch: Batch) -> Tensor:
    return lower.losses(nn.functional.mse_loss, *batch)


def meta_lower(upper: Strengths, lower: tb.TaskBatch, batch: Batch) -> Tensor:
    return _errors(lower, batch).sum() + (upper.log_l2.exp() * lower.net.w.square()).sum()


def meta_upper(upper: Strengths, lower: tb.TaskBatch, batch: Batch) -> Tensor:
    return _errors(lower, batch).mean()


def meta() -> tb.BilevelProblem:
    return tb.BilevelProblem(Strengths(), tb.TaskBatch(Net(), 3), upper_loss=meta_upper, lower_loss=meta_lower)


class Routed(nn.Module):
    """y: two linear models, of which each half of the data uses one, by the sign of its first entry."""

    def __init__(self) -> None:
        super().__init__()
        self.plus = nn.Parameter(torch.zeros(5, dtype=torch.float64))
        self.minus = nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def forward(self, rows: Tensor) -> Tensor:
        return torch.cat([half @ (self.plus if half[0, 0] > 0 else self.minus) for half in halves(rows)])


def routed() -> tb.BilevelProblem:
    """Of the two halves of the data each reaches parts of y and of x that the other does not."""

    def lower(upper: Strengths, lower: Routed, batch: Batch) -> Tensor:
        parts = []
        for rows, errors in zip(halves(batch[0]), halves((lower(batch[0]) - batch[1]).square()), strict=True):
            i = int(rows[0, 0] > 0)
            parts.append(errors.mean() + upper.log_l2[i].exp() * (lower.plus if i else lower.minus).square().sum())
        return torch.stack(parts).mean()

    return tb.BilevelProblem(Strengths(), Routed(), upper_loss=upper_loss, lower_loss=lower)


def lopsided(without: str) -> tb.BilevelProblem:
    """A lower loss of which the second half of the data has no x, or nothing at all."""

    def lower(upper: Strengths, lower: Weights, batch: Batch) -> Tensor:
        parts = []
        for rows, errors in zip(halves(batch[0]), halves((lower(batch[0]) - batch[1]).square()), strict=True):
            if rows[0, 0] < 0:
                parts.append(errors.mean() + (upper.log_l2.exp() * lower.w.square()).sum())
            else:
                parts.append(errors.mean() if without == "x" else rows.new_zeros(()))
        return torch.stack(parts).mean()

    return tb.BilevelProblem(Strengths(), Weights(), upper_loss=upper_loss, lower_loss=lower)


def halves(rows: Tensor) -> tuple[Tensor, ...]:
    """What the two ranks hold: one half on each of them."""
    return rows.split(ROWS // 2)


def apart(method: tb.Method) -> dict[str, Any]:
    """This process's rows, the first entries of which are negative in the first half of the data and positive then."""
    rows, targets = data(1)
    rows = rows.abs() * torch.ones(ROWS, 1, dtype=torch.float64).index_fill_(0, torch.arange(ROWS // 2), -1.0)
    own = slice(rank() * ROWS // 2, (rank() + 1) * ROWS // 2) if dist.is_initialized() else slice(None)
    return {"lower": (rows[own], targets[own]), "upper": (rows[own].flip(1), targets[own])}


def rule(
    estimator: tb.Estimator,
    make: Callable[[Any], torch.optim.Optimizer],
    verify: tb.Verify | None = None,
    **options: Any,
) -> tb.Method:
    problem = bilevel(**options)
    return tb.Method(problem, estimator, make(problem.upper.parameters()), verify=verify)


def aid() -> tb.Implicit:
    return tb.Implicit(tb.GD(0.1, 30, tol=1e-8), tb.CG(20, tol=1e-8))


def itd(problem: tb.BilevelProblem, **options: Any) -> tb.Method:
    estimator = tb.Unrolled(**{"lower_solver": GD, **options})
    return tb.Method(problem, estimator, torch.optim.SGD(problem.upper.parameters(), 0.05))


def rate(upper: Strengths) -> Tensor:
    return 0.1 * upper.log_l2[0].exp()


METHODS: dict[str, tuple[Callable[[], tb.Method], Callable[[tb.Method], dict[str, Any]]]] = {
    "STABLE": (lambda: tb.STABLE(bilevel(), 0.05, **BOUNDS, **SIZES), draws),
    "RSVRB": (lambda: tb.RSVRB(bilevel(), 0.05, **BOUNDS, **SIZES), draws),
    "RSVRB, tasks": (lambda: tb.RSVRB(bilevel(), 0.05, tasks_per_step=2, **BOUNDS, **SIZES), tasks),
    "BSA": (lambda: tb.BSA(bilevel(), 0.05, lower_solver=GD, linear_solver=NEUMANN, **SIZES), draws),
    "TTSA, random truncation": (
        lambda: tb.TTSA(bilevel(), 0.05, lower_solver=ONE, linear_solver=tb.RandomTruncation(3, 0.1), **SIZES),
        draws,
    ),
    "SOBA": (lambda: tb.SOBA(bilevel(), 0.05, lower_solver=ONE, **SIZES), draws),
    "AmIGO": (lambda: tb.AmIGO(bilevel(), 0.05, lower_solver=GD, linear_solver=tb.SGDSolve(3, 0.1), **SIZES), draws),
    "MRBO": (
        lambda: tb.MRBO(bilevel(), 0.05, weight=0.3, lower_solver=ONE, linear_solver=NEUMANN, **SIZES),
        draws,
    ),
    "VRBO": (
        lambda: tb.VRBO(bilevel(), 0.05, period=2, lower_solver=GD, linear_solver=NEUMANN, anchor_size=6, **SIZES),
        draws,
    ),
    "MRBO, one batch": (
        lambda: tb.MRBO(bilevel(), 0.05, weight=0.3, lower_solver=ONE, linear_solver=NEUMANN, reuse_batch=True),
        shards,
    ),
    "AccMDA": (lambda: tb.AccMDA(minimax(), 0.05, weight=0.3, lower_solver=ONE, batch_size=3), draws),
    "SGDmax": (lambda: tb.SGDmax(minimax(), 0.05, lower_solver=GD, batch_size=3), draws),
    "SGDA": (lambda: tb.SGDA(minimax(), 0.05, lower_solver=ONE, batch_size=3), draws),
    "SGDA, alternating": (lambda: tb.SGDA(minimax(), 0.05, lower_solver=ONE, alternating=True, batch_size=3), draws),
    "F2SA, shared": (lambda: tb.F2SA(bilevel(), 0.05, multiplier=5.0, lower_solver=GD, shared=True, **SIZES), draws),
    "CubicGDA": (lambda: tb.CubicGDA(minimax(), cubic=50.0, grad_tol=1e-3, lower_solver=GD), shards),
    "MCN": (lambda: tb.MCN(minimax(), cubic=50.0, grad_tol=1e-3, lower_solver=GD), shards),
    "NEON2": (lambda: rule(aid(), lambda p: tb.optim.NEON2(p, 0.05, **NEON2)), shards),
    "NegativeCurvature": (lambda: rule(aid(), lambda p: tb.optim.NegativeCurvature(p, 0.05, **SEARCH)), shards),
    "LBFGS": (lambda: rule(aid(), lambda p: torch.optim.LBFGS(p, 0.3, 3, line_search_fn="strong_wolfe")), shards),
    "Verify": (
        lambda: rule(
            aid(), lambda p: tb.optim.NEON2(p, 0.05, **NEON2), verify=tb.Verify(step_length=0.1, curvature_tol=1e-3)
        ),
        shards,
    ),
    "upper_projection": (
        lambda: rule(aid(), lambda p: torch.optim.Adam(p, 0.3), upper_projection=tb.projections.l2_ball(2.0)),
        shards,
    ),
    "micro-batches": (lambda: rule(aid(), lambda p: torch.optim.SGD(p, 0.05)), pieces),
    "micro-batches, unrolled": (lambda: itd(bilevel()), pieces),
    "micro-batches, drawn": (
        lambda: tb.StocBiO(bilevel(), 0.05, lower_solver=GD, linear_solver=NEUMANN, **SIZES),
        drawn_pieces,
    ),
    "TaskBatch, AID": (
        lambda: tb.AIDBiO(meta(), 0.05, lower_solver=GD, linear_solver=tb.CG(20, tol=1e-8)),
        side_by_side,
    ),
    "TaskBatch, Direct and tol": (
        lambda: tb.AIDBiO(meta(), 0.05, lower_solver=tb.GD(0.1, 30, tol=0.1), linear_solver=tb.Direct()),
        side_by_side,
    ),
    "TaskBatch, ITD": (lambda: itd(meta()), side_by_side),
    "truncated": (lambda: itd(bilevel(), truncate=2), shards),
    "truncated, recompute": (lambda: itd(bilevel(), truncate=2, recompute=True), shards),
    "learned lr": (lambda: itd(bilevel(), lower_solver=tb.GD(rate, 3)), shards),
    "learned lr, recompute": (lambda: itd(bilevel(), lower_solver=tb.Adam(rate, 3), recompute=True), shards),
    "SharedInverse": (
        lambda: rule(tb.SharedInverse(GD, products=2), lambda p: torch.optim.SGD(p, 0.05)),
        shards,
    ),
    "halves of y, AID": (lambda: tb.AIDBiO(routed(), 0.05, lower_solver=GD, linear_solver=tb.CG(20, tol=1e-8)), apart),
    "halves of y, ITD": (lambda: itd(routed()), apart),
    "halves of y, recompute": (lambda: itd(routed(), recompute=True), apart),
    "g without x on one rank, AID": (
        lambda: tb.AIDBiO(lopsided("x"), 0.05, lower_solver=GD, linear_solver=tb.CG(20, tol=1e-8)),
        apart,
    ),
    "g without x on one rank, ITD": (lambda: itd(lopsided("x")), apart),
    "no g on one rank, AID": (
        lambda: tb.AIDBiO(lopsided("y"), 0.05, lower_solver=GD, linear_solver=tb.CG(20, tol=1e-8)),
        apart,
    ),
    "no g on one rank, ITD": (lambda: itd(lopsided("y")), apart),
    "no g on one rank, recompute": (lambda: itd(lopsided("y"), recompute=True), apart),
    "no g on one rank, F2SA": (
        lambda: tb.F2SA(lopsided("y"), 0.05, multiplier=5.0, lower_solver=GD, reuse_batch=True),
        apart,
    ),
}


def train(name: str, steps: int = 5) -> dict[str, Any]:
    """A method from its start."""
    build, data = METHODS[name]
    method = build()
    return go_on(method, data(method), steps)
