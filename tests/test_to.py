"""``method.to(device)``: all that estimator and rule remember moves with the modules, and the run goes on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import torchbilevel as tb
from tests.distributed.cases import ESCAPES, GD, METHODS, bilevel, drawn, minimax, shard

BUILDS: dict[str, tuple[Callable[[], tb.Method], bool]] = {
    **{name: METHODS[name] for name in ("AIDBiO, CG", "PerturbedAID", "PRGDA, bilevel", "SREDA", "StocBiOiNEON")},
    "Adam": (lambda: adam(), True),
    "GDmax, momentum": (
        lambda: tb.PerturbedGDmax(minimax(), 0.05, lower_solver=tb.GD(0.1, 3, momentum=0.5), **ESCAPES),
        True,
    ),
}


def adam() -> tb.Method:
    problem = bilevel()
    return tb.Method(problem, tb.Implicit(GD, tb.CG(20, tol=1e-8)), torch.optim.Adam(problem.upper_parameters, lr=0.1))


def run(name: str, devices: list[str]) -> torch.Tensor:
    build, whole = BUILDS[name]
    method, make = build(), shard if whole else drawn
    sources = {"batch": make(1)} if method.problem.minimax else {"lower": make(1), "upper": make(2)}
    for device in devices:
        assert method.to(device) is method
        given = {k: tuple(t.to(device) for t in v) if isinstance(v, tuple) else v for k, v in sources.items()}
        for _ in range(3):
            method.zero_grad()
            method.backward(**given)
            method.step()
    return torch.cat([t.cpu() for t in (*method.problem.x, *method.problem.y)])


@pytest.mark.parametrize("name", list(BUILDS))
def test_a_move_to_the_same_device_changes_nothing(name: str) -> None:
    build, whole = BUILDS[name]
    method, make = build(), shard if whole else drawn
    given = {"batch": make(1)} if method.problem.minimax else {"lower": make(1), "upper": make(2)}
    for _ in range(6):
        method.zero_grad()
        method.backward(**given)
        method.step()
    assert torch.equal(torch.cat([*method.problem.x, *method.problem.y]), run(name, ["cpu", "cpu"]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["AIDBiO, CG", "Adam"])
def test_a_run_goes_on_elsewhere(name: str) -> None:
    alone = run(name, ["cpu", "cpu", "cpu"])
    torch.testing.assert_close(run(name, ["cpu", "cuda", "cpu"]), alone, rtol=1e-8, atol=1e-9)


def test_a_device_that_does_not_exist_moves_nothing() -> None:
    method = adam()
    with pytest.raises(RuntimeError, match="nowhere"):
        method.to("nowhere")
    assert all(p.device.type == "cpu" for p in method.problem.upper_parameters)
