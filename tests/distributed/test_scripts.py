"""The example under ``torchrun`` prints what one process prints; the benchmark counts what the formula says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import ranks

ROOT = Path(__file__).parents[2]


def printed(*command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command, "-m", "examples.distributed_cleaning", "--smoke"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_on_two_ranks() -> None:
    pytest.importorskip("sklearn")
    one = printed()
    two = printed("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert one.startswith("1 rank,") and two.startswith("2 ranks,")
    found = [
        re.findall(r"validation loss (\S+), test accuracy (\S+) %, AUC of wrong labels (\S+)", t) for t in (one, two)
    ]
    assert len(found[0]) == 1 and found[0] == found[1]


def test_the_traffic_is_that_of_the_formula(capsys: pytest.CaptureFixture[str]) -> None:
    found = ranks.measure(size=2, rows=40, width=6, steps=2)
    assert [row["method"] for row in found] == list(ranks.METHODS)
    for row in found:
        # Values that are asked for without a gradient, or gradients without their value, make the difference.
        assert row["numbers"] == pytest.approx(row["formula"], rel=0.02)
    print(ranks.report(ranks.measure(size=1, rows=40, width=6, steps=2) + found))
    assert capsys.readouterr().out.count("| AIDBiO |") == 2
