"""Robust matrix sensing: closed forms, loops by hand, the accounting, and the study in small."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import torchbilevel as tb
from benchmarks import robust_tables
from benchmarks.experiments import ablations_sensing, robust_sensing
from benchmarks.robust_by_hand import ByHand
from benchmarks.robust_descent import BATCH, BUILD, DETERMINISTIC, OURS, Track, calls, descend, examine
from benchmarks.robust_sensing import CONCAVITY, Factor, RobustSensing, Weights, loss
from benchmarks.robust_sensing import robust_sensing as sensing

READINGS = tuple(CONCAVITY)


def matrices(data: RobustSensing) -> Tensor:
    """The symmetrised A_i, of shape (n, d, d), from their upper triangles, entry by entry."""
    d = len(data.M)
    full = torch.zeros(data.rows, d, d, dtype=torch.float64)
    for row, k in zip(data.A.T, data.entries.tolist(), strict=True):
        i, j = divmod(k, d)
        full[:, i, j] = full[:, j, i] = row if i == j else row / 2
    return full


def brute_phi(data: RobustSensing, U: Tensor) -> Tensor:
    """Phi from the formula, through autograd: y* by trying every size of the support."""
    seen = torch.stack([(A_i * (U @ U.T)).sum() for A_i in matrices(data)])
    L, n, c = (seen - data.b).square(), data.rows, data.concavity
    target = 1 / n + L / (2 * c)
    ordered = target.sort(descending=True).values
    candidates = []
    for k in range(1, n + 1):
        theta = (ordered[:k].sum() - 1) / k
        y = (target - theta).clamp(min=0)
        if abs(float(y.detach().sum()) - 1) < 1e-12:
            candidates.append(0.5 * y @ L - 0.5 * c * (y - 1 / n).square().sum())
    return candidates[0]


@pytest.mark.parametrize("spread", [0.0, 0.3])
@pytest.mark.parametrize("reading", READINGS)
def test_phi_its_gradient_and_its_hessian(reading: str, spread: float) -> None:
    data = sensing(3, 4, spread=spread, reading=reading, noise=0.1)
    U = data.start
    torch.testing.assert_close(data.phi(U), float(brute_phi(data, U)), rtol=1e-12, atol=1e-12)
    gradient = torch.autograd.functional.jacobian(lambda U: brute_phi(data, U), U)
    torch.testing.assert_close(data.gradient(U), gradient)
    hessian = torch.autograd.functional.hessian(lambda U: brute_phi(data, U), U).reshape(12, 12)
    torch.testing.assert_close(data.hessian(U), hessian)
    torch.testing.assert_close(data.smallest_eigenvalue(U), float(torch.linalg.eigvalsh(hessian)[0]))


@pytest.mark.parametrize("reading", READINGS)
def test_the_hessian_on_a_face_with_many_points(reading: str) -> None:
    """Near the solution most y_i are positive; against differences of the gradient, and against the package."""
    data = sensing(5, 6, reading=reading)
    g = torch.Generator().manual_seed(0)
    values, vectors = torch.linalg.eigh(data.M)
    U = vectors[:, -3:] * values[-3:].sqrt() + 0.1 * torch.randn(6, 3, generator=g, dtype=torch.float64)
    positive = int((data.respond(U).y > 0).sum())
    assert 20 < positive < data.rows
    h = 1e-6
    columns = []
    for k in range(18):
        step = torch.zeros(18, dtype=torch.float64)
        step[k] = h
        step = step.view(6, 3)
        columns.append((data.gradient(U + step) - data.gradient(U - step)).flatten() / (2 * h))
    torch.testing.assert_close(data.hessian(U), torch.stack(columns, 1), rtol=1e-6, atol=1e-7)
    problem = data.problem()
    with torch.no_grad():
        problem.x[0].copy_(U)
    certificate = tb.certify(problem, data.batch(), grad_tol=0.1, curvature_tol=0.05)
    own = examine(data, U)
    assert own["grad"] == pytest.approx(certificate.grad_norm, rel=1e-8)
    assert own["lambda_min"] == pytest.approx(certificate.lambda_min, abs=certificate.lambda_min_error + 1e-8)


@pytest.mark.parametrize("reading", READINGS)
def test_the_response_is_the_best_one(reading: str) -> None:
    """No other point of the simplex is better, and the margins are those of the bounds."""
    data = sensing(1, 5, spread=0.5, reading=reading)
    U, at = data.start, data.respond(data.start)
    assert float(at.y.sum()) == pytest.approx(1)
    upper = Factor(U, data.entries)
    best = loss(upper, Weights(at.y, data.concavity), data.batch()).item()
    assert best == pytest.approx(data.phi(U))
    g = torch.Generator().manual_seed(1)
    for _ in range(50):
        other = torch.rand(data.rows, generator=g, dtype=torch.float64).pow(8)
        y = 0.9 * at.y + 0.1 * other / other.sum()
        assert loss(upper, Weights(y, data.concavity), data.batch()).item() < best
    torch.testing.assert_close(at.margins.clamp(min=0), at.y)


def test_the_loss_is_the_mean_over_samples() -> None:
    """On one sample it is n y_i L_i / 2 - c |y - 1/n|^2 / 2, in either storage; on all of them f."""
    data, whole = sensing(2, 5, spread=0.3), sensing(2, 5, spread=0.3, whole=True)
    y = torch.rand(data.rows, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    upper, lower, A = Factor(data.start, data.entries), Weights(y, 1.0), matrices(data)
    singles = []
    for i in range(data.rows):
        residual = (A[i] * (data.start @ data.start.T)).sum() - data.b[i]
        want = 0.5 * data.rows * y[i] * residual**2 - 0.5 * (y - 1 / data.rows).square().sum()
        A_i, b_i, index = data.batch()
        singles.append(loss(upper, lower, (A_i[i : i + 1], b_i[i : i + 1], index[i : i + 1])))
        torch.testing.assert_close(singles[-1], want)
    torch.testing.assert_close(loss(upper, lower, data.batch()), torch.stack(singles).mean())
    torch.testing.assert_close(
        loss(Factor(whole.start, whole.entries), lower, whole.batch()), torch.stack(singles).mean()
    )
    torch.testing.assert_close((A * data.M).sum((1, 2)), data.b)
    for name in ("gradient", "hessian"):
        torch.testing.assert_close(getattr(whole, name)(data.start), getattr(data, name)(data.start))


def test_the_solution_has_the_value_zero_and_no_negative_curvature() -> None:
    data = sensing(0, 6)
    values, vectors = torch.linalg.eigh(data.M)
    U = vectors[:, -3:] * values[-3:].sqrt()
    assert data.phi(U) == pytest.approx(0, abs=1e-25) and data.ratio(U) == pytest.approx(0, abs=1e-25)
    assert data.smallest_eigenvalue(U) > -1e-12
    torch.testing.assert_close(data.respond(U).y, torch.full_like(data.b, 1 / data.rows))
    assert float(data.start[:, 0].norm()) == pytest.approx(float(values[-1])) and not data.start[:, 1:].any()


def test_scales_spreads_and_noise() -> None:
    """A_i and b_i shrink together, so that L_i shrinks by d; the other options leave the data as they are."""
    scaled, printed = sensing(4, 6), sensing(4, 6, scale="printed")
    torch.testing.assert_close(printed.A, 6**0.5 * scaled.A)
    torch.testing.assert_close(printed.b, 6**0.5 * scaled.b)
    entries = matrices(sensing(0, 20, scale="printed"))[:, 0, 1:]
    assert float(entries.std()) == pytest.approx(0.5**0.5, rel=0.05)  # of (A + A') / 2, off the diagonal
    noisy, wide = sensing(4, 6, noise=0.5), sensing(4, 6, spread=1e-3, columns=5)
    torch.testing.assert_close(noisy.A, scaled.A)
    assert float((noisy.b - scaled.b).std()) == pytest.approx(0.5 * 6**-0.5, rel=0.2)
    torch.testing.assert_close(wide.start[:, 0], scaled.start[:, 0])
    assert wide.start.shape == (6, 5) and float(wide.start[:, 1:].std()) == pytest.approx(1e-3, rel=0.5)


def test_zero_columns_stay_zero_on_every_sample() -> None:
    data = sensing(0, 6)
    for name in ("SGDA", "AccMDA", "SREDA"):
        result = descend(BUILD[name](data, 0, lr=0.01), data, 0, 2000)
        assert result["beyond"] == 0.0 and result["ratio"] > 0.3
    assert descend(BUILD[OURS](data, 0, grad_tol=10.0), data, 0, 1000)["beyond"] > 0


def test_a_bound_with_a_multiplier_of_zero_is_found() -> None:
    """With L = (2, 0) the projection of (1/2, 1/2) + L / 2 is (1, 0), just so."""
    one = torch.ones(1, 1, dtype=torch.float64)
    A, b = torch.tensor([[1.0], [0.0]], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    data = RobustSensing(A, b, one, one, torch.zeros(1, dtype=torch.long), 1.0)
    assert data.degenerate(2**0.25 * one)
    assert not data.degenerate(2**0.25 * 1.01 * one) and not data.degenerate(2**0.25 * 0.99 * one)


@pytest.mark.parametrize("name", ["PRGDA", "SREDA"])
@pytest.mark.parametrize("reading", READINGS)
def test_the_loop_by_hand_is_the_package(name: str, reading: str) -> None:
    data = sensing(3, 6, spread=0.1, reading=reading)
    source, same = data.source(5), data.source(5)
    options = {"grad_tol": 0.0} if name == "PRGDA" else {}
    hand = ByHand(data, after=name == "SREDA", draw=lambda: source(BATCH))
    method = BUILD[name](data, 0, lr=1e-3, **options)
    for _ in range(30):
        hand.step()
        method.zero_grad()
        method.backward(same)
        method.step()
    torch.testing.assert_close(hand.U, method.problem.x[0].detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(hand.y, method.problem.y[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "options", "want"),
    [
        ("SGDA", {"lr": 0.01}, 7 * BATCH),
        ("AccMDA", {"lr": 0.01}, 13 * BATCH),
        ("PRGDA", {}, 120 + 8 * BATCH + 6 * 10 * BATCH),
        (OURS, {}, 7 * 6),
        ("full batch", {"optimizer": "Adam", "lr": 0.01}, 7 * 120),
    ],
)
def test_calls(name: str, options: dict[str, Any], want: int) -> None:
    """Seven steps: gradients on samples, and n for y*(U_0)."""
    data = sensing(0, 6)
    method = BUILD[name](data, 0, **options)
    batch = data.batch() if name == "full batch" else data.source(0)
    for _ in range(7):
        method.zero_grad()
        method.backward(batch)
        method.step()
    assert calls(method, data) == 120 + want


def test_a_ratio_counts_once_it_has_held() -> None:
    """Reached at the first of two looks in a row."""
    data, track = sensing(0, 6), Track((0.5,))
    values, vectors = torch.linalg.eigh(data.M)
    good, bad = vectors[:, -3:] * values[-3:].sqrt(), data.start
    for spent, U in ((100, good), (200, bad), (300, good), (400, good), (500, good)):
        track.look(data, U, spent)
    assert track.reached == {0.5: 300}
    assert [point[0] for point in track.curve] == [100, 300, 500]


def test_divergence_is_a_result() -> None:
    data = sensing(0, 6)
    result = descend(BUILD["SGDA"](data, 0, lr=100.0), data, 0, 5000)
    assert result["diverged"] and "phi" not in result and result["reached"]["0.01"] is None


def row(name: str, lr: float, calls: int | None, phi: float, diverged: bool = False) -> dict[str, Any]:
    """A tuning run."""
    result = {"reached": {"0.01": calls}, "diverged": diverged, "calls": 1, **({} if diverged else {"phi": phi})}
    return {"setting": {"part": "tuning", "name": name, "options": {"lr": lr}}, "result": result}


def test_the_tuned_value_has_the_fewest_calls_then_the_smallest_phi() -> None:
    rows = [row("SGDA", 1e-3, None, 0.2), row("SGDA", 3e-3, None, 0.1), row("SGDA", 0.1, None, 0.0, diverged=True)]
    assert robust_tables.tuned(rows, "SGDA") == {"lr": 3e-3}
    rows += [row("SGDA", 0.03, 900, 0.5), row("SGDA", 0.03, 700, 0.5), row("SGDA", 0.01, 950, 0.5)]
    assert robust_tables.tuned(rows, "SGDA") == {"lr": 0.03}
    assert robust_tables.tuned(rows, "SGDA", robust_tables.STATED) == {"lr": 3e-3}
    rows += [row("SGDA", 0.03, None, 0.5)]
    assert robust_tables.tuned(rows, "SGDA") == {"lr": 0.01}  # the worst seed counts
    assert robust_tables.tuned(rows, "SREDA") is None


def test_curves_of_runs_that_end_early_go_on() -> None:
    runs = [{"curve": [[10, 100], [1.0, 0.01], [1.0, 0.01]]}, {"curve": [[10, 1000], [1.0, 0.1], [1.0, 0.1]]}]
    grid, values = robust_tables.curves(runs, 1)
    assert grid[0] == pytest.approx(10) and grid[-1] == pytest.approx(1000)
    assert values[:, -1] == pytest.approx([0.01, 0.1]) and values[:, 0] == pytest.approx([1, 1])


@pytest.mark.parametrize("study", [robust_sensing, ablations_sensing])
def test_the_study_in_small(study: Any, tmp_path: Path) -> None:
    """One run of each part and method, and the report."""
    rows: list[Any] = []
    for _ in range(2):  # the second stage follows from the first
        seen = {(s["setting"]["part"], s["setting"]["name"]) for s in rows}
        for setting in study.settings(rows, 1, True):
            key = setting["part"], setting["name"]
            if key not in seen and setting["part"] != "speed" and setting["name"] not in DETERMINISTIC[1:]:
                rows.append(
                    {"setting": {**setting, "budget": 600}, "result": study.run(setting | {"budget": 600}, "cpu")}
                )
                seen.add(key)
    text = study.report(rows, tmp_path)
    assert text.count("| ") > 50 and "nan" not in text
    if study is robust_sensing:
        assert {p.name for p in tmp_path.iterdir()} == {"robust_sensing_exact.png", "robust_sensing_generic.png"}


def test_every_setting_is_plain_and_distinct() -> None:
    import json

    for study in (robust_sensing, ablations_sensing):
        keys = [json.dumps(s, sort_keys=True) for s in study.settings([], study.SEEDS, False)]
        assert len(set(keys)) == len(keys)
        assert all(math.isfinite(s["budget"]) for s in study.settings([], study.SEEDS, False))
