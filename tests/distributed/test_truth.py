"""Certificates, checks, checkpoints, wrappers and failures with two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed import cases
from tests.distributed.conftest import World


@pytest.mark.parametrize("problem", ["bilevel", "minimax"])
def test_a_certificate_is_that_of_the_joined_data(problem: str, world: World) -> None:
    alone = cases.certificate(problem)
    first, second = world.run(cases.certificate, problem)
    assert first.verdict == second.verdict == alone.verdict
    for name in ("grad_norm", "lambda_min", "lower_lambda_min"):
        assert getattr(first, name) == getattr(second, name)
        assert getattr(first, name) == pytest.approx(getattr(alone, name), rel=1e-6, abs=1e-9)


def test_the_reference_of_a_hypergradient_is_that_of_the_joined_data(world: World) -> None:
    alone = cases.report()
    first, second = world.run(cases.report)
    assert str(first) == str(second)
    assert first.norm == pytest.approx(alone.norm, rel=1e-9) and first.error == pytest.approx(alone.error, rel=1e-6)
    assert first.finite_differences < 1e-6


@pytest.mark.parametrize("name", ["AIDBiO, CG", "PerturbedAID", "a rule with momentum"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("suffix", [".pt", ""])  # torch.save by one rank; torch.distributed.checkpoint by all
def test_a_checkpoint_loads_on_any_number_of_ranks(name: str, suffix: str, world: World, tmp_path: Path) -> None:
    path = str(tmp_path / f"two{suffix}")
    whole, _ = world.run(cases.save, path, name)
    resumed, again = world.run(cases.resume, path, name)
    assert torch.equal(resumed["points"], whole["points"]) and torch.equal(again["points"], whole["points"])
    torch.testing.assert_close(cases.resume(path, name)["points"], whole["points"], rtol=1e-9, atol=1e-10)
    path = str(tmp_path / f"one{suffix}")
    alone = cases.save(path, name)
    torch.testing.assert_close(world.run(cases.resume, path, name)[1]["points"], alone["points"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["AIDBiO, CG", "ITDBiO"])
def test_one_all_reduce_per_gradient_or_product(name: str, world: World) -> None:
    for made, counts in world.run(cases.exchanges, name):
        products = counts["hessian_products"]
        if name == "AIDBiO, CG":  # on the way back through a step both products come out of one sweep
            products += counts["jacobian_products"]
        assert made == counts["upper_gradients"] + counts["lower_gradients"] + products


def test_wrapped_modules_are_unwrapped(world: World) -> None:
    alone = cases.train("AIDBiO, CG")
    for found in world.run(cases.wrapped):
        torch.testing.assert_close(found["points"], alone["points"], rtol=1e-9, atol=1e-10)


def test_a_group_of_one_rank_keeps_a_problem_to_itself(world: World) -> None:
    first, second = world.run(cases.alone_on_each_rank)
    assert first != second  # they started from different points, and nothing was exchanged


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("fine", []),
        ("unequal", ["the batches of upper_loss have [11, 12] data points"]),
        ("same", ["upper_loss is", "as if all had brought the same batch"]),
        ("batch norm", ["batch normalisation in training mode"]),
    ],
)
def test_check_warns_where_ranks_differ_from_one_process(kind: str, words: list[str], world: World) -> None:
    for messages in world.run(cases.warnings_of_check, kind):
        assert len(messages) == (1 if words else 0)
        assert all(word in messages[0] for word in words)


def test_what_cannot_be_shared_is_refused(world: World) -> None:
    for saba, group, pickled in world.run(cases.refusals):
        assert "table of one process's data" in saba and "2 ranks" in saba
        assert "process_group must contain this rank" in group
        assert "cannot be pickled" in pickled


def test_a_rank_that_dies_does_not_leave_the_other_waiting(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.distributed.cases", str(tmp_path / "store")]
    ranks = [
        subprocess.Popen(command, cwd=root, env={**os.environ, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    survivor, dead = (rank.communicate(timeout=60)[1] for rank in ranks)
    assert ranks[0].returncode != 0 and "one of them has stopped" in survivor
    assert ranks[1].returncode != 0 and "a broken file" in dead
