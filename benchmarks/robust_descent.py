"""One run of robust matrix sensing: the methods, and what is worth knowing of a run.

Calls are gradients of f on one sample, f_x and f_y together counted once, and products with its second derivatives;
the n of y*(U_0), which every run starts from, are included. ``PRGDA`` has the parameters of the paper by default.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import torchbilevel as tb
from benchmarks.experiments.study import rounded, thin
from benchmarks.robust_sensing import RobustSensing
from torchbilevel.draws import BatchSizes

BATCH, LOWER_LR, PERIOD, K = 40, 0.01, 25, 5  # S_2, lambda, q, K of the paper, for all stochastic methods
GRAD_TOL, CURVATURE_TOL = 0.1, 0.05  # of the certificates; the saddles of the scaled data have -0.1 to -0.4
BASELINES = ("SGDA", "AccMDA", "SREDA")
DETERMINISTIC = ("PerturbedGDmax", "CubicGDA", "MCN")
OURS = "SGDA, perturbed Adam"
METHODS = ("PRGDA", *BASELINES, OURS)


def prgda(data: RobustSensing, seed: int, **options: Any) -> tb.Method:
    """PRGDA with the parameters of the paper, epsilon = 0.1 and S_1 = n, which it does not give."""
    lower = tb.GD(lr=options.pop("lower_lr", LOWER_LR), steps=options.pop("K", K))
    options.setdefault("anchor_size", data.rows)
    printed = {"lr": 1e-3, "escape_lr": 0.1, "radius": 0.01, "mean_movement": 0.01, "escape_steps": 20}
    printed |= {"grad_tol": GRAD_TOL, "period": PERIOD, "batch_size": BATCH}
    return tb.PRGDA(data.problem(), **{**printed, **options}, lower_solver=lower, seed=seed)


def sgda(data: RobustSensing, seed: int, lr: float, batch_size: int = BATCH) -> tb.Method:
    """SGDA."""
    lower = tb.GD(lr=LOWER_LR, steps=1)
    return tb.SGDA(data.problem(), lr, lower_solver=lower, batch_size=batch_size, seed=seed)


def acc_mda(data: RobustSensing, seed: int, lr: float, batch_size: int = BATCH) -> tb.Method:
    """Acc-MDA, with step sizes that have halved after 7000 steps."""
    lower, decay = tb.GD(lr=LOWER_LR, steps=1), tb.Decay(offset=1000)
    options: dict[str, Any] = {"weight": 0.1, "decay": decay, "batch_size": batch_size}
    return tb.AccMDA(data.problem(), lr, lower_solver=lower, **options, seed=seed)


def sreda(data: RobustSensing, seed: int, lr: float, batch_size: int = BATCH) -> tb.Method:
    """SREDA, with steps of the length lr."""
    options: dict[str, Any] = {"period": PERIOD, "batch_size": batch_size, "anchor_size": data.rows}
    return tb.SREDA(data.problem(), lr, lower_solver=tb.GD(lr=LOWER_LR, steps=K), **options, seed=seed)


def perturbed_adam(
    data: RobustSensing,
    seed: int,
    lr: float = 0.02,
    lower_lr: float = LOWER_LR,
    batch_size: int | None = None,
    radius: float = 0.01,
    grad_tol: float = 0.2,
) -> tb.Method:
    """The pair of SGDA's estimate, on n / 20 samples, with Adam, displaced where the estimate is small."""
    problem = data.problem()
    adam = torch.optim.Adam(problem.upper_parameters, lr=lr)
    rule = tb.optim.Perturbed(adam, radius=radius, grad_tol=grad_tol, escape_steps=20, seed=seed)
    sizes = BatchSizes(batch_size or data.rows // 20)
    recursion = tb.Plain(simultaneous=True)
    return tb.Method(
        problem, tb.Danskin(tb.GD(lr=lower_lr, steps=1), recursion=recursion, batch_sizes=sizes, seed=seed), rule
    )


def full_batch(data: RobustSensing, seed: int, optimizer: str, lr: float) -> tb.Method:
    """One gradient on all samples per step: y goes to y*(U_t), U by the gradient at y*(U_{t-1})."""
    problem = data.problem()
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    inner = getattr(torch.optim, optimizer)(problem.upper_parameters, lr=lr, **options)
    rule = tb.optim.Perturbed(inner, radius=0.01, grad_tol=0.02, escape_steps=50, seed=seed)
    lower = tb.GD(lr=1 / data.concavity, steps=1)
    return tb.Method(problem, tb.Danskin(lower, recursion=tb.Plain(simultaneous=True), seed=seed), rule)


def perturbed_gdmax(data: RobustSensing, seed: int) -> tb.Method:
    """With the test of the loss, which takes a second gradient for y; one ascent step of length 1/c is exact."""
    return tb.PerturbedGDmax(
        data.problem(),
        lr=0.3,
        radius=0.01,
        grad_tol=0.02,
        lower_solver=tb.GD(lr=1 / data.concavity, steps=1, tol=1e-9),
        escape_steps=60,
        value_test=True,
        value_tol=1e-5,
        seed=seed,
    )


def cubic(data: RobustSensing, seed: int, name: str) -> tb.Method:
    """Cubic-GDA or MCN; y as for ``perturbed_gdmax``."""
    options: dict[str, Any] = {"cubic": 10.0, "grad_tol": 0.02, "curvature_tol": CURVATURE_TOL}
    lower = tb.GD(lr=1 / data.concavity, steps=1)
    method: tb.Method = getattr(tb, name)(data.problem(), **options, lower_solver=lower, seed=seed)
    return method


BUILD: dict[str, Callable[..., tb.Method]] = {
    "PRGDA": prgda,
    "SGDA": sgda,
    "AccMDA": acc_mda,
    "SREDA": sreda,
    OURS: perturbed_adam,
    "full batch": full_batch,
    "PerturbedGDmax": perturbed_gdmax,
    "CubicGDA": lambda data, seed: cubic(data, seed, "CubicGDA"),
    "MCN": lambda data, seed: cubic(data, seed, "MCN"),
}


def calls(method: tb.Method, data: RobustSensing) -> int:
    """Oracle calls so far, in samples."""
    return data.rows + method.estimator.counts.samples


@dataclass
class Track:
    """What is looked at along a run, off-line.

    Attributes:
        targets: ratios.
        curve: calls, Phi and ratio, about ten per cent of the calls apart.
        reached: by target, the calls at the first of two looks in a row at which the ratio was at most that.
        claims: points that passed the method's own test.
    """

    targets: tuple[float, ...]
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    reached: dict[float, int] = field(default_factory=dict)
    claims: list[Tensor] = field(default_factory=list)
    _seen: dict[float, int] = field(default_factory=dict)
    _next: float = 0.0

    def look(self, data: RobustSensing, U: Tensor, spent: int) -> float:
        """Note where the run is."""
        ratio = data.ratio(U)
        for target in self.targets:
            if ratio > target:
                self._seen.pop(target, None)
            elif target in self._seen:
                self.reached.setdefault(target, self._seen[target])
            else:
                self._seen[target] = spent
        if spent >= self._next:
            self.curve.append((spent, data.phi(U), ratio))
            self._next = max(spent + data.rows, 1.1 * spent)
        return ratio


def descend(
    method: tb.Method, data: RobustSensing, seed: int, budget: float, target: float | None = None
) -> dict[str, Any]:
    """Run until the calls are used up or a ratio has been reached.

    Cubic steps need a Hessian of Phi: where a bound of y* is about to change sides, so that the package refuses one,
    U is moved by 1e-3 of its length, which leaves columns that are zero as they are.

    Args:
        method: on the problem of the data.
        data: of the seed.
        seed: of the samples.
        budget: calls.
        target: the ratio at which to stop.

    Returns:
        The numbers to keep, as JSON has them.
    """
    U = method.problem.x[0].detach()
    batch: Any = data.batch() if method.estimator.batch_sizes is None else data.source(seed)
    track, diverged, seen, claimed, nudges = Track((1e-1, 1e-2, 1e-3)), False, 0, 0, 0
    upcoming = 0.0
    while not diverged:
        spent = calls(method, data)
        if spent >= upcoming:
            ratio = track.look(data, U, spent)
            diverged = not ratio < 1e3
            upcoming = spent + data.rows
            if target in track.reached:
                break
        if spent >= budget or nudges > 50:
            break
        try:
            method.zero_grad()
            method.backward(batch)
            method.step()
        except FloatingPointError:
            diverged = True
        except ValueError as error:
            if "strict complementarity" not in str(error):
                raise
            nudges += 1
            U *= 1 + 1e-3
        for event in method.events[seen:]:
            if event.kind == "escape test passed":
                claimed += 1
                track.claims.append(method.result().x[0].clone())
        seen = len(method.events)
    return summary(method, data, track, claimed, diverged) | {"nudges": nudges}


def summary(method: tb.Method, data: RobustSensing, track: Track, claimed: int, diverged: bool) -> dict[str, Any]:
    """The numbers to keep, as JSON has them; what is false about claims is looked at for 20 of them."""
    U = method.problem.x[0].detach()
    kinds = [event.kind for event in method.events]
    result: dict[str, Any] = {
        "diverged": diverged,
        "calls": calls(method, data),
        "steps": method.steps,
        "reached": {f"{target:g}": track.reached.get(target) for target in track.targets},
        "displacements": kinds.count("perturbation"),
        "escaped": kinds.count("escaped"),
        "claims": claimed,
    }
    if not diverged:
        examined = [examine(data, x) for x in thin(track.claims, 20)]
        track.curve.append((result["calls"], data.phi(U), data.ratio(U)))
        result |= examine(data, U) | {
            "phi": data.phi(U),
            "ratio": data.ratio(U),
            "degenerate": data.degenerate(U),
            "beyond": float(U[:, 1:].abs().max()),
            "examined": len(examined),
            "saddles": sum(e["lambda_min"] < -CURVATURE_TOL for e in examined),
            "steep": sum(e["grad"] > GRAD_TOL for e in examined),
            "first_claim": examined[0]["lambda_min"] if examined else None,
        }
    sound = [point for point in track.curve if all(math.isfinite(v) for v in point)]
    result["curve"] = [list(column) for column in zip(*thin(sound, 80), strict=True)]
    return rounded(result)  # type: ignore[no-any-return]


def examine(data: RobustSensing, U: Tensor) -> dict[str, float]:
    """|grad Phi| and the smallest eigenvalue of hess Phi."""
    return {"grad": float(data.gradient(U).norm()), "lambda_min": data.smallest_eigenvalue(U)}
