"""Every rule and every method, each with a small problem: what the tests of this folder run over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchbilevel as tb
from tests.problems import Split, flat, generator, quadratic_bilevel, quadratic_minimax
from torchbilevel import methods, optim

# Names of `optim.__all__` that are no optimizers.
OTHERS = {"Event": "a record", "Result": "a record", "Rule": "the base class"}


def well(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    """A saddle with minima on both sides; the rows of the batch tilt it."""
    x = flat(model.parameters())
    return 0.5 * x[0] ** 2 + x[1] ** 2 - x[2] ** 2 + 0.25 * x[2] ** 4 + batch[0].mean(0) @ x


def mapping(upper: Split, batch: tuple[Tensor]) -> Tensor:
    """A map for `NonconvexLinearProblem`, with values in R^4."""
    x = upper.flat()
    return 0.5 * x.square() + batch[0].mean(0)[:4] - x.flip(0).sin()


@dataclass
class Run:
    """One optimizer at work on losses of its own.

    Attributes:
        optimizer: a rule or a method.
        upper: module whose parameters it moves.
        data: batches and sources by name.
        lower: module whose parameters it moves besides.
    """

    optimizer: Any
    upper: nn.Module
    data: dict[str, Any]
    lower: nn.Module | None = None

    @property
    def params(self) -> list[Tensor]:
        return [p for p in self.upper.parameters() if p.requires_grad]

    @property
    def points(self) -> list[Tensor]:
        """Copies of x and y."""
        modules = [m for m in (self.upper, self.lower) if m is not None]
        return [p.detach().clone() for m in modules for p in m.parameters()]

    def gradients(self) -> Tensor:
        """What stands before `step`: on a method `backward`, on a rule torch's own."""
        self.optimizer.zero_grad()
        if self.lower is not None:
            return self.optimizer.backward(**self.data)
        loss = well(self.upper, self.draw())
        loss.backward()
        return loss

    def draw(self) -> Any:
        return self.data["batch"](getattr(self.optimizer, "next_batch_size", 4))

    def closure(self) -> Any:
        """torch's closure; on one batch, as trial points need."""
        if self.lower is not None:
            return self.gradients
        batch = self.draw()

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = well(self.upper, batch)
            loss.backward()
            return loss

        return closure

    def advance(self, steps: int = 1) -> list[float]:
        """Go on as a user does: a rule with a closure, a method by `backward` and `step`. Returns the losses."""
        losses = []
        for _ in range(steps):
            if self.lower is None:
                losses.append(self.optimizer.step(self.closure()).item())
            else:
                losses.append(self.gradients().item())
                self.optimizer.step()
        return losses

    def split(self, **options: Any) -> None:
        """Give all parameters but the first a group of their own."""
        params = self.optimizer.param_groups[0]["params"]
        rest = params[1:]
        del params[1:]
        self.optimizer.add_param_group({"params": rest, **options})

    def saved(self) -> dict[str, Any]:
        """What a user saves."""
        sources = {name: source.state_dict() for name, source in self.data.items()}
        return {"optimizer": self.optimizer.state_dict(), "upper": self.upper.state_dict(), "sources": sources}

    def load(self, saved: Mapping[str, Any]) -> None:
        self.upper.load_state_dict(saved["upper"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for name, state in saved["sources"].items():
            self.data[name].load_state_dict(state)

    def standing(self) -> Any:
        """Everything that decides how the run goes on, in comparable form; not the oracle counts, nor gradients."""
        state = plain(self.optimizer.state_dict())
        if self.lower is not None:
            del state["method"]["estimator"]["counts"]
        return state, plain(self.points), self.optimizer.events, plain(self.optimizer.result().x)


def plain(tree: Any) -> Any:
    """Nested containers with tensors as lists, so that == compares everything; a nan would differ from itself."""
    if isinstance(tree, Tensor):
        return str(tree.dtype), tree.tolist()
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return [plain(value) for value in tree] if isinstance(tree, list | tuple) else tree


@dataclass(frozen=True)
class Entry:
    """One optimizer of the package.

    Attributes:
        kind: its class.
        options: arguments of the constructor, by name.
        problem: what a method works on: "bilevel", "minimax" or "linear"; "" for rules.
        inner: torch optimizer inside of `Perturbed`, and its options.
        cannot: subjects that do not apply, with the reason.
    """

    kind: type
    options: dict[str, Any]
    problem: str = ""
    inner: tuple[type, dict[str, Any]] | None = None
    cannot: dict[str, str] = field(default_factory=dict)

    @property
    def descent(self) -> dict[str, Any]:
        """Options with which no escape ever begins."""
        return {name: value for name, value in {"grad_tol": 0.0, "curvature_tol": 0.1}.items() if name in self.options}

    def build(self, over: Any, **changes: Any) -> Any:
        """The optimizer over parameters, or a method on a problem."""
        options = {**self.options, **changes}
        if self.inner is not None:
            kind, given = self.inner
            own = {name: options.pop(name) for name in ("lr", "maximize") if name in options}
            over = kind(over, **{**given, **own})
        return self.kind(over, **options)

    def run(self, dtype: torch.dtype = torch.float64, over: Any = None, frozen: int = 0, **changes: Any) -> Run:
        """A run at its beginning, always the same one.

        Args:
            dtype: of parameters and data.
            over: on rules: function from the parameters of the module to what the constructor is given.
            frozen: this many first parameters of x do not ask for gradients.
            **changes: of the constructor's arguments.
        """
        normal = generator(7)
        if not self.problem:
            model = Split(torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64), ((2,), ())).to(dtype)
            rows = normal(8, 3)
            source = tb.sample(((0.02 * (rows - rows.mean(0))).to(dtype),), seed=3)
            freeze(model, frozen)
            given = list(model.parameters())[frozen:] if over is None else over(model)
            return Run(self.build(given, **changes), model, {"batch": source})
        problem, batches = problem_of(self.problem, dtype, frozen)
        data = {name: tb.sample(batch, seed=3) for name, batch in batches.items()}
        return Run(self.build(problem, **changes), problem.upper, data, problem.lower)


def freeze(module: nn.Module, n: int) -> None:
    for p in list(module.parameters())[:n]:
        p.requires_grad_(False)


def problem_of(name: str, dtype: torch.dtype, frozen: int) -> tuple[Any, dict[str, Any]]:
    """A problem with importable losses, and its data."""
    if name == "bilevel":
        q = quadratic_bilevel(curved=True)
        upper, lower = (module.to(dtype) for module in q.modules())
        freeze(upper, frozen)
        problem: Any = tb.BilevelProblem(upper, lower, upper_loss=q.upper_loss, lower_loss=q.lower_loss)
        batches: dict[str, Any] = {"lower": q.lower_batch, "upper": q.upper_batch}
    elif name == "minimax":
        m = quadratic_minimax()
        upper, lower = (module.to(dtype) for module in m.modules())
        freeze(upper, frozen)
        problem, batches = tb.MinimaxProblem(upper, lower, loss=m.loss), {"batch": m.batch}
    else:
        m = quadratic_minimax()
        upper, center = m.modules()[0].to(dtype), torch.zeros(4, dtype=dtype)
        freeze(upper, frozen)
        problem, batches = tb.NonconvexLinearProblem(upper, mapping, center=center), {"batch": m.batch}
    return problem, {side: tuple(t.to(dtype) for t in batch) for side, batch in batches.items()}


# What does not apply, and why.
_DOWN = "the escape test is for minima: give it the negative of the loss"
_MIN = "a method minimises over x: give it a problem of the negative"
_LEAVES = "it leaves points where the gradient is zero"
_AGAIN = "it takes gradients itself, after whatever was done to .grad"
_DERIVES = "H has no derivatives by y"
_SAMPLES = "it compares gradients of one batch at two points, in a closure of which .grad is made anew"
_INNER = "torch fills in the state that is there already, and that of the optimizer inside begins empty, as torch's own"
INNER = {"zero gradient": _LEAVES, "distributed checkpoint": _INNER}
MINIMA, LEAVES, AGAIN = {"maximize": _DOWN}, {"zero gradient": _LEAVES}, {"clip": _AGAIN}
SAMPLES = {"clip": _SAMPLES}


def _method(kind: type, problem: str, options: dict[str, Any], **cannot: str) -> Entry:
    return Entry(kind, options, problem, cannot={"maximize": _MIN, **cannot})


def over(entries: Mapping[str, Entry], subject: str = "") -> pytest.MarkDecorator:
    """Run a test over the entries to which its subject applies."""
    chosen = {name: entry for name, entry in entries.items() if subject not in entry.cannot}
    return pytest.mark.parametrize("entry", chosen.values(), ids=chosen.keys())


# grad_tol = 9 makes every rule escape from the first step on.
NOISE: dict[str, Any] = {"radius": 0.05, "grad_tol": 9.0, "escape_steps": 4}
SEARCH: dict[str, Any] = {"grad_tol": 9.0, "curvature_tol": 0.1, "step_length": 0.1}
PROBES: dict[str, Any] = {**SEARCH, "radius": 1e-2, "probe_lr": 0.2, "search_steps": 3}
CUBIC: dict[str, Any] = {"cubic": 100.0, "grad_tol": 9.0, "curvature_tol": 31.0}
PULLBACK: dict[str, Any] = {**NOISE, "escape_lr": 0.1, "mean_movement": 1e-3}
ROWS: dict[str, Any] = {"anchor_size": None, "batch_size": 4}
LOWER: dict[str, Any] = {"lower_solver": tb.GD(0.4, 3, momentum=0.5)}
TWO: dict[str, Any] = {"lower_solver": tb.GD(0.4, 2)}
ONE: dict[str, Any] = {"lower_solver": tb.GD(0.4, 1)}
NEUMANN: dict[str, Any] = {"linear_solver": tb.Neumann(2, 0.3)}
UPPER: dict[str, Any] = {"batch_size": 4}
BOTH: dict[str, Any] = {**UPPER, "lower_batch_size": 4}
ALL: dict[str, Any] = {**BOTH, "jvp_batch_size": 3, "hvp_batch_size": 5}

RULES: dict[str, Entry] = {
    "PerturbedGD": Entry(optim.PerturbedGD, {"lr": 0.1, **NOISE}, cannot=LEAVES),
    "PerturbedGD, value test": Entry(
        optim.PerturbedGD, {"lr": 0.1, **NOISE, "value_test": True, "value_tol": 1e-3}, cannot=LEAVES
    ),
    "Perturbed(SGD)": Entry(
        optim.Perturbed, {"lr": 0.1, **NOISE}, inner=(torch.optim.SGD, {"momentum": 0.5}), cannot=INNER
    ),
    "Perturbed(Adam)": Entry(
        optim.Perturbed, {"lr": 0.1, **NOISE}, inner=(torch.optim.Adam, {"amsgrad": True}), cannot=INNER
    ),
    "NormalizedGD": Entry(optim.NormalizedGD, {"lr": 0.1}, cannot=MINIMA),
    "AveragedGD": Entry(optim.AveragedGD, {"lr": 0.1, "weight": 0.5}, cannot=MINIMA),
    "Pullback": Entry(optim.Pullback, {"lr": 0.1, **PULLBACK}, cannot=MINIMA),
    "NEON": Entry(optim.NEON, {"lr": 0.1, **PROBES}, cannot={**MINIMA, **LEAVES, **AGAIN}),
    "NEON2": Entry(optim.NEON2, {"lr": 0.1, **PROBES}, cannot={**MINIMA, **LEAVES, **AGAIN}),
    "NegativeCurvature": Entry(optim.NegativeCurvature, {"lr": 0.1, **SEARCH}, cannot={**MINIMA, **LEAVES, **AGAIN}),
    "CubicNewton": Entry(optim.CubicNewton, {"lr": 0.5, **CUBIC}, cannot={**MINIMA, **LEAVES, **AGAIN}),
    "PGD": Entry(methods.PGD, {"lr": 0.1, **NOISE}, cannot={**MINIMA, **LEAVES}),
    "SSRGD": Entry(
        methods.SSRGD,
        {"lr": 0.1, **NOISE, **ROWS, "period": 3, "max_movement": 0.2},
        cannot={**MINIMA, **LEAVES, **SAMPLES},
    ),
    "PullbackSPIDER": Entry(
        methods.PullbackSPIDER, {"lr": 0.1, **PULLBACK, **ROWS, "period": 3}, cannot={**MINIMA, **SAMPLES}
    ),
    "PullbackSTORM": Entry(
        methods.PullbackSTORM, {"lr": 0.1, **PULLBACK, **ROWS, "weight": 0.3}, cannot={**MINIMA, **SAMPLES}
    ),
}
METHODS: dict[str, Entry] = {
    "AIDBiO": _method(methods.AIDBiO, "bilevel", {"lr": 0.02, **LOWER, "linear_solver": tb.CG(2)}),
    "ITDBiO": _method(methods.ITDBiO, "bilevel", {"lr": 0.02, **LOWER}),
    "StocBiO": _method(methods.StocBiO, "bilevel", {"lr": 0.02, **LOWER, **NEUMANN, **ALL}),
    "BSA": _method(methods.BSA, "bilevel", {"lr": 0.02, **LOWER, **NEUMANN, **ALL}),
    "TTSA": _method(methods.TTSA, "bilevel", {"lr": 0.02, **ONE, **NEUMANN, **ALL}),
    "AmIGO": _method(methods.AmIGO, "bilevel", {"lr": 0.02, **LOWER, "linear_solver": tb.SGDSolve(3, 0.3), **ALL}),
    "MRBO": _method(methods.MRBO, "bilevel", {"lr": 0.02, "weight": 0.3, **ONE, **NEUMANN, **ALL}),
    "SUSTAIN": _method(methods.SUSTAIN, "bilevel", {"lr": 0.02, "weight": 0.3, **ONE, **NEUMANN, **ALL}),
    "VRBO": _method(methods.VRBO, "bilevel", {"lr": 0.02, "period": 3, **TWO, **NEUMANN, **ALL}),
    "SOBA": _method(methods.SOBA, "bilevel", {"lr": 0.02, **ONE, **BOTH}),
    "SABA": _method(methods.SABA, "bilevel", {"lr": 0.02, **ONE, **BOTH}),
    "STABLE": _method(methods.STABLE, "bilevel", {"lr": 0.02, "weight": 0.3, "min_curvature": 0.1, **ONE, **BOTH}),
    "RSVRB": _method(methods.RSVRB, "bilevel", {"lr": 0.02, "weight": 0.3, "min_curvature": 0.1, **ONE, **ALL}),
    "F2SA": _method(methods.F2SA, "bilevel", {"lr": 0.02, "multiplier": 3.0, "lower_solver": tb.GD(0.2, 3), **BOTH}),
    "PerturbedAID": _method(methods.PerturbedAID, "bilevel", {"lr": 0.02, **LOWER, **NOISE}),
    "StocBiOiNEON": _method(
        methods.StocBiOiNEON, "bilevel", {"lr": 0.02, **LOWER, **NEUMANN, **PROBES, **ALL}, **AGAIN
    ),
    "PRGDA": _method(
        methods.PRGDA,
        "bilevel",
        {"lr": 0.02, **PULLBACK, **LOWER, **NEUMANN, **ALL, "period": 3, "anchor_size": 8, "lower_anchor_size": 8},
    ),
    "PRGDA, minimax": _method(
        methods.PRGDA, "minimax", {"lr": 0.02, **PULLBACK, **LOWER, **UPPER, "period": 3, "anchor_size": 8}
    ),
    "GDmax": _method(methods.GDmax, "minimax", {"lr": 0.02, **LOWER}),
    "SGDmax": _method(methods.SGDmax, "minimax", {"lr": 0.02, **LOWER, **BOTH}),
    "SGDA": _method(methods.SGDA, "minimax", {"lr": 0.02, **ONE, **UPPER}),
    "SREDA": _method(methods.SREDA, "minimax", {"lr": 0.02, "period": 3, **LOWER, **UPPER, "anchor_size": 8}),
    "AccMDA": _method(methods.AccMDA, "minimax", {"lr": 0.02, "weight": 0.3, **ONE, **UPPER}),
    "HybridGDA": _method(methods.HybridGDA, "minimax", {"lr": 0.02, "weight": 0.3, **ONE, **UPPER}),
    "HybridVRSGD": _method(methods.HybridVRSGD, "linear", {"lr": 0.02, "weight": 0.3, **UPPER}, sparse=_DERIVES),
    "PerturbedGDmax": _method(methods.PerturbedGDmax, "minimax", {"lr": 0.02, **LOWER, **NOISE}),
    "CubicGDA": _method(methods.CubicGDA, "minimax", {**CUBIC, **LOWER}, **AGAIN),
    "MCN": _method(methods.MCN, "minimax", {**CUBIC, **LOWER}, **AGAIN),
    # Where |v| < lipschitz^2 / cubic, its descent on the model takes thousands of products.
    "IMCN": _method(
        methods.IMCN,
        "minimax",
        {"cubic": 1e3, "grad_tol": 1e-3, "curvature_tol": 1.0, "lipschitz": 4.0, **LOWER},
        **AGAIN,
    ),
}
ENTRIES = {**RULES, **METHODS}
