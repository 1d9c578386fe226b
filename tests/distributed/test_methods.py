"""Two ranks, each with half of the data, do what one process does with all of it."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.cases import METHODS, train
from tests.distributed.conftest import World


@pytest.mark.parametrize("name", list(METHODS))
def test_two_ranks_equal_one_process(name: str, world: World) -> None:
    alone = train(name)
    first, second = world.run(train, name)
    # The same bits on all ranks, so that no rank takes a branch of its own.
    assert torch.equal(first["points"], second["points"])
    assert (first["losses"], first["events"]) == (second["losses"], second["events"])
    torch.testing.assert_close(first["points"], alone["points"], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(first["losses"], alone["losses"], rtol=1e-9, atol=1e-10)
    assert first["events"] == alone["events"]
