"""Two ranks, each with half of the data, do what one process does with all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed import cases, more_methods
from tests.distributed.conftest import World


@pytest.mark.parametrize(
    ("train", "name"),
    [(module.train, name) for module in (cases, more_methods) for name in module.METHODS],
    ids=lambda value: value if isinstance(value, str) else value.__module__.rpartition(".")[2],
)
def test_two_ranks_equal_one_process(train: Callable[[str], dict[str, Any]], name: str, world: World) -> None:
    alone = train(name)
    first, second = world.run(train, name)
    # The same bits on all ranks, so that no rank takes a branch of its own.
    assert torch.equal(first["points"], second["points"])
    assert (first["losses"], first["events"]) == (second["losses"], second["events"])
    torch.testing.assert_close(first["points"], alone["points"], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(first["losses"], alone["losses"], rtol=1e-9, atol=1e-10)
    assert first["events"] == alone["events"]
