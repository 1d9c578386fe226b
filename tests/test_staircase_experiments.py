"""Descents of the octopus: they are the iterations they should be, and tables say what is in the rows."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from scipy.stats import linregress

from benchmarks import octopus, staircase
from benchmarks.experiments import ablations_staircase as ablations
from benchmarks.experiments import staircases
from benchmarks.experiments.study import conduct
from benchmarks.staircase import EPSILON, build, descend, summary
from examples import octopus as demo


def exact(name: str, d: int, L: float, seed: int = 0, **options: Any) -> Any:
    """A method whose hypergradient has no error: one step solves a lower level with H = I."""
    return build(name, d, L, seed, kappa=1.0, steps=1, **options)


def test_without_errors_and_displacements_it_is_gradient_descent_on_the_octopus() -> None:
    run = descend(exact("AIDBiO", 5, 1.5), 45)
    x = octopus.random_start(5, 0)
    for point in run.points:
        torch.testing.assert_close(point, x, rtol=1e-9, atol=1e-12)
        x = x.requires_grad_()
        x = x.detach() - torch.autograd.grad(octopus.octopus(x, 1.5), x)[0] / 6
    assert len(run.points) == 46 and not run.arrived and run.claims == []
    assert octopus.left_behind(run.points) == [11, 42]  # the table of plain gradient descent: 10, 41, counted from 0
    assert run.errors == pytest.approx([0.0], abs=1e-9)


@pytest.mark.parametrize(("perturbed", "plain"), [("PerturbedAID", "AIDBiO"), ("PerturbedGDmax", "GDmax")])
def test_radius_zero_is_the_method_without_displacements(perturbed: str, plain: str) -> None:
    start = octopus.saddle(1, 3) + torch.tensor([0.0, 1e-9, 0.0])
    a, b = (descend(build(*args, start=start), 40) for args in ((perturbed, 3, 1.0, 0), (plain, 3, 1.0, 0)))
    assert not torch.equal(a.points, b.points)
    a = descend(build(perturbed, 3, 1.0, 0, start=start, radius=0.0), 40)
    assert torch.equal(a.points, b.points)


@pytest.mark.parametrize(("d", "L"), [(20, 1.0), (10, 3.0)])
def test_all_saddles_are_left_in_arithmetic_time(d: int, L: float) -> None:
    method = exact("PerturbedAID", d, L)
    run = descend(method, 1000)
    result = summary(method, run, L)
    assert run.arrived and result["left"] == d and result["verdict"] == "epsilon-local minimum"
    assert result["distance"] < 1e-3 and result["claim"] == "escape test passed" and result["lambda_min"] == 2 * L
    waits = staircase.gaps(result)
    assert max(waits) < 1.6 * median(waits)
    assert sum(waits) / (d - 1) == pytest.approx(staircase.estimated_gap(L, d), rel=0.15)
    assert staircase.line_fit(result["times"])[1] > 0.99


def test_without_displacements_it_takes_geometric_time() -> None:
    method = exact("AIDBiO", 20, 1.0)
    result = summary(method, descend(method, 620), 1.0)
    assert result["left"] == 5 and result["verdict"] == "strict saddle" and result["claim"] == "running"
    assert staircase.last_ratio(result) == pytest.approx(octopus.time_ratio(1.0), rel=0.02)
    assert result["closest"][3] < 1e-20 and result["claims"] == result["displacements"] == 0


def test_a_displacement_too_short_to_escape_in_time_leads_to_a_false_claim() -> None:
    method = build("PerturbedAID", 3, 3.0, 0, radius=1e-9, start=torch.zeros(3, dtype=torch.float64))
    result = summary(method, descend(method, 12), 3.0)
    assert (result["claims"], result["false_claims"], result["first_claim_false"]) == (1, 1, True)
    assert result["claim"] == "escape test passed" and result["verdict"] == "strict saddle"
    assert result["lambda_min"] == pytest.approx(-2.0) and result["left"] == 0


def test_the_error_is_that_of_the_hypergradient() -> None:
    method = build("AIDBiO", 4, 1.0, 0, steps=3, warm_start=False)
    run = descend(method, 2)
    H, x = octopus.curvature(4, 10.0), run.points[1]
    y = (1 - (1 - H) ** 3) * x  # three steps from 0
    here, there = (p.clone().requires_grad_() for p in (x, y))
    (gradient,) = torch.autograd.grad(octopus.octopus(here, 1.0), here)
    (f_y,) = torch.autograd.grad(octopus.octopus(there, 1.0), there)
    error = (1 - (1 - H) ** 4) * f_y - gradient  # Neumann's z is H^{-1} (I - (I - H)^4) f_y
    assert run.errors == pytest.approx([5 * float(error.norm()) / EPSILON], rel=1e-9)


def test_what_descent_gains_near_a_minimum_is_no_escape() -> None:
    """A bowl L x^2 is 2 L x = 4/5 epsilon steep where it is f_thres high."""
    for L in staircase.CURVATURES:
        x = 0.8 * EPSILON / (2 * L)
        assert staircase.value_tol(L) == pytest.approx(L * x**2)


def test_closed_forms() -> None:
    assert staircase.estimated_gap(2.0, demo.D) == pytest.approx(demo.estimated_gap(2.0))
    values = [3.0, 9.0, 11.0, 40.0]
    fit = linregress([1, 2, 3, 4], values)
    assert staircase.line_fit(values) == pytest.approx((fit.slope, fit.rvalue**2))
    result = {"times": [10, 30, 70, 150], "calls": 900, "steps": 300, "left": 4}
    assert staircase.last_ratio(result) == 2.0 and staircase.gaps(result) == [20, 40, 80]
    assert staircase.calls_per_saddle(result) == pytest.approx(450 / 4)
    assert staircase.last_ratio({"times": [1, 2]}) is None and staircase.calls_per_saddle({"times": []}) is None


def test_a_thinned_staircase_keeps_its_steps() -> None:
    values = [-float(k) for k in range(10) for _ in range(100)]
    times, kept = staircase.curve(values)
    assert len(times) <= 80 and (times[0], times[-1]) == (0.0, 999.0)
    assert all(values[int(t)] == v for t, v in zip(times, kept, strict=True))
    for k in range(1, 10):  # the drop at step 100 k is seen to within four steps
        before = max(t for t, v in zip(times, kept, strict=True) if v > -k)
        after = min(t for t, v in zip(times, kept, strict=True) if v <= -k)
        assert before < 100 * k <= after <= 100 * k + 4


def test_the_claim_itself_is_tried_first_and_on_all_its_seeds() -> None:
    wanted = staircases.settings([], 10, False)
    assert all(s["d"] == 20 and s["mode"] == "aligned" for s in wanted[:60])
    assert [s["L"] for s in wanted[:4]] == list(staircase.CURVATURES) and wanted[59]["seed"] == 4
    for d, n in ((5, 10), (10, 10), (20, 5)):
        own = [s for s in wanted if (s["mode"], s["method"], s["d"]) == ("aligned", "PerturbedAID", d)]
        assert len(own) == 4 * n and {s["L"] for s in own} == set(staircase.CURVATURES)
    for module in (staircases, ablations):
        keys = [tuple(sorted(s.items())) for s in module.settings([], 10, False)]
        assert len(keys) == len(set(keys))


def fake(times: list[int], **values: Any) -> dict[str, Any]:
    """A result with these times."""
    blank = dict.fromkeys(("claims", "false_claims", "first_claim_false", "displacements"), 0)
    blank |= {"left": len(times), "times": times, "steps": 100, "calls": 1000, "verdict": "strict saddle", "error": 0.5}
    return {**blank, "distance": 1.0, "curve": [[0.0, 100.0], [0.0, -1.0]], "closest": [1e-9] * len(times), **values}


def test_tables_of_the_staircases() -> None:
    setting = {"mode": "aligned", "d": 5, "L": 1.0}
    rows = [
        {"setting": {**setting, "method": name, "seed": seed}, "result": result}
        for name, seed, result in (
            ("AIDBiO", 0, fake([10, 20, 40])),
            ("AIDBiO", 1, fake([10])),
            ("PerturbedAID", 0, fake([10, 20, 30, 44], verdict="epsilon-local minimum", claims=3, false_claims=2)),
        )
    ]
    line = staircases.left_table(rows, [(5, 1.0)]).splitlines()[2].split("|")
    assert [cell.strip() for cell in line[1:4]] == ["5, 1", "2 (1-3)", ""] and line[4].strip() == "4"
    line = staircases.line_table(rows, [(5, 1.0)]).splitlines()[2].split("|")
    assert [cell.strip() for cell in line[2:6]] == ["10 (10-14)", "", "24", "1.40"]
    line = staircases.ratio_table(rows, [(5, 1.0)]).splitlines()[2].split("|")
    assert [cell.strip() for cell in line[2:6]] == ["2.00", "", "", "2.71"]
    assert staircases.calls_table(rows, [(5, 1.0)]).count("117 (100-133)") == 1
    claims = staircases.claims_table(rows)
    assert "0 of 2" in claims and "1 of 1" in claims and "|      3 |     2 |" in claims


def test_slopes_are_those_of_the_logarithms() -> None:
    keys = {key: bound for key, bound in ablations.ORACLES.values()}
    rows = [
        {"setting": {"kappa": k, "seed": s}, "result": fake([1], **{key: 7 * k**bound for key, bound in keys.items()})}
        for k in ablations.KAPPAS
        for s in (0, 1)
    ]
    for key, bound in keys.items():
        assert ablations.slope(rows, key) == pytest.approx(bound)
    assert ablations.slope(rows[:2], "upper_gradients") is None
    assert "0 of 2" in ablations.kappa_table(rows)


@pytest.mark.parametrize("module", [staircases, ablations])
def test_runs_and_report(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = module.settings([], 1, True)
    parts = {s.get("part", s.get("method")): {**s, "steps": 3} for s in chosen}
    monkeypatch.setattr(module, "settings", lambda rows, seeds, smoke: list(parts.values()))
    text = conduct(module.__name__.rsplit(".", 1)[1], 1, True, "cpu", 1, tmp_path)
    assert text.count("|--") >= 4 and "nan" not in text
    assert len(list(tmp_path.glob("*.png"))) == (3 if module is staircases else 1)


def test_a_run_is_what_its_setting_says() -> None:
    base = {"part": "A1", "mode": "aligned", "method": "PerturbedAID", "seed": 0, "steps": 30}
    stuck = ablations.run({**base, "start": "saddle 2", "radius": 0.0}, "cpu")
    assert stuck["left"] == 2 and stuck["verdict"] == "strict saddle" and stuck["displacements"] == 0
    free = ablations.run({**base, "start": "saddle 2", "radius": staircase.RADIUS}, "cpu")
    assert free["left"] > 2 and free["displacements"] >= 1
    cold = {"part": "A12", "warm": "neither", "inner": 20, "seed": 0, "steps": 2}
    warm = ablations.run({**cold, "warm": "y and z"}, "cpu")
    assert warm["hessian_products"] == 41 and ablations.run(cold, "cpu")["hessian_products"] == 40
    short = ablations.run({**base, "part": "A6", "solvers": "3 and 3", "steps": 2}, "cpu")
    assert short["lower_gradients"] == 8 and short["hessian_products"] == 7
