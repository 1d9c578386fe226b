"""The example under ``torchrun`` prints what one process prints; the benchmark counts what the formula says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import ranks

ROOT = Path(__file__).parents[2]


def test_the_example_on_two_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    from examples import distributed_cleaning

    before = torch.get_default_dtype()
    try:
        distributed_cleaning.main(["--smoke"])
    finally:
        torch.set_default_dtype(before)
    one = capsys.readouterr().out
    two = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + ["-m", "examples.distributed_cleaning", "--smoke"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert two.returncode == 0, two.stderr
    assert one.startswith("1 rank,") and two.stdout.startswith("2 ranks,")
    found = [
        re.findall(r"validation loss (\S+), test accuracy (\S+) %, AUC of wrong labels (\S+)", text)
        for text in (one, two.stdout)
    ]
    assert len(found[0]) == 1 and found[0] == found[1]


LEAVING = """
import sys, weakref
import torch
import torch.distributed as dist
import torchbilevel as tb
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
tb.optim.NormalizedGD([torch.ones(1, requires_grad=True)], lr=0.1)
group = weakref.ref(dist.group.WORLD)
dist.destroy_process_group()
print(group())
"""


def test_the_group_dies_when_it_is_destroyed(tmp_path: Path) -> None:
    # One that lives on keeps gloo's threads, which abort a process that ends while they hold a tensor.
    told = subprocess.run(
        [sys.executable, "-c", LEAVING, str(tmp_path / "store")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (told.returncode, told.stdout) == (0, "None\n"), told.stderr


def test_the_traffic_is_that_of_the_formula(capsys: pytest.CaptureFixture[str]) -> None:
    found = ranks.measure(size=2, rows=40, width=6, steps=2)
    assert [row["method"] for row in found] == list(ranks.METHODS)
    for row in found:
        # Values that are asked for without a gradient, or gradients without their value, make the difference.
        assert row["numbers"] == pytest.approx(row["formula"], rel=0.02)
    print(ranks.report([{**row, "ranks": 1} for row in found] + found))
    assert capsys.readouterr().out.count("| AIDBiO |") == 2
