"""The trace of a run: every column against a loop by hand, files, checkpoints, pictures, what it must not touch."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchbilevel as tb

A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)  # g_yy
B = torch.tensor([[1.0, -1.0], [0.5, 2.0]], dtype=torch.float64)  # g = y'Ay/2 - y'Bx, f = |y - 1|^2 / 2 + |x|^2 / 10


class Point(nn.Module):
    def __init__(self, *start: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(start, dtype=torch.float64))


def quadratic() -> tb.BilevelProblem:
    return tb.BilevelProblem(
        Point(1.0, -2.0),
        Point(0.0, 0.0),
        upper_loss=lambda u, w, b: (w.value - 1).square().sum() / 2 + u.value.square().sum() / 10,
        lower_loss=lambda u, w, b: w.value @ A @ w.value / 2 - w.value @ B @ u.value,
    )


def aid(steps: int = 3) -> tb.Method:
    return tb.AIDBiO(
        quadratic(), lr=0.1, lower_solver=tb.GD(lr=0.3, steps=steps, tol=1e-12), linear_solver=tb.CG(max_iter=1)
    )


def saddle(x: Tensor) -> Tensor:
    return x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4


def escaping() -> tuple[Tensor, tb.optim.PerturbedGD]:
    x = torch.tensor([0.3, 0.0], dtype=torch.float64, requires_grad=True)
    return x, tb.optim.PerturbedGD(
        [x], lr=0.1, radius=1e-2, grad_tol=1e-2, escape_steps=30, value_test=True, value_tol=0.1
    )


def descend(x: Tensor, rule: torch.optim.Optimizer, steps: int, trace: tb.Trace | None = None, **options: Any) -> None:
    def closure() -> Tensor:
        rule.zero_grad()
        loss = saddle(x)
        loss.backward()
        return loss

    for _ in range(steps):
        loss = rule.step(closure)
        if trace is not None:
            trace.record(rule, loss, **options)


def test_rows_of_a_plain_rule_are_those_of_a_loop_by_hand() -> None:
    x, rule = escaping()
    trace = tb.Trace()
    descend(x, rule, 120, trace)
    other, same = escaping()
    for t, row in enumerate(trace.rows):
        (gradient,) = torch.autograd.grad(saddle(other), other)
        before = len(same.events)
        assert row["step"] == t + 1 and row["loss"] == saddle(other).item()
        assert row["gradient_norm"] == pytest.approx(math.hypot(*gradient.tolist()), rel=1e-14)
        descend(other, same, 1)
        assert row["phase"] == same.phase
        assert row["events"] == [[e.kind, e.value] for e in same.events[before:]]
        assert set(row) == {"step", "loss", "gradient_norm", "phase", "events"}
    kinds = [event[0] for row in trace.rows for event in row["events"]]
    assert {"perturbation", "escaped", "escape test passed"} <= set(kinds) and len(kinds) == len(rule.events)


def test_rows_of_a_method() -> None:
    method, trace = aid(), tb.Trace()
    for _ in range(5):
        x = method.problem.x[0].detach().clone()
        start = method.estimator.memory.z
        method.zero_grad()
        loss = method.backward()
        method.step()
        trace.record(method, loss, extra=2)
        y, (z,) = method.problem.y[0].detach(), method.estimator.memory.z
        f_y = y - 1
        row = trace.rows[-1]
        assert row["loss"] == pytest.approx((f_y.square().sum() / 2 + x.square().sum() / 10).item(), rel=1e-14)
        assert row["gradient_norm"] == pytest.approx((x / 5 + B.T @ z).norm().item(), rel=1e-13)
        assert row["linear_residual"] == pytest.approx(((f_y - A @ z).norm() / f_y.norm()).item(), rel=1e-9)
        assert row["linear_iterations"] == 1 + (start is not None) and row["lower_steps"] == 3 and row["extra"] == 2
        # |g_y| where it was last tested, before the last of the three steps.
        back = torch.linalg.solve(torch.eye(2, dtype=torch.float64) - 0.3 * A, y - 0.3 * B @ x)
        assert row["lower_residual"] == pytest.approx((A @ back - B @ x).norm().item(), rel=1e-9)
    columns = trace.to_dict()
    assert columns["step"] == [1, 2, 3, 4, 5] and set(columns["phase"]) == {"descent"}
    assert columns["lower_gradients"] == [4, 8, 12, 16, 20] and columns["upper_gradients"] == [1, 2, 3, 4, 5]
    assert columns["hessian_products"] == [1, 3, 5, 7, 9] and columns["jacobian_products"] == [1, 2, 3, 4, 5]
    assert columns["oracle_calls"] == [7, 15, 23, 31, 39]
    assert {**trace.rows[-1], **method.estimator.counts.state_dict()} == trace.rows[-1]


def test_a_probing_rule_has_the_gradient_of_x_in_its_row() -> None:
    problem = quadratic()
    rule = torch.optim.LBFGS(problem.upper.parameters(), lr=0.5, max_iter=3)
    method = tb.Method(problem, tb.Implicit(tb.GD(lr=0.6, steps=100), tb.Direct()), rule)
    x, trace = problem.x[0].detach().clone(), tb.Trace()
    loss = method.backward()
    method.step()
    trace.record(method, loss)
    response = torch.linalg.solve(A, B)
    exact = (x / 5 + response.T @ (response @ x - 1)).norm().item()
    assert trace.rows[0]["gradient_norm"] == pytest.approx(exact, rel=1e-9)
    left_behind = method.problem.upper.value.grad.norm().item()
    assert left_behind != pytest.approx(exact, rel=1e-6)  # or this test would show nothing


def test_nothing_waits_for_the_device_nothing_keeps_a_graph_and_nothing_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("a number was read")

    runs = []
    for traced in (True, False):
        method, trace = aid(), tb.Trace()
        for _ in range(4):
            method.zero_grad()
            loss = method.backward()
            method.step()
            if traced:
                with monkeypatch.context() as patch:
                    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy"):
                        patch.setattr(Tensor, name, refuse)
                    trace.record(method, loss)
        runs.append((method.problem.x[0].tolist(), method.problem.y[0].tolist(), method.estimator.counts.state_dict()))
    assert runs[0] == runs[1]

    x, rule = escaping()
    trace = tb.Trace()
    loss = saddle(x)
    loss.backward()
    trace.record(rule, loss)
    value = loss.item()
    with torch.no_grad():
        loss.add_(1.0)  # what a running total does to its first term
        x.grad.zero_()
    assert not any(isinstance(v, Tensor) and v.requires_grad for v in trace._waiting[0].values())
    assert trace.rows[0]["loss"] == value and trace.rows[0]["gradient_norm"] == pytest.approx(0.6)


def test_long_runs_are_read_now_and_then() -> None:
    x = torch.zeros(1, requires_grad=True)
    sgd, trace = torch.optim.SGD([x], lr=0.1), tb.Trace()
    for t in range(1000):
        trace.record(sgd, torch.tensor(float(t)))
        assert len(trace._waiting) < 257
    assert trace.to_dict() == {
        "step": list(range(1, 1001)),
        "loss": [float(t) for t in range(1000)],
        "phase": ["descent"] * 1000,
        "events": [[]] * 1000,
    }


def test_sparse_gradients_have_a_norm() -> None:
    table = nn.Embedding(5, 2, sparse=True, dtype=torch.float64)
    sgd, trace = torch.optim.SGD(table.parameters(), lr=0.1), tb.Trace()
    loss = table(torch.tensor([1, 1, 3])).sum()
    loss.backward()
    trace.record(sgd, loss)
    assert trace.rows[0]["gradient_norm"] == pytest.approx(math.sqrt(2 * 4 + 2 * 1))


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_files_read_back_as_they_were(tmp_path: Path, suffix: str) -> None:
    x, rule = escaping()
    trace = tb.Trace()
    descend(x, rule, 70, trace)
    descend(x, rule, 5, trace, accuracy=1 / 3)
    trace.record(rule, float("inf"), accuracy=7)
    trace.save(tmp_path / f"run{suffix}")
    again = tb.Trace.load(str(tmp_path / f"run{suffix}"))
    assert again.rows == trace.rows and sum(map(len, again.to_dict()["events"])) == len(rule.events) > 1
    assert "accuracy" not in again.rows[0] and isinstance(again.rows[-1]["accuracy"], int)
    trace.record(rule, float("nan"))
    trace.save(tmp_path / f"run{suffix}")
    assert math.isnan(tb.Trace.load(tmp_path / f"run{suffix}").rows[-1]["loss"])
    tb.Trace().save(tmp_path / f"empty{suffix}")
    assert tb.Trace.load(tmp_path / f"empty{suffix}").rows == []


def test_a_resumed_run_continues_its_trace(tmp_path: Path) -> None:
    x, rule = escaping()
    whole = tb.Trace()
    descend(x, rule, 100, whole)

    x, rule = escaping()
    trace = tb.Trace()
    descend(x, rule, 50, trace)
    torch.save([x.detach(), rule.state_dict(), trace.state_dict()], tmp_path / "half.pt")
    at, state, rows = torch.load(tmp_path / "half.pt", weights_only=True)
    y, resumed = escaping()
    with torch.no_grad():
        y.copy_(at)
    resumed.load_state_dict(state)
    late, trace = tb.Trace(), tb.Trace()
    trace.load_state_dict(rows)
    descend(y, resumed, 1, trace)
    late.record(resumed, 0.0)  # a trace that begins in mid-run does not repeat what happened before
    descend(y, resumed, 49, trace)
    assert trace.rows == whole.rows and len(rows["rows"]) == 50
    assert late.rows[0]["events"] == whole.rows[50]["events"]


def test_every_event_is_in_one_row() -> None:
    x, rule = escaping()
    first, second = tb.Trace(), tb.Trace()
    while not rule.events:
        descend(x, rule, 1)
    first.record(rule, 0.0)  # a trace that begins here has the event of this step
    assert [event[0] for event in first.rows[0]["events"]] == ["perturbation"]
    rule.withdraw("saddle left", -1.0)  # on record after the step was counted
    first.record(rule, 0.0)
    second.load_state_dict(first.state_dict())
    descend(x, rule, 1, second)
    assert [len(row["events"]) for row in second.rows] == [1, 1, 0]


class Recorder:
    def __init__(self) -> None:
        self.seen: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        assert type(scalar_value) in (int, float)
        self.seen.append((tag, scalar_value, global_step))


def test_a_writer_gets_every_number() -> None:
    live, after, trace = Recorder(), Recorder(), tb.Trace()
    x, rule = escaping()
    descend(x, rule, 60, trace, writer=live)
    trace.log(after)
    expected = [(name, row[name], row["step"]) for row in trace.rows for name in ("loss", "gradient_norm")]
    assert [entry for entry in live.seen if "/" not in entry[0]] == expected and after.seen == live.seen
    noted = [(f"events/{e.kind.replace(' ', '_')}", e.value, e.step + 1) for e in rule.events]
    assert [entry for entry in live.seen if "/" in entry[0]] == noted and len(noted) > 1


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    x, rule = escaping()
    trace = tb.Trace()
    descend(x, rule, 70, trace)
    figure = trace.plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    curve, *marks = figure.axes[0].lines
    assert curve.get_ydata().tolist() == trace.to_dict()["loss"]
    steps = {kind: [e.step + 1 for e in rule.events if e.kind == kind] for kind in {e.kind for e in rule.events}}
    assert {m.get_label().split(" (")[0]: list(m.get_xdata()) for m in marks} == steps and "escaped" in steps
    assert sys.modules["matplotlib"].pyplot.get_fignums() == []

    method, trace = aid(), tb.Trace()
    for _ in range(3):
        trace.record(method, method.backward())
    assert trace.plot(tmp_path / "x.pdf", x="oracle calls").axes[0].lines[0].get_xdata().tolist() == [7, 15, 23]


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'torchbilevel\[examples\]'"):
        tb.Trace().plot()


def test_errors(tmp_path: Path) -> None:
    x, rule = escaping()
    trace = tb.Trace()
    with pytest.raises(TypeError, match="Method or a torch optimizer, got Tensor"):
        trace.record(x, 1.0)  # type: ignore[arg-type]
    for bad, words in ((None, "None"), ("1", "'1'"), (torch.zeros(2), r"a tensor of shape \(2,\)")):
        with pytest.raises(ValueError, match=f"loss must be one number, got {words}"):
            trace.record(rule, bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="accuracy must be one number"):
        trace.record(rule, 1.0, accuracy="high")
    with pytest.raises(ValueError, match="step is a column"):
        trace.record(rule, 1.0, step=3)
    assert len(trace) == 0 and repr(trace) == "Trace(0 rows)"
    for act in (trace.save, tb.Trace.load):
        with pytest.raises(ValueError, match=r"path must end in .csv or .json, got .*run.txt"):
            act(tmp_path / "run.txt")
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="x must be a column that every row has, got 'step'; there is no row yet"):
        trace.plot()
    trace.record(rule, 1.0)
    with pytest.raises(ValueError, match="got 'oracle calls'; there is step, loss"):
        trace.plot(x="oracle calls")
