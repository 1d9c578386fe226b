"""Many runs of one experiment: in processes, with a progress bar, each kept as soon as it is done.

Finished runs are lines of a JSON file. A study that was interrupted goes on where it stopped, and one that is asked for
more seeds makes only those that are missing.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import platform
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

Row = dict[str, dict[str, Any]]


def conduct(name: str, seeds: int | None, smoke: bool, device: str, workers: int, folder: Path) -> str:
    """Make the runs of an experiment that are missing, and its report.

    Args:
        name: the module of ``benchmarks.experiments``.
        seeds: how many seeds; the module's own number if None.
        smoke: whether to run in small.
        device: where to compute.
        workers: number of processes.
        folder: of results, figures and tables.

    Returns:
        The report, as Markdown.
    """
    experiment = importlib.import_module(f"benchmarks.experiments.{name}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    known = {_key(row["setting"]): row for row in _read(path)}
    while True:
        wanted = experiment.settings(list(known.values()), seeds or experiment.SEEDS, smoke)
        missing = [setting for setting in wanted if _key(setting) not in known]
        if not missing:
            break
        for row in _made(name, missing, device, workers):
            known[_key(row["setting"])] = row
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
    text = experiment.report([known[_key(setting)] for setting in wanted], folder).strip()
    text += f"\n\n{_where_computed(device)}\n"
    (folder / f"{name}.md").write_text(text)
    return text


def _made(name: str, settings: list[dict[str, Any]], device: str, workers: int) -> Iterable[Row]:
    job = partial(_job, name, device)
    bar = partial(tqdm, total=len(settings), desc=name, unit="run", smoothing=0)
    if workers == 1:
        yield from bar(map(job, settings))
    else:
        with multiprocessing.get_context("spawn").Pool(min(workers, len(settings))) as pool:
            yield from bar(pool.imap_unordered(job, settings))


def _job(name: str, device: str, setting: dict[str, Any]) -> Row:
    # Tensors as small as these cost more to share between threads than to work on.
    torch.set_num_threads(1)
    experiment = importlib.import_module(f"benchmarks.experiments.{name}")
    return {"setting": setting, "result": experiment.run(setting, device)}


def _key(setting: dict[str, Any]) -> str:
    return json.dumps(setting, sort_keys=True)


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _where_computed(device: str) -> str:
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})"
    return f"*{machine}, Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}.*"


def insert(page: Path, name: str, text: str) -> None:
    """Put a report between the lines ``<!-- name -->`` and ``<!-- /name -->`` of a page, if it has them."""
    before = page.read_text()
    after = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: m[1] + text + m[2], before, flags=re.DOTALL)
    if after != before:
        page.write_text(after)


def where(rows: list[Row], **setting: Any) -> list[dict[str, Any]]:
    """The results of the rows whose settings have these values."""
    return [row["result"] for row in rows if all(row["setting"].get(key) == value for key, value in setting.items())]


def rounded(value: Any, digits: int = 6) -> Any:
    """Floats to significant digits, in lists and dicts too; numbers that are not finite become None."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if abs(value) < float("inf") else None
    return value


def thin(points: Sequence[Any], n: int = 80) -> list[Any]:
    """At most n of the points, evenly spaced, with the first and the last."""
    if len(points) <= n:
        return list(points)
    return [points[round(i * (len(points) - 1) / (n - 1))] for i in range(n)]


def median_range(values: Sequence[float | None], form: str = ",.0f") -> str:
    """Median with smallest and largest in parentheses; None stands for "never" and counts as larger than any number."""
    if not values:
        return ""
    numbers = sorted(float("inf") if value is None else value for value in values)
    low, middle, high = (
        "never" if v == float("inf") else f"{v:{form}}" for v in (numbers[0], median(numbers), numbers[-1])
    )
    return middle if low == high else f"{middle} ({low}-{high})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: the first to the left, the others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def joined(line: Sequence[str]) -> str:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        return "| " + " | ".join(cells) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([joined(lines[0]), rule, *map(joined, lines[1:])])
