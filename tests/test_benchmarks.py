"""The study of stopping tests: its instances and intervals are what they are said to be, and it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from benchmarks import stopping_tests as study


@pytest.mark.parametrize("seed", range(5))
def test_instances_start_at_a_saddle_whose_smallest_eigenvalue_is_minus_the_gap(seed: int) -> None:
    problem, M, gap = study.instance(seed)
    (x,) = problem.x

    def phi(x: Tensor) -> Tensor:
        return problem.upper_value((x,), (x,), None, 0)  # y*(x) = x

    H = torch.autograd.functional.hessian(phi, x)
    torch.testing.assert_close(study.hessian(x, M), H, rtol=0, atol=1e-12)
    assert study.GAPS[0] <= gap <= study.GAPS[1]
    assert float(torch.linalg.eigvalsh(H)[0]) == pytest.approx(-gap, abs=10 * study.OFFSET)
    assert float(torch.autograd.functional.jacobian(phi, x).norm()) < 10 * study.OFFSET < study.GRAD_TOL
    lower = torch.autograd.functional.jacobian(lambda y: problem.lower_value((x,), (y,), None, 0), x)
    assert torch.equal(lower, torch.zeros_like(x))


@pytest.mark.parametrize(("hits", "n"), [(0, 50), (7, 50), (50, 50), (1, 2)])
def test_wilson_is_that_of_scipy(hits: int, n: int) -> None:
    theirs = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert study.wilson(hits, n) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


def test_smoke_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["stopping_tests", "--smoke", "--output", str(tmp_path)])
    threads = torch.get_num_threads()
    try:
        study.main()
    finally:
        torch.set_num_threads(threads)
    cells = json.loads((tmp_path / "stopping_tests.json").read_text())["cells"]
    assert [(cell["test"], cell["verify"]) for cell in cells] == [(t, v) for t in study.TESTS for v in (False, True)]
    outcomes = [cell["outcomes"][0] for cell in cells]
    assert outcomes[:4:2] == ["saddle", "saddle"] and "saddle" not in outcomes[1::2] and "minimum" in outcomes[1::2]
    assert capsys.readouterr().out.count("\n| ") == len(study.TESTS)
