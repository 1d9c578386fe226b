"""The few-shot example runs, writes its files, and its tasks are what it says they are."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from examples import few_shot
from examples.few_shot import Digits, Waves

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

DOCS = Path(__file__).parents[1] / "docs" / "results"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:the linear solve ended with non-positive curvature")
def test_few_shot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few_shot.main(["--smoke", "--output", str(tmp_path)])
    table = rows(tmp_path / "few_shot.csv")
    assert [(row["family"], row["method"]) for row in table] == [
        (family, method) for family in ("digits", "waves") for method in few_shot.COLORS
    ]
    error = {row["method"]: [float(row[f"after {k}"]) for k in (0, 5)] for row in table if row["family"] == "waves"}
    for method in ("MAML", "ANIL"):  # even a short run learns to adapt
        assert error[method][1] < min(error[method][0], error["from scratch"][1])
    assert all(20 < float(row["after 20"]) < 100 for row in table if row["family"] == "digits")
    assert (tmp_path / "few_shot.png").stat().st_size > 10_000
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines() if not line.startswith("Figure")) <= 100


def test_digits_are_new_at_the_test_and_every_task_has_all_its_classes() -> None:
    family = Digits(0, "cpu")
    assert [len(family.classes[training]) for training in (True, False)] == [24, 16]
    pictures = torch.cat([family.classes[training].flatten(0, 1) for training in (True, False)])
    assert len(pictures) == 40 * 174 == len(torch.unique(pictures, dim=0))  # no picture is in two classes
    (inputs, targets), (further, wanted) = family.draw(3, training=False)
    assert inputs.shape == (3, 5, 64) and further.shape == (3, 50, 64)
    assert targets.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert wanted[0].bincount().tolist() == [10] * 5


def test_waves_are_sine_waves_of_one_amplitude_and_phase_per_task() -> None:
    (t, values), (further, wanted) = Waves(0, "cpu").draw(4, training=True)
    assert t.shape == (4, 10, 1) and further.shape == (4, 20, 1)
    # a sin t + b cos t has all of them; the points to adapt to determine a and b, and so the others.
    basis, other = (torch.cat((s.sin(), s.cos()), -1).double() for s in (t, further))
    coefficients = torch.linalg.lstsq(basis, values.double()).solution
    torch.testing.assert_close(other @ coefficients, wanted.double(), atol=1e-4, rtol=0)


def test_committed_results_keep_what_they_are_quoted_for() -> None:
    table = rows(DOCS / "few_shot.csv")
    seeds = len(table) // (2 * len(few_shot.COLORS))
    assert {row["seed"] for row in table} == {str(seed) for seed in range(seeds)}

    def mean(family: str, method: str, k: int = 5) -> float:
        own = [float(row[f"after {k}"]) for row in table if (row["family"], row["method"]) == (family, method)]
        return sum(own) / len(own)

    assert max(mean("waves", method) for method in ("MAML", "ANIL")) < 0.2 * mean("waves", "joint training")
    assert mean("digits", "joint training") > mean("digits", "MAML")
    assert mean("digits", "MAML, escaping") == pytest.approx(mean("digits", "MAML"), abs=2.0)
