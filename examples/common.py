"""What the examples share: the command line, numbers with their spread, and the look of the figures."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

BLUE, ORANGE, GREEN, GREY = "#3b6fb6", "#e07b39", "#3a9a5b", "#8a8f98"


def arguments(description: str, seeds: int) -> argparse.ArgumentParser:
    """The options that every example has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds, metavar="N", help="run seeds 0 to N - 1")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    parser.add_argument("--output", type=Path, default=Path("results"), metavar="DIR", help="folder of figure and table")
    parser.add_argument("--smoke", action="store_true", help="one seed, a few seconds: does it run?")
    # Tensors as small as these cost more to share between threads than to work on.
    torch.set_num_threads(1)
    return parser


def mean_and_sd(values: Sequence[float], form: str = ".3f") -> tuple[str, str]:
    """Mean and sample standard deviation, as text; a single value has no spread."""
    sd = f"{statistics.stdev(values):{form}}" if len(values) > 1 else "-"
    return f"{statistics.fmean(values):{form}}", sd


def axes(rows: list[list[str]], size: tuple[float, float], **grid: Any) -> tuple[Any, dict[str, Any]]:
    """A figure and its axes by name, laid out as in ``plt.subplot_mosaic``."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the figures need matplotlib: pip install 'torchbilevel[examples]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"axes.titlesize": 11, "axes.titlelocation": "left", "legend.frameon": False})
    return plt.subplot_mosaic(rows, figsize=size, layout="constrained", gridspec_kw=grid)


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG."""
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=130)
    plt.close(figure)
