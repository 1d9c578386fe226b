"""What goes wrong on one rank, or was set up wrongly: what each rank is told, and what has changed by then."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import torchbilevel as tb
from tests.distributed.cases import GD, Strengths, Weights, bilevel, go_on, lower_loss, rank, shard
from tests.distributed.cases import upper_loss as fine_loss
from torchbilevel.ranks import Ranks

Told = tuple[str, str]  # the kind of error and its words


def told(attempt: Callable[[], Any]) -> Told:
    try:
        attempt()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def everything(method: tb.Method) -> Tensor:
    """x, y and the gradient."""
    p = method.problem
    grads = (torch.zeros_like(t) if t.grad is None else t.grad for t in p.upper_parameters)
    return torch.cat([t.detach().flatten() for t in (*p.x, *p.y, *grads)]).clone()


def broken_step(where: str) -> tuple[Told, bool, bool]:
    """After two good steps one in which the second rank's batch or source fails.

    Args:
        where: "x", "y" (NaN in the data of f, of g) or "source".

    Returns:
        What is said, whether nothing has changed, and whether the run goes on where the ranks are still in step.
    """
    kind = tb.ITDBiO if where == "y" else tb.AIDBiO
    method = kind(bilevel(process_group=dist.new_group(timeout=timedelta(seconds=3))), 0.05, lower_solver=GD)
    good = {"lower": shard(1), "upper": shard(2)}
    go_on(method, good, 2)
    method.zero_grad()
    before, bad = everything(method), dict(good)
    if rank() == 1:
        rows, targets = good["lower" if where == "y" else "upper"]
        if where == "source":
            bad["upper"] = tb.stream([])
        else:
            bad["lower" if where == "y" else "upper"] = (rows, torch.full_like(targets, float("nan")))
    said = told(lambda: method.backward(**bad))
    unchanged = torch.equal(before, everything(method))
    goes_on = said[0] == "FloatingPointError" and bool(go_on(method, good, 1)["points"].isfinite().all())
    return said, unchanged, goes_on


def probe_fails() -> tuple[Told, bool]:
    """A rule that probes meets, at a trial point, a loss that is not finite on the second rank."""

    def upper_loss(upper: Strengths, lower: Weights, batch: Any) -> Tensor:
        value = fine_loss(upper, lower, batch)
        moved = bool((upper.log_l2 != -1).any())
        return value * float("nan") if rank() == 1 and moved else value

    problem = tb.BilevelProblem(Strengths(), Weights(), upper_loss=upper_loss, lower_loss=lower_loss)
    estimator = tb.Implicit(GD, tb.CG(20, tol=1e-8))
    method = tb.Method(problem, estimator, torch.optim.LBFGS(problem.upper.parameters(), 0.3, 3))
    method.backward(lower=shard(1), upper=shard(2))
    before = everything(method)
    return told(method.step), torch.equal(before, everything(method))


def set_up_wrongly(what: str) -> Told:
    if what == "seed of the estimator":
        return told(lambda: tb.StocBiO(bilevel(), 0.1, lower_solver=GD, linear_solver=tb.Neumann(2, 0.1), seed=rank()))
    if what == "seed of the rule":
        problem = bilevel()
        rule = tb.optim.PerturbedGD(problem.upper.parameters(), 0.1, radius=0.1, grad_tol=1.0, seed=rank())
        return told(lambda: tb.Method(problem, tb.Implicit(GD), rule))
    if what == "seed of a certificate":
        return told(lambda: tb.certify(bilevel(), lower=shard(1), upper=shard(2), grad_tol=1.0, seed=rank()))
    if what == "seed of a check":
        given = {"lower": shard(1), "upper": shard(2), "seed": rank()}
        return told(lambda: tb.check_hypergradient(bilevel(), tb.Implicit(GD), **given))
    if what == "changed on one rank":
        problem = bilevel()
        with torch.no_grad():
            problem.lower.w += rank()
        return told(lambda: problem.check(lower=shard(1), upper=shard(2)))
    if what == "made too early":
        problem = bilevel()
        problem.ranks.size = 1  # as before init_process_group
        return told(lambda: tb.AIDBiO(problem, 0.1, lower_solver=GD).backward(lower=shard(1), upper=shard(2)))
    if what == "wrapped within":
        inner = nn.ModuleDict({"net": nn.parallel.DistributedDataParallel(Weights())})
        return told(lambda: tb.BilevelProblem(Strengths(), inner, upper_loss=fine_loss, lower_loss=lower_loss))
    assert what == "device"

    def collective(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("No backend type associated with device type cpu")

    return told(lambda: Ranks()._checked(collective, torch.zeros(2)))


def copies() -> list[Tensor]:
    """The end of a run, of its deep copy, of its unpickled copy, and of one with a closure and a group of all ranks."""
    given = {"lower": shard(1), "upper": shard(2)}

    def method(**options: Any) -> tb.Method:
        return tb.PerturbedAID(bilevel(**options), 0.05, lower_solver=GD, radius=1e-2, grad_tol=1e3, escape_steps=2)

    first = method()
    go_on(first, given, 2)
    first.to("cpu")
    ends = [go_on(m, given, 2)["points"][-1] for m in (copy.deepcopy(first), pickle.loads(pickle.dumps(first)), first)]
    last = method(process_group=dist.new_group([0, 1]))
    last = copy.deepcopy(last)

    def closure() -> Tensor:
        last.zero_grad()
        return last.backward(**given)

    for _ in range(4):
        last.step(closure)
    return [*ends, torch.cat([t.clone() for t in (*last.problem.x, *last.problem.y)])]


def iterations(tol: float) -> list[tuple[int, int]]:
    """Steps of the lower solver and of CG, both of which stop when they have converged."""
    method = tb.AIDBiO(bilevel(), 0.05, lower_solver=tb.GD(0.1, 500, tol=tol), linear_solver=tb.CG(50, tol=tol))
    found = []
    for _ in range(5):
        go_on(method, {"lower": shard(1), "upper": shard(2)}, 1)
        last = method.estimator.last
        found.append((last.lower.steps, int(last.solve.iterations)))
    return found
