"""The examples run, write their files, and their numbers are what theory and common sense ask for."""

from __future__ import annotations

import csv
import struct
from pathlib import Path

import pytest
import torch

from benchmarks.octopus import time_ratio
from examples import hyper_cleaning, octopus
from examples.common import mean_and_deviation, median_and_range, with_range

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

DOCS = Path(__file__).parents[1] / "docs" / "results"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:])  # type: ignore[return-value]


def times(table: list[dict[str, str]], method: str, seed: str = "0", L: str = "1.0") -> list[int]:
    own = [row for row in table if (row["method"], row["seed"], row["L"]) == (method, seed, L)]
    assert [int(row["saddle"]) for row in own] == list(range(1, len(own) + 1))
    return [int(row["left_behind_at_step"]) for row in own]


def widest(text: str) -> int:
    """Length of the longest line, but for the one that names the files."""
    return max(len(line) for line in text.splitlines() if not line.startswith("Figure"))


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_octopus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    octopus.main(["--smoke", "--output", str(tmp_path / "new")])
    table = rows(tmp_path / "new" / "octopus.csv")
    plain, perturbed = times(table, "AIDBiO"), times(table, "PerturbedAID")
    # Waits of AIDBiO grow by the ratio of the closed form, up to the steps the connections take; the others stay.
    waits = [b - a for a, b in zip(plain, plain[1:], strict=False)]
    assert [round(b / a, 1) for a, b in zip(waits, waits[1:], strict=False)] == pytest.approx(
        [time_ratio(1.0)], abs=0.2
    )
    gaps = [b - a for a, b in zip(perturbed, perturbed[1:], strict=False)]
    assert len(perturbed) > len(plain) and gaps == pytest.approx([octopus.estimated_gap(1.0)] * len(gaps), rel=0.2)
    width, height = png_size(tmp_path / "new" / "octopus.png")
    assert width > 1000 and height > 400
    text = capsys.readouterr().out
    assert text.count("strict saddle (1 of 1)") == 2 and "lambda_min" in text
    assert widest(text) <= 100


def test_hyper_cleaning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hyper_cleaning.main(["--smoke", "--output", str(tmp_path)])
    (row,) = rows(tmp_path / "hyper_cleaning.csv")
    everything, learned, clean = (float(row[k]) for k in ("everything", "learned weights", "right labels only"))
    assert everything < learned < clean < 100
    assert float(row["gap recovered"]) == pytest.approx(100 * (learned - everything) / (clean - everything), abs=0.2)
    assert 0.85 < float(row["auc"]) < 1
    width, height = png_size(tmp_path / "hyper_cleaning.png")
    assert width > 1000 and height > 600
    assert widest(capsys.readouterr().out) <= 100


def test_digits_are_split_without_overlap_and_two_fifths_of_the_labels_are_wrong() -> None:
    data = hyper_cleaning.load(3, "cpu")
    parts = (data.train[0], data.validation[0], data.test[0])
    assert [len(part) for part in parts] == [600, 120, 1077]
    # All 1797 digits are different images, so a sample in two parts would make the union smaller.
    assert len(torch.unique(torch.cat(parts), dim=0)) == 1797
    assert int(data.wrong.sum()) == 240 and set(data.train[1].tolist()) == set(range(10))
    torch.testing.assert_close(data.train[0].mean(0), torch.zeros(64), atol=1e-6, rtol=0)


def test_committed_results_keep_what_they_are_quoted_for() -> None:
    table = rows(DOCS / "hyper_cleaning.csv")
    assert [row["seed"] for row in table] == [str(seed) for seed in range(10)]
    assert sum(float(row["gap recovered"]) for row in table) / 10 >= 60
    assert sum(float(row["auc"]) for row in table) / 10 >= 0.9
    staircase = rows(DOCS / "octopus.csv")
    for L in ("1.0", "3.0"):
        assert all(len(times(staircase, "PerturbedAID", str(seed), L)) == 10 for seed in range(10))
        plain = [times(staircase, "AIDBiO", str(seed), L) for seed in range(10)]
        ratios = [(t[-1] - t[-2]) / (t[-2] - t[-3]) for t in plain if len(t) > 2]
        assert len(ratios) >= 8 and ratios == pytest.approx([time_ratio(float(L))] * len(ratios), rel=0.1)


def test_spread_of_numbers() -> None:
    infinity = float("inf")
    assert median_and_range([3, 1, 8]) == ("3", "1-8")
    assert median_and_range([1, 2], ".1f") == ("1.5", "1.0-2.0")
    assert median_and_range([5, 7, infinity]) == ("7", "5+")
    assert median_and_range([5, infinity, infinity]) == ("-", "5+")
    assert median_and_range([infinity, infinity]) == median_and_range([]) == ("-", "")
    assert (with_range([4.0]), with_range([4.0, 6.0])) == ("4", "5 (4-6)")
    assert mean_and_deviation([1.0, 2.0, 3.0]) == ("2.0", "1.0") and mean_and_deviation([1.0]) == ("1.0", "-")


@pytest.mark.parametrize("seeds", ["0", "-1", "many"])
def test_number_of_seeds_is_checked(seeds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        octopus.main(["--seeds", seeds])
    assert "must be a positive integer" in capsys.readouterr().err
