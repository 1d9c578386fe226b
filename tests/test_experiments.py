"""The frame of the experiments: runs are made once, kept at once, and a study goes on where it stopped."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.experiments import __main__ as command
from benchmarks.experiments.study import Row, conduct, insert, median_range, rounded, table, thin, where

MADE: list[dict[str, Any]] = []


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """An experiment in two stages: the seeds at two rates, then one run more at the better rate."""
    module = types.ModuleType("benchmarks.experiments.toy")

    def settings(rows: list[Row], seeds: int, smoke: bool) -> list[dict[str, Any]]:
        wanted = [{"stage": 1, "lr": lr, "seed": seed} for lr in (0.5, 1.5) for seed in range(seeds)]
        known = {row["setting"]["lr"]: row["result"]["loss"] for row in rows if row["setting"]["stage"] == 1}
        if len(known) == 2:
            wanted.append({"stage": 2, "lr": min(known, key=known.__getitem__), "seed": 0})
        return wanted

    def run(setting: dict[str, Any], device: str) -> dict[str, Any]:
        MADE.append(setting)
        return {"loss": (setting["lr"] - 0.4) ** 2, "device": device}

    def report(rows: list[Row], folder: Path) -> str:
        return table(["lr", "loss"], [[str(r["setting"]["lr"]), f"{r['result']['loss']:.2f}"] for r in rows])

    module.__dict__.update(SEEDS=2, settings=settings, run=run, report=report)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    MADE.clear()
    yield module


def test_the_second_stage_follows_from_the_first(toy: types.ModuleType, tmp_path: Path) -> None:
    text = conduct("toy", None, False, "cpu", 1, tmp_path)
    assert [(s["stage"], s["lr"], s["seed"]) for s in MADE] == [
        (1, 0.5, 0),
        (1, 0.5, 1),
        (1, 1.5, 0),
        (1, 1.5, 1),
        (2, 0.5, 0),
    ]
    assert text.count("0.01") == 3 and text.count("1.21") == 2
    assert (tmp_path / "toy.md").read_text() == text


def test_only_missing_runs_are_made(toy: types.ModuleType, tmp_path: Path) -> None:
    whole = conduct("toy", 3, False, "cpu", 1, tmp_path)
    lines = (tmp_path / "toy.jsonl").read_text().splitlines()
    (tmp_path / "toy.jsonl").write_text("".join(line + "\n" for line in lines[:4]))
    MADE.clear()
    assert conduct("toy", 3, False, "cpu", 1, tmp_path) == whole
    assert len(MADE) == len(lines) - 4
    assert sorted((tmp_path / "toy.jsonl").read_text().splitlines()) == sorted(lines)


def test_a_run_that_fails_loses_no_other(
    toy: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = toy.run

    def fails(setting: dict[str, Any], device: str) -> dict[str, Any]:
        if setting["lr"] == 1.5:
            raise RuntimeError("power cut")
        return inner(setting, device)  # type: ignore[no-any-return]

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(toy, "run", fails)
        conduct("toy", 2, False, "cpu", 1, tmp_path)
    assert [json.loads(line)["setting"]["lr"] for line in (tmp_path / "toy.jsonl").read_text().splitlines()] == [
        0.5,
        0.5,
    ]


def test_a_report_goes_between_its_lines(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- toy -->\nold\\1\n<!-- /toy -->\nb\n")
    insert(page, "toy", "new \\1\n")
    assert page.read_text() == "a\n<!-- toy -->\nnew \\1\n<!-- /toy -->\nb\n"
    insert(page, "other", "nothing\n")
    assert page.read_text().count("nothing") == 0


def test_numbers_and_tables() -> None:
    assert rounded({"a": [1 / 3, math.inf, math.nan, 2], "b": "x", "c": True}) == {
        "a": [0.333333, None, None, 2],
        "b": "x",
        "c": True,
    }
    assert thin(list(range(100)), 4) == [0, 33, 66, 99] and thin([1, 2], 4) == [1, 2]
    assert median_range([1000, 3000, None]) == "3,000 (1,000-never)"
    assert median_range([2.0, 2.0], ".1f") == "2.0" and median_range([None]) == "never" and median_range([]) == ""
    assert table(["method", "n"], [["a", "1"], ["long one", "100"]]).splitlines() == [
        "| method   |   n |",
        "|----------|----:|",
        "| a        |   1 |",
        "| long one | 100 |",
    ]
    rows = [{"setting": {"d": d, "seed": s}, "result": {"v": d + s}} for d in (1, 2) for s in (0, 1)]
    assert where(rows, d=2) == [{"v": 2}, {"v": 3}] and where(rows, d=3) == []


def test_the_command_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    for line in (["nonsense"], [], [command.NAMES[0], "--seeds", "0"]):
        with pytest.raises(SystemExit):
            command.main(line)
    assert "--seeds must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("name", command.NAMES)
def test_every_experiment_runs_in_small(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line to the report, every method of it."""
    pytest.importorskip("matplotlib")
    command.main([name, "--smoke", "--seeds", "1", "--workers", "1", "--output", str(tmp_path)])
    text = (tmp_path / f"{name}.md").read_text()
    assert text in capsys.readouterr().out and text.count("|---") >= 2
    rows = (tmp_path / f"{name}.jsonl").read_text().splitlines()
    assert rows and all(set(json.loads(row)) == {"setting", "result"} for row in rows)
