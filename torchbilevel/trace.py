"""What happened in a run: numbers of every step, to look at, to save, to draw."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor

from torchbilevel.method import Method
from torchbilevel.tensors import norm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row: TypeAlias = dict[str, Any]  # numbers; phase: a string; events: a list of [kind, value]

_PENDING = 256  # rows that may wait on the device before they are read
_TEXT = ("phase", "events")


class Writer(Protocol):
    """What ``torch.utils.tensorboard.SummaryWriter`` and its like have."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Take one number of one step."""


class Trace:
    """A record of a run: one row per step, of any method or torch optimizer, in any loop.

    Call ``record`` after ``step`` and before the next ``zero_grad``. The row is then that of the step just made: the
    loss and the gradient it started from, how y and z came about, what the rule did with them. Between ``backward`` and
    ``step`` works too; ``step``, ``phase`` and ``events`` are then those of the step before.

    Columns, each where there is such a thing:

    * ``step``: steps done.
    * ``loss``: as given; what ``backward`` returned is f(x, y).
    * ``gradient_norm``: |v| over all parameters, before any projection. A rule that evaluates trial points of a plain
      loss leaves the gradient of the last one behind; under a ``Method`` it is that of x all the same.
    * ``phase``: what the rule is doing now, ``"descent"`` or ``"escape"``; ``events``: what it did in this step, as a
      list of ``[kind, value]``, the value being that of ``optim.base.Event``.
    * ``linear_residual``: |f_y - g_yy z| / |f_y|, with ``linear_iterations``; ``lower_residual``: |g_y|, where the
      lower solver has a ``tol``, with ``lower_steps``; of a ``TaskBatch`` the largest over its tasks.
    * the oracle counts so far by their names in ``method.estimator.counts``, and ``oracle_calls``: all calls together.
    * any numbers of your own: ``record(method, loss, accuracy=accuracy)``.

    Cost: nothing is computed but the gradient's norm, and the device is waited for once in 256 rows, or when rows are
    read; with a writer at every row, since it asks for numbers.

    Example:
        >>> x = torch.zeros(2, requires_grad=True)  # exactly at the saddle of x1^2 - x2^2 + x2^4 / 4
        >>> from torchbilevel.optim import PerturbedGD
        >>> optimizer, trace = PerturbedGD([x], lr=0.1, radius=1e-2, grad_tol=1e-3), Trace()
        >>> for _ in range(50):
        ...     optimizer.zero_grad()
        ...     loss = x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4
        ...     loss.backward()
        ...     optimizer.step()
        ...     trace.record(optimizer, loss)
        >>> trace
        Trace(50 rows, last: step 50, loss -1, gradient_norm 0.0011, phase escape)
        >>> [(row["step"], row["events"]) for row in trace.rows if row["events"]]
        [(1, [['perturbation', 0.0]])]
    """

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._waiting: list[dict[str, Any]] = []  # rows whose numbers may still be on the device
        self._seen: int | None = None  # events of the optimizer that are in rows already

    def record(
        self, optimizer: torch.optim.Optimizer, loss: Tensor | float, *, writer: Writer | None = None, **own: Any
    ) -> None:
        """Add a row.

        Args:
            optimizer: a ``Method``, a rule of ``torchbilevel.optim`` or any torch optimizer.
            loss: one number, such as ``backward`` returned; a graph that hangs on it is not kept.
            writer: takes the row too, by ``add_scalar``: a TensorBoard ``SummaryWriter`` or what looks like one.
            **own: further numbers by name.

        Raises:
            TypeError: if ``optimizer`` is none.
            ValueError: if the loss or a number of your own is not one number, or its name is taken.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a Method or a torch optimizer, got {type(optimizer).__name__}")
        row: dict[str, Any] = {"step": self._step(optimizer), "loss": _number("loss", loss)}
        gradient = _gradient(optimizer)
        row["gradient_norm"] = norm(gradient) if gradient else None
        row["phase"], row["events"] = getattr(optimizer, "phase", "descent"), self._news(optimizer, row["step"])
        if isinstance(optimizer, Method):
            row.update(_estimate(optimizer))
        for name, value in own.items():
            if name in row:
                raise ValueError(f"{name} is a column of its own already: give yours another name")
            row[name] = _number(name, value)
        self._waiting.append(row)
        if len(self._waiting) >= _PENDING or writer is not None:
            self._read()
        if writer is not None:
            _write(writer, self._rows[-1])

    def log(self, writer: Writer) -> None:
        """Hand all rows to a writer, by ``add_scalar``; events as numbers under ``events/<kind>``.

        Args:
            writer: a TensorBoard ``SummaryWriter`` or what looks like one.
        """
        for row in self.rows:
            _write(writer, row)

    @property
    def rows(self) -> list[Row]:
        """All rows, as dicts of numbers and strings."""
        self._read()
        return self._rows

    def to_dict(self) -> dict[str, list[Any]]:
        """All columns by name, ``None`` where a row has none: ``pandas.DataFrame(trace.to_dict())``."""
        rows = self.rows
        return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}

    def __len__(self) -> int:
        return len(self._rows) + len(self._waiting)

    def __repr__(self) -> str:
        if not len(self):
            return "Trace(0 rows)"
        last, names = self.rows[-1], ("step", "loss", "gradient_norm", "phase", "oracle_calls")
        shown = (f"{name} {_brief(last[name])}" for name in names if last.get(name) is not None)
        return f"Trace({len(self)} rows, last: {', '.join(shown)})"

    # --- files and checkpoints ---------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write all rows to a file; every number reads back as it was.

        Args:
            path: ends in ``.csv`` (a line per row) or ``.json`` (a list per column); anything else is refused.
        """
        path, columns = _known(path), self.to_dict()
        with path.open("w", newline="") as file:
            if path.suffix == ".json":
                json.dump(columns, file)
                return
            lines = csv.writer(file, lineterminator="\n")
            lines.writerow(columns)
            lines.writerows([_text(cell) for cell in row] for row in zip(*columns.values(), strict=True))

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read what ``save`` wrote.

        Args:
            path: ends in ``.csv`` or ``.json``.

        Returns:
            A trace of the same rows.
        """
        path, trace = _known(path), cls()
        with path.open(newline="") as file:
            if path.suffix == ".json":
                columns = json.load(file)
                table = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            else:
                table = [{name: _cell(name, text) for name, text in row.items()} for row in csv.DictReader(file)]
        trace._rows = [_without_none(row) for row in table]
        return trace

    def state_dict(self) -> dict[str, Any]:
        """All rows, as plain containers of numbers and strings: save it beside that of the method."""
        return {"rows": tuple(dict(row) for row in self.rows), "seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the trace of a resumed run.

        Args:
            state: what ``state_dict`` returned.
        """
        self._rows, self._waiting, self._seen = [dict(row) for row in state["rows"]], [], state["seen"]

    # --- a picture ---------------------------------------------------------------------------------------------------

    def plot(self, path: str | Path | None = None, x: str = "step") -> Figure:
        """Draw loss and gradient norm along the run, with the events marked and the escape phases shaded.

        Args:
            path: where to save the picture, by suffix; ``None`` leaves that to you (``plt.show()``, or a notebook).
            x: ``"step"``, ``"oracle calls"``, or any other column that grows.

        Returns:
            The figure.

        Raises:
            ImportError: if matplotlib is not installed.
            ValueError: if there is no such column, or no row.
        """
        try:
            from matplotlib import pyplot
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("trace.plot needs matplotlib: pip install 'torchbilevel[examples]'") from error
        rows, name = self.rows, x.replace(" ", "_")
        if not rows or any(name not in row for row in rows):
            have = ", ".join(name for name in self.to_dict() if name not in _TEXT) or "no row yet"
            raise ValueError(f"x must be a column that every row has, got {x!r}; there is {have}")
        # A figure that goes to a file needs no window, and pyplot would keep it.
        size = {"figsize": (8.0, 5.5), "layout": "constrained"}
        figure = pyplot.figure(**size) if path is None else Figure(**size)  # type: ignore[arg-type]
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        at = [row[name] for row in rows]
        top.plot(at, [row["loss"] for row in rows], color="tab:blue", lw=1.5)
        # A gradient that is exactly zero has no place on the logarithmic axis.
        bottom.semilogy(at, [row.get("gradient_norm") or float("nan") for row in rows], color="tab:blue", lw=1.0)
        kinds = list(dict.fromkeys(event[0] for row in rows for event in row["events"]))
        for i, kind in enumerate(kinds):
            marked = [row for row in rows if any(event[0] == kind for event in row["events"])]
            spots, look = [row[name] for row in marked], {"ls": "", "marker": "ov^sD*PX"[i % 8], "color": f"C{i + 1}"}
            top.plot(spots, [row["loss"] for row in marked], label=f"{kind} ({len(marked)})", **look)
        for ax in (top, bottom):
            escaping = [row["phase"] == "escape" for row in rows]
            shade: dict[str, Any] = {
                "transform": ax.get_xaxis_transform(),
                "color": "tab:orange",
                "alpha": 0.15,
                "lw": 0,
            }
            ax.fill_between(at, 0, 1, where=escaping, label="escape phase" if any(escaping) else None, **shade)
        top.set_ylabel("loss")
        bottom.set(xlabel=name.replace("_", " "), ylabel="gradient norm")
        if kinds or any(escaping):
            top.legend()
        if path is not None:
            figure.savefig(path, dpi=130)
        return figure

    # --- inside ------------------------------------------------------------------------------------------------------

    def _step(self, optimizer: torch.optim.Optimizer) -> int:
        done = getattr(optimizer, "steps", None)
        if isinstance(done, int):
            return done
        earlier = self._waiting or self._rows
        return int(earlier[-1]["step"]) + 1 if earlier else 1

    def _news(self, optimizer: torch.optim.Optimizer, step: int) -> list[list[Any]]:
        events = getattr(optimizer, "events", [])
        if self._seen is None:  # a trace that begins in the middle of a run begins with the last step
            self._seen = sum(event.step < step - 1 for event in events)
        news = [[event.kind, float(event.value)] for event in events[self._seen :]]
        self._seen = len(events)
        return news

    def _read(self) -> None:
        for row in self._waiting:
            numbers = {k: _number(k, v.item()) if isinstance(v, Tensor) else v for k, v in row.items()}
            self._rows.append(_without_none(numbers))
        self._waiting = []


