"""Parameters that are spread over the ranks: the same numbers, of which each rank holds its part."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.distributed import cases, more_methods, sharding
from tests.distributed.conftest import World

# The problems of the others have parameters of other shapes, or tasks, which are refused.
OTHERS = ("TaskBatch", "halves of y", "g without x", "no g")
NAMES = [name for module in (cases, more_methods) for name in module.METHODS if not name.startswith(OTHERS)]


@pytest.mark.parametrize("name", NAMES)
def test_spread_parameters_change_no_number(name: str, world: World) -> None:
    alone = (cases if name in cases.METHODS else more_methods).train(name)
    first, second = world.run(sharding.train, name, "upper", "lower")
    assert torch.equal(first["points"], second["points"])
    assert first["losses"] == second["losses"] and first["events"] == second["events"] == alone["events"]
    torch.testing.assert_close(first["points"], alone["points"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["AIDBiO, CG", "ITDBiO", "StocBiO", "learned lr"])
def test_one_side_may_be_whole(name: str, world: World) -> None:
    alone = (cases if name in cases.METHODS else more_methods).train(name)
    first, second = world.run(sharding.train, name, "lower")
    assert torch.equal(first["points"], second["points"])
    torch.testing.assert_close(first["points"], alone["points"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["GD", "Adam", "tol"])
def test_some_parameters_may_be_whole(kind: str, world: World) -> None:
    alone = sharding.network(kind)
    first, second = world.run(sharding.network, kind)
    assert torch.equal(first["points"], second["points"])
    torch.testing.assert_close(first["points"], alone["points"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["unrolled", "Danskin"])
def test_a_projection_sees_whole_tensors(kind: str, world: World) -> None:
    alone = sharding.projected(kind)
    first, second = world.run(sharding.projected, kind, "upper", "lower")
    assert torch.equal(first["points"], second["points"])
    torch.testing.assert_close(first["points"], alone["points"], rtol=1e-9, atol=1e-10)


def test_each_rank_holds_its_part(world: World) -> None:
    first, second = world.run(sharding.held, "AIDBiO, CG")
    assert first == dict.fromkeys(("x", "y", "gradient", "z"), 3)
    assert second == dict.fromkeys(("x", "y", "gradient", "z"), 2)


def test_sums_are_the_same_on_all_ranks(world: World) -> None:
    for found in world.run(sharding.sums):
        assert found == [pytest.approx(math.sqrt(32)), pytest.approx(math.sqrt(30)), True, False]


@pytest.mark.parametrize("problem", ["bilevel", "minimax"])
def test_a_certificate_of_spread_parameters(problem: str, world: World) -> None:
    whole = cases.certificate(problem)
    first, second = world.run(sharding.certificate, problem)
    assert first.verdict == second.verdict == whole.verdict and first.lambda_min == second.lambda_min
    assert first.lambda_min == pytest.approx(whole.lambda_min, rel=1e-6, abs=1e-9)


def test_checks_of_spread_parameters(world: World) -> None:
    assert world.run(sharding.checked) == [[], []]
    whole = str(cases.report()).splitlines()
    for found in world.run(sharding.report):
        assert found.splitlines()[0].split()[:2] == whole[0].split()[:2]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", ["AIDBiO, CG", "PerturbedAID", "a rule with momentum"])
def test_a_checkpoint_loads_spread_otherwise(name: str, world: World, tmp_path: Path) -> None:
    path = str(tmp_path / "spread")
    going_on, _ = world.run(sharding.save, path, name)
    resumed, _ = world.run(sharding.resume, path, name)
    assert torch.equal(resumed["points"], going_on["points"])
    for whole in (cases.resume(path, name), world.run(cases.resume, path, name)[1]):
        torch.testing.assert_close(whole["points"], going_on["points"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["PerturbedGD", "Perturbed", "NormalizedGD", "NEON", "NEON2", "Pullback", "NegativeCurvature"]
)
def test_a_rule_on_a_plain_loss_of_a_sharded_module(name: str, world: World) -> None:
    alone = sharding.rule(name)
    first, second = world.run(sharding.rule, name)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone, rtol=1e-9, atol=1e-10)


def test_what_cannot_be_spread_is_refused_by_name(world: World) -> None:
    for fully, vertical, unfinished, group, tasks in world.run(sharding.refusals):
        assert fully.startswith("lower.0 is sharded by FSDP")
        assert vertical.startswith("lower.0 computes on sharded inputs or outputs")
        assert unfinished.startswith("lower.weight is a sum that was not formed")
        assert "lower.weight is spread over the ranks [0, 1]" in group
        assert tasks.startswith("lower is a TaskBatch of sharded parameters")
