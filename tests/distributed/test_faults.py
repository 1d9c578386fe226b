"""What one rank alone meets stops all of them, in words and in time, with nothing half done."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import cases, faults
from tests.distributed.conftest import World


@pytest.mark.parametrize("where", ["x", "y"])
def test_nan_on_one_rank_is_met_by_all(where: str, world: World) -> None:
    first, second = world.run(faults.broken_step, where)
    assert first == second
    (kind, words), unchanged, goes_on = first
    assert kind == "FloatingPointError" and ("y are not finite" if where == "y" else "upper loss is nan") in words
    assert unchanged and goes_on


def test_an_empty_source_on_one_rank_stops_both(world: World) -> None:
    waiting, dry = world.run(faults.broken_step, "source")
    assert waiting[0][0] == "RuntimeError" and "rank 0 of 2 could not average" in waiting[0][1]
    assert dry[0][0] == "RuntimeError" and "the source is exhausted" in dry[0][1]
    assert waiting[1] and dry[1]


def test_a_probe_that_fails_on_one_rank_leaves_the_point(world: World) -> None:
    first, second = world.run(faults.probe_fails)
    assert first == second and first[0][0] == "FloatingPointError" and first[1]


@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        ("seed of the estimator", "ValueError", "seed must be the same on all ranks"),
        ("seed of the rule", "ValueError", "seed must be the same on all ranks"),
        ("seed of a certificate", "ValueError", "seed must be the same on all ranks"),
        ("seed of a check", "ValueError", "seed must be the same on all ranks"),
        ("changed on one rank", "ValueError", "the parameters of lower differ between the ranks"),
        ("made too early", "RuntimeError", "before torch.distributed.init_process_group"),
        ("wrapped within", "TypeError", "lower.net is a DistributedDataParallel inside lower"),
        ("device", "RuntimeError", "does not serve tensors on cpu"),
    ],
)
def test_a_wrong_set_up_is_refused_on_all_ranks(what: str, kind: str, words: str, world: World) -> None:
    for told in world.run(faults.set_up_wrongly, what):
        assert told[0] == kind and words in told[1]


def test_copies_closures_and_groups_of_all_ranks_go_the_same_way(world: World) -> None:
    ends = [end for found in world.run(faults.copies) for end in found]
    assert all(torch.equal(end, ends[0]) for end in ends)
    torch.testing.assert_close(ends[0], cases.train("PerturbedAID")["points"][-1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("tol", [1e-3, 1e-9])
def test_solvers_stop_at_the_same_step(tol: float, world: World) -> None:
    alone = faults.iterations(tol)
    assert world.run(faults.iterations, tol) == [alone, alone]
    assert all(steps < 500 and 1 <= inner < 50 for steps, inner in alone)
