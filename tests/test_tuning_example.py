"""The tuning example: its table, the box, equal cost, and the claims that are made with its committed results."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from examples import tuning

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

DOCS = Path(__file__).parents[1] / "docs" / "results"
STRATEGIES = ("grid", "random", "descent", "with escapes", "grid, all data", "descent, all data")


class Silent:
    def update(self) -> None: ...

    def set_description(self, _: str) -> None: ...


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuning.main(["--smoke", "--output", str(tmp_path / "new")])
    table = {(row["task"], row["strategy"]): row for row in rows(tmp_path / "new" / "tuning.csv")}
    assert set(table) == {(task, name) for task in ("breast cancer", "digits") for name in STRATEGIES}
    for task in ("breast cancer", "digits"):
        calls = {name: int(table[task, name]["calls"]) for name in STRATEGIES}
        assert calls["grid"] == calls["random"] and 0 <= calls["descent"] - calls["grid"] <= tuning.FIT
    # Every step of ITD: 20 gradients of g, one of f, 20 products of either kind; before them FIT steps of training.
    assert int(table["digits", "descent"]["calls"]) == tuning.FIT + 5 * 61
    for column in ("validation", "test"):
        assert float(table["digits", "descent"][column]) < float(table["digits", "grid"][column])
    assert (tmp_path / "new" / "tuning.png").read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert "2368 strengths" in text and max(len(line) for line in text.splitlines()[:-1]) <= 110


@pytest.mark.parametrize("task", [tuning.CANCER, tuning.DIGITS], ids=lambda task: task.name)
def test_strengths_start_in_the_middle_and_stay_in_the_box(task: tuning.Task) -> None:
    data = tuning.load(task, 0, "cpu")
    run = tuning.descend(task, 0, True, 6, data, Silent())
    logs = torch.cat([log.detach().flatten() for log in run.strengths.logs])
    assert logs.min() >= tuning.LOW and logs.max() <= tuning.HIGH and logs.std() > 0.01
    start = torch.cat([log.detach().flatten() for log in tuning.fresh(task, 0, "cpu")[0].logs])
    assert start.tolist() == pytest.approx([math.log(1e-2)] * (30 if task is tuning.CANCER else 2368))


def test_penalty_is_that_of_the_formula_and_leaves_biases_free() -> None:
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 2))
    with torch.no_grad():
        for p, values in zip(model.parameters(), ([[3.0, 4.0]], [7.0], [[1.0], [2.0]], [5.0, 6.0]), strict=True):
            p.copy_(torch.tensor(values))
    strengths = tuning.Strengths([torch.tensor([2.0, 0.5]).log(), torch.zeros(2, 1)])
    assert strengths(model).item() == pytest.approx((2 * 9 + 0.5 * 16 + 1 + 4) / 2)


@pytest.mark.parametrize(("task", "total"), [(tuning.CANCER, 569), (tuning.DIGITS, 1797)], ids=["cancer", "digits"])
def test_samples_are_split_without_overlap(task: tuning.Task, total: int) -> None:
    parts = tuning.load(task, 3, "cpu")
    sizes = [len(x) for x, _ in parts]
    assert sizes == [task.n_train, task.n_validation, total - task.n_train - task.n_validation]
    assert len(torch.unique(torch.cat([x for x, _ in parts]), dim=0)) == total
    torch.testing.assert_close(parts[0][0].mean(0), torch.zeros(parts[0][0].shape[1]), atol=1e-5, rtol=0)


def test_committed_results_keep_what_they_are_quoted_for() -> None:
    table = rows(DOCS / "tuning.csv")

    def column(task: str, strategy: str, name: str) -> list[float]:
        own = [row for row in table if (row["task"], row["strategy"]) == (task, strategy)]
        assert [row["seed"] for row in own] == [str(seed) for seed in range(10)]
        return [float(row[name]) for row in own]

    for task in ("breast cancer", "digits"):
        for search in ("grid", "random"):  # hypergradients find smaller validation losses than searches, every time
            pairs = zip(column(task, "descent", "validation"), column(task, search, "validation"), strict=True)
            assert all(ours < theirs for ours, theirs in pairs)
    digits, grid = column("digits", "descent", "test"), column("digits", "grid", "test")
    assert all(ours < theirs for ours, theirs in zip(digits, grid, strict=True)) and sum(digits) < 0.7 * sum(grid)
    for task in ("breast cancer", "digits"):  # where escaping gives nothing
        plain, escaping = (sum(column(task, name, "test")) for name in ("descent", "with escapes"))
        assert escaping == pytest.approx(plain, rel=0.05)
        assert min(column(task, "with escapes", "displacements")) >= 1
