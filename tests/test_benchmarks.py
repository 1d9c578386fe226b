"""The studies of stopping tests and of escapes: instances and numbers are what they are said to be, and they run."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from benchmarks import escapes, matrix_sensing, single_loop
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


# --- escapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1000, 1001])
def test_the_best_column_is_a_saddle_whose_column_is_a_minimum(seed: int) -> None:
    data = matrix_sensing.sensing(seed, n=200)
    X = escapes.best_column(data)
    assert torch.equal(X[:, 1], torch.zeros(20, dtype=torch.float64))

    def phi(x: Tensor) -> Tensor:
        X = x.view(2, 20).T
        return 0.5 * ((data.A * (X @ X.T)).sum((1, 2)) - data.b).square().mean()

    x = X.T.flatten()
    assert data.phi(X) == pytest.approx(float(phi(x)), rel=1e-12)
    assert float(torch.autograd.functional.jacobian(phi, x).norm()) < 1e-7
    H = torch.autograd.functional.hessian(phi, x)
    assert float(torch.linalg.eigvalsh(H[:20, :20])[0]) > 0 > -0.5 > float(torch.linalg.eigvalsh(H[20:, 20:])[0])


def test_the_noise_is_the_deviation_of_the_hypergradient_on_batches() -> None:
    data = matrix_sensing.sensing(1000, n=50)
    X = escapes.best_column(data).requires_grad_()
    rows = []
    for A, b in zip(data.A, data.b, strict=True):
        (gradient,) = torch.autograd.grad(0.5 * ((A * (X @ X.T)).sum() - b) ** 2, X)
        rows.append(gradient.flatten())
    variance = torch.stack(rows).var(0, correction=0).sum()
    assert escapes.noise(data, X.detach()) == pytest.approx(math.sqrt(float(variance) / escapes.BATCH), rel=1e-9)


@pytest.mark.parametrize("name", [name for name, entry in escapes.ENTRIES.items() if entry.parent is None])
def test_parents_stay_in_the_stable_set(name: str) -> None:
    entry = escapes.ENTRIES[name]
    at = entry.start(0.0, 1000)
    method = entry.build(at, 0)
    start = at.problem.x[0].clone()
    for _ in range(12):
        method.zero_grad()
        method.backward(**at.sources)
        method.step()
    (x,) = at.problem.x
    off = x[:1] if x.ndim == 1 else x[:, 1]
    assert torch.equal(off, torch.zeros_like(off)) and not torch.equal(x, start) and not at.left()


def test_starts_have_the_distance() -> None:
    assert escapes.twin(1e-6, 3).problem.upper.x[0].item() == 1e-6
    off = escapes.sensed(1e-6, 1000).problem.upper.value[:, 1].norm()
    assert off.item() == pytest.approx(1e-6, rel=1e-12)


def test_the_cost_of_gradient_descent_grows_by_the_factor_of_the_saddle() -> None:
    """With h = H_11, first y_1 <- x_1 + (1 - h)^K (y_1 - x_1), then x_1 <- x_1 + lr (2 x_1 - h (y_1 - x_1))."""
    far, near = (escapes.play(("GDmax", distance, 1000), 80) for distance in (1e-3, 1e-9))
    assert far.cost is not None and near.cost is not None
    each = escapes.ASCENT["steps"] + 1
    assert far.samples == each * far.steps
    h, lr = 1 / escapes.TWIN_KAPPA, escapes.TWIN_LR
    keep = (1 - h) ** escapes.ASCENT["steps"]
    one_step = torch.tensor([[1 + 2 * lr + lr * h * keep, -lr * h * keep], [1 - keep, keep]])
    growth = float(torch.linalg.eigvals(one_step).abs().max())
    assert 1.5 < growth < 1.51
    assert (near.cost - far.cost) / each == pytest.approx(math.log(1e6) / math.log(growth), abs=1)


def test_escapes_are_counted_in_iterations_of_the_parent() -> None:
    def run(name: str, distance: float, seed: int, cost: int | None, minimum: bool = True) -> escapes.Run:
        verdict = "epsilon-local minimum" if minimum else "strict saddle"
        return escapes.Run(name, distance, seed, cost, 2000, 200, "running", verdict, 0.1, 0.0, 0.0)

    runs = [run(name, 0.0, seed, 500) for name in escapes.ENTRIES for seed in range(3)]
    runs += [run(name, 1e-4, seed, 100 + 10 * seed) for name in escapes.ENTRIES for seed in range(3)]
    runs += [run(name, 1e-8, seed, 500) for name in escapes.ENTRIES for seed in range(3)]
    lost = run("GDmax", 0.0, 1, None, minimum=False)
    runs = [lost if (r.method, r.distance, r.seed) == ("GDmax", 0.0, 1) else r for r in runs]
    rows = escapes.summarise(runs)
    assert rows["GDmax"]["unit"] == rows["PerturbedGDmax"]["unit"] == 10  # 2000 samples in 200 steps
    zero, near, far = rows["GDmax"]["cells"]
    assert (zero["distance"], near["distance"], far["distance"]) == (0.0, 1e-8, 1e-4)
    assert (zero["median"], zero["range"], zero["left"], zero["certified"]) == (50, (50, math.inf), 2, 2)
    assert (far["median"], far["range"], far["left"]) == (11, (10, 12), 3)
    assert rows["GDmax"]["per_decade"] == pytest.approx((50 - 11) / 4)
    lines = escapes.table(rows).splitlines()
    assert len({len(line) for line in lines if line.startswith("|")}) == 1
    assert "50 (50 to -), 2/2" in lines[2] and "11 (10 to 12), 3/3" in lines[2] and "9.8" in lines[2]


def test_escapes_smoke_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["escapes", "--smoke", "--output", str(tmp_path)])
    threads = torch.get_num_threads()
    try:
        escapes.main()
    finally:
        torch.set_num_threads(threads)
    runs = json.loads((tmp_path / "escapes.json").read_text())["runs"]
    assert {(run["method"], run["distance"]) for run in runs} == {(n, d) for n in escapes.ENTRIES for d in (0.0, 1e-3)}
    parents = [run for run in runs if escapes.ENTRIES[run["method"]].parent is None and run["distance"] == 0]
    assert len(parents) == 4 and all(run["cost"] is None for run in parents)
    left = [run["method"] for run in runs if run["distance"] == 0 and run["cost"] is not None]
    assert "PerturbedGDmax" in left
    assert (tmp_path / "escapes.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("\n| ") == len(escapes.ENTRIES)


# --- single_loop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", single_loop.BUDGET)
def test_the_exact_hypergradient_is_that_of_differences(data: str) -> None:
    task = single_loop.Task(0, data)
    x = torch.linspace(-2, 0, len(task.start), dtype=torch.float64)

    def phi(x: Tensor) -> float:
        y = torch.zeros_like(x)
        for _ in range(30):
            gradient, H = single_loop.derivatives(y, task.train)
            y = y - torch.linalg.solve(H + x.exp().diag(), gradient + x.exp() * y)
        return float(single_loop.loss(y, task.valid) + single_loop.RIDGE * (x - task.start).square().sum())

    h, eye = 1e-5, torch.eye(len(x), dtype=torch.float64)
    slopes = torch.tensor([(phi(x + h * e) - phi(x - h * e)) / (2 * h) for e in eye], dtype=torch.float64)
    assert task.exact(x) == pytest.approx(float(slopes.norm()), rel=1e-6)


def test_single_loop_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["single_loop", "--smoke", "--output", str(tmp_path)])
    threads = torch.get_num_threads()
    try:
        single_loop.main()
    finally:
        torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "single_loop.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(single_loop.ENTRIES)
    assert all(len(row["hits"]) == 1 and len(row["hits"][0]) == len(single_loop.LEVELS) for row in rows)
    assert capsys.readouterr().out.count("\n| ") == len(single_loop.ENTRIES)
