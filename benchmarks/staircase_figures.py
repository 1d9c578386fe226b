"""Figures of many descents of the octopus."""

from __future__ import annotations

from pathlib import Path

from benchmarks.experiments.study import Row, where
from benchmarks.staircase import CURVATURES, METHODS
from examples.common import BLUE, GREEN, GREY, ORANGE, RED, panels, save

COLORS = dict(zip(METHODS, (ORANGE, RED, BLUE, GREY, GREEN), strict=True))
MARKERS = dict(zip(METHODS, "osD^v", strict=True))


def draw_staircases(rows: list[Row], path: Path) -> None:
    """Objective against iterations, a panel for each dimension and curvature; seed 0 in full, the others faint."""
    figure, axes = panels([[f"{d}, {L:g}" for L in CURVATURES] for d in (5, 10)], (14, 6.4))
    for d in (5, 10):
        for L in CURVATURES:
            ax = axes[f"{d}, {L:g}"]
            for name in ("AIDBiO", "PerturbedAID"):
                for seed, result in enumerate(where(rows, method=name, d=d, L=L)):
                    style = {"lw": 2.0, "label": name} if seed == 0 else {"lw": 0.7, "alpha": 0.35}
                    ax.plot(*result["curve"], color=COLORS[name], **style)
            ax.axhline(-d, color=GREY, lw=1, ls=":")
            ax.set(title=f"d = {d}, L = {L:g}", xlim=(0, 650 if d == 10 else 400), yticks=range(-d, 1, 1 + d // 10))
            if d == 10:
                ax.set_xlabel("outer iteration")
            if CURVATURES[0] == L:
                ax.set_ylabel("objective / drop per saddle")
    axes["5, 1"].legend(loc="upper right")
    text = (
        "Each step of a staircase is a saddle. Without displacements they get longer, with displacements they do not."
    )
    figure.suptitle(text, x=0.01, ha="left", weight="bold")
    save(figure, path)


def draw_times(rows: list[Row], path: Path) -> None:
    """Times against saddle number at the largest dimension, on two scales, with all seeds."""
    d = max(row["setting"]["d"] for row in rows)
    scales = ("linear", "log")
    figure, axes = panels([[f"{scale}, {L:g}" for L in CURVATURES] for scale in scales], (14, 7.2))
    for scale in scales:
        for L in CURVATURES:
            ax = axes[f"{scale}, {L:g}"]
            for name in METHODS:
                for seed, result in enumerate(where(rows, method=name, d=d, L=L)):
                    ax.plot(
                        range(1, result["left"] + 1),
                        result["times"],
                        MARKERS[name],
                        ls="-",
                        color=COLORS[name],
                        ms=4 if seed == 0 else 2,
                        lw=1.4 if seed == 0 else 0.6,
                        alpha=1 if seed == 0 else 0.45,
                        label=name if seed == 0 else None,
                    )
            ax.set(yscale=scale, title=f"L = {L:g}", xticks=range(0, d + 1, 5))
            if scale == "linear":
                ax.set_ylim(0, 1550)
            else:
                ax.set_xlabel("saddle")
                ax.set_ylim(5, 2000)
            if CURVATURES[0] == L:
                ax.set_ylabel(f"step at which it was left ({scale})")
    axes["linear, 1"].legend(fontsize=8.5, loc="upper right")
    text = f"d = {d}: the times lie on a straight line with displacements, on a geometric sequence without"
    figure.suptitle(text, x=0.01, ha="left", weight="bold")
    save(figure, path)


def draw_calls(rows: list[Row], path: Path) -> None:
    """Objective against oracle calls of all methods, d = 10, smallest and largest curvature, seed 0."""
    d = 10 if where(rows, d=10) else max(row["setting"]["d"] for row in rows)
    figure, axes = panels([["1", "3"]], (12, 4.4))
    for key, ax in axes.items():
        for name in METHODS:
            for result in where(rows, method=name, d=d, L=float(key), seed=0):
                calls = [t * result["calls"] / result["steps"] for t in result["curve"][0]]
                ax.plot(calls, result["curve"][1], color=COLORS[name], lw=1.8, label=name)
        ax.set(title=f"L = {key}", xlabel="oracle calls (gradients and products)", xlim=(0, 28_000))
        ax.axhline(-d, color=GREY, lw=1, ls=":")
    axes["1"].set_ylabel("objective / drop per saddle")
    axes["1"].legend()
    figure.suptitle(
        f"d = {d}, seed 0: the minimax twin needs half the calls of a step", x=0.01, ha="left", weight="bold"
    )
    save(figure, path)
