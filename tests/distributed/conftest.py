"""Two processes with gloo, started once for all tests of the folder."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SIZE = 2


def _work(rank: int, store: str, inbox: Any, outbox: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE, timeout=timedelta(seconds=60)
    )
    while True:
        job = inbox.get()
        if job is None:
            break
        function, arguments = job
        try:
            outbox.put((rank, function(*arguments), None))
        except BaseException:
            outbox.put((rank, None, traceback.format_exc()))
    dist.destroy_process_group()


class World:
    """Two ranks that run functions of this folder's modules."""

    def __init__(self, folder: Path) -> None:
        context = mp.get_context("spawn")
        self._inboxes, self._outbox = [context.Queue() for _ in range(SIZE)], context.Queue()
        self._processes = [
            context.Process(target=_work, args=(rank, str(folder / "store"), inbox, self._outbox))
            for rank, inbox in enumerate(self._inboxes)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returns on every rank."""
        results: list[Any] = [None] * SIZE
        for inbox in self._inboxes:
            inbox.put((function, arguments))
        trouble = ""
        for _ in range(SIZE):
            rank, result, failure = self._outbox.get(timeout=120)
            results[rank] = result
            trouble += f"rank {rank}:\n{failure}" if failure else ""
        assert not trouble, trouble
        return results

    def close(self) -> None:
        """Stop both."""
        for inbox in self._inboxes:
            inbox.put(None)
        for process in self._processes:
            process.join(20)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    world = World(tmp_path_factory.mktemp("world"))
    yield world
    world.close()