def _gradient(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The gradient of the step just made: a probing rule has left that of a trial point in ``.grad``."""
    if isinstance(optimizer, Method) and optimizer.estimator.keeps_past:
        return list(optimizer.estimator.past[2])
    gradients = (p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    return [g.coalesce().values() if g.is_sparse else g for g in gradients]


def _estimate(method: Method) -> dict[str, Any]:
    """What the estimator knows of its last ``backward``, and its oracle calls so far."""
    counts = method.estimator.counts.state_dict()
    calls = sum(n for name, n in counts.items() if not name.endswith("_samples"))
    found: dict[str, Any] = {}
    last = method.estimator.last
    if last is not None and last.solve is not None:
        tiny = torch.finfo(last.solve.scale.dtype).tiny
        found["linear_residual"] = (last.solve.residual / last.solve.scale.clamp_min(tiny)).max()
        found["linear_iterations"] = last.solve.iterations
    if last is not None:
        residual = last.lower.residual
        found["lower_residual"] = None if residual is None else residual.max()  # of the tasks of a TaskBatch
        found["lower_steps"] = last.lower.steps
    return {**found, **counts, "oracle_calls": calls}


def _number(name: str, value: Any) -> Any:
    """One number: a float or an int, or of a tensor a copy without its graph, which is read later."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.detach().clone()
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise ValueError(f"{name} must be one number, got {got}")


def _without_none(row: Row) -> Row:
    return {name: value for name, value in row.items() if value is not None}


def _write(writer: Writer, row: Row) -> None:
    step = row["step"]
    for name, value in row.items():
        if name != "step" and isinstance(value, int | float):
            writer.add_scalar(name, value, step)
    for kind, value in row["events"]:
        writer.add_scalar(f"events/{kind.replace(' ', '_')}", value, step)


def _brief(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _known(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix not in (".csv", ".json"):
        raise ValueError(f"path must end in .csv or .json, got {path}")
    return path


def _text(cell: Any) -> str:
    """A cell of a CSV file; events as ``kind value; kind value``."""
    if isinstance(cell, list):
        return "; ".join(f"{kind} {value!r}" for kind, value in cell)
    return "" if cell is None else str(cell)


def _cell(name: str, text: str) -> Any:
    """What ``_text`` was made from."""
    if name == "phase":
        return text
    if not text and name != "events":
        return None
    if name == "events":
        return [[kind, float(value)] for kind, value in (event.rsplit(" ", 1) for event in text.split("; ") if event)]
    try:
        return int(text)
    except ValueError:
        return float(text)
