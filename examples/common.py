"""What the examples share: the command line, numbers with their spread, and everything about figures."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

BLUE, ORANGE, GREEN, RED, GREY = "#2f6db5", "#e07b39", "#2e8b57", "#c23b3b", "#8a8f98"


def arguments(description: str, seeds: int) -> argparse.ArgumentParser:
    """The options that every example has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=_positive, default=seeds, metavar="N", help="run seeds 0 to N - 1")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    parser.add_argument(
        "--output", type=Path, default=Path("results"), metavar="DIR", help="folder of figure and table"
    )
    parser.add_argument("--smoke", action="store_true", help="one short run, a few seconds: does it work here?")
    # Tensors as small as these cost more to share between threads than to work on.
    torch.set_num_threads(1)
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text}")
    return int(text)


def seeds_named(n: int) -> str:
    """The seeds 0 to n - 1 in words."""
    return "seed 0" if n == 1 else f"seeds 0-{n - 1}"


def median_and_range(values: Sequence[float], form: str = ".0f") -> tuple[str, str]:
    """Median and smallest-largest, as text; infinity stands for "never" and is shown as ``-``, and ``+`` in a range."""
    if not values or math.isinf(min(values)):
        return "-", ""
    low, high = min(values), max(values)
    middle = statistics.median(values) if math.isfinite(high) else statistics.median_low(values)
    spread = f"{low:{form}}+" if math.isinf(high) else f"{low:{form}}-{high:{form}}"
    return "-" if math.isinf(middle) else f"{middle:{form}}", spread if len(values) > 1 else ""


def with_range(values: Sequence[float], form: str = ".0f") -> str:
    """Median, and the range in parentheses where there is one."""
    middle, spread = median_and_range(values, form)
    return f"{middle} ({spread})" if spread else middle


def mean_and_deviation(values: Sequence[float], form: str = ".1f") -> tuple[str, str]:
    """Mean and sample standard deviation, as text; one value has no deviation."""
    return f"{statistics.fmean(values):{form}}", f"{statistics.stdev(values):{form}}" if len(values) > 1 else "-"


def panels(rows: list[list[str]], size: tuple[float, float], **grid: Any) -> tuple[Any, dict[str, Any]]:
    """A figure and its axes by name, as ``plt.subplot_mosaic`` has them."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the figures need matplotlib: pip install 'torchbilevel[examples]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"axes.titlesize": 10.5, "axes.titlelocation": "left", "legend.frameon": False})
    return plt.subplot_mosaic(rows, figsize=size, layout="constrained", gridspec_kw=grid)


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG."""
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=130)
    plt.close(figure)
