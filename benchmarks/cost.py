"""Speed and memory: the package against hand-written loops, interleaved in one run.

    python -m benchmarks.cost [--smoke] [--device cpu|cuda] [--threads N] [--output DIR]

docs/cost.md says what the floor is, how time and memory are measured, and what came out.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad
from tqdm import tqdm

from torchbilevel import CG, GD, AIDBiO, BilevelProblem, Implicit, Neumann, Unrolled

SEED = 0
TIME_TARGETS = {10: 1.12, 50: 1.05}
MEMORY_TARGET = 1.10
UNROLLED_TARGET = 1.05
STEP_TARGET = 1.50
GROWTH_TARGET = 1024.0  # bytes a step: less than one page of tensors in a thousand steps would hide below it


@dataclass
class Case:
    """One problem twice: as the package sees it, and as two functions of lists of tensors that never heard of it."""

    name: str
    problem: BilevelProblem
    lower: tuple[Tensor, ...]
    upper: tuple[Tensor, ...]
    g: Callable[[list[Tensor], list[Tensor]], Tensor]
    f: Callable[[list[Tensor], list[Tensor]], Tensor]
    lr: float

    def point(self) -> tuple[list[Tensor], list[Tensor]]:
        """Fresh leaves at the current x and y."""
        return (
            [p.detach().requires_grad_() for p in self.problem.upper.parameters()],
            [p.detach().requires_grad_() for p in self.problem.lower.parameters()],
        )


class Vector(nn.Module):
    """x as one vector."""

    def __init__(self, size: int, value: float) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.full((size,), value))


def rows(n: int, shape: tuple[int, ...], classes: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, *shape, generator=generator)
    rule = torch.randn(inputs[0].numel(), classes, generator=torch.Generator().manual_seed(SEED))
    return inputs.to(device), (inputs.flatten(1) @ rule).argmax(1).to(device)


def logistic(name: str, n: int, features: int, device: str, classes: int = 10) -> Case:
    """Multinomial logistic regression; x: one log L2 strength per feature."""
    upper, lower = Vector(features, -3.0).to(device), nn.Linear(features, classes, bias=False).to(device)
    train, val = (rows(n, (features,), classes, SEED + i, device) for i in range(2))

    def lower_loss(upper: Vector, lower: nn.Linear, batch: Any) -> Tensor:
        return F.cross_entropy(lower(batch[0]), batch[1]) + (upper.x.exp() * lower.weight.square()).sum()

    def upper_loss(upper: Vector, lower: nn.Linear, batch: Any) -> Tensor:
        return F.cross_entropy(lower(batch[0]), batch[1])

    def g(x: list[Tensor], y: list[Tensor]) -> Tensor:
        return F.cross_entropy(F.linear(train[0], y[0]), train[1]) + (x[0].exp() * y[0].square()).sum()

    def f(x: list[Tensor], y: list[Tensor]) -> Tensor:
        return F.cross_entropy(F.linear(val[0], y[0]), val[1])

    return Case(name, BilevelProblem(upper, lower, upper_loss, lower_loss), train, val, g, f, 0.1)


def mlp(name: str, n: int, widths: tuple[int, ...], device: str) -> Case:
    """A tanh network whose training samples are weighted; x: one logit per sample."""
    layers: list[nn.Module] = []
    for a, b in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(a, b), nn.Tanh()]
    upper, lower = Vector(n, 0.0).to(device), nn.Sequential(*layers[:-1]).to(device)
    train, val = (rows(n, widths[:1], widths[-1], SEED + i, device) for i in range(2))

    def lower_loss(upper: Vector, lower: nn.Module, batch: Any) -> Tensor:
        losses = F.cross_entropy(lower(batch[0]), batch[1], reduction="none")
        ridge = sum(p.square().sum() for p in lower.parameters())
        return (upper.x.sigmoid() * losses).mean() + 0.5 * ridge

    def upper_loss(upper: Vector, lower: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(lower(batch[0]), batch[1])

    def network(y: list[Tensor], inputs: Tensor) -> Tensor:
        for i in range(0, len(y) - 2, 2):
            inputs = F.linear(inputs, y[i], y[i + 1]).tanh()
        return F.linear(inputs, y[-2], y[-1])

    def g(x: list[Tensor], y: list[Tensor]) -> Tensor:
        losses = F.cross_entropy(network(y, train[0]), train[1], reduction="none")
        return (x[0].sigmoid() * losses).mean() + 0.5 * sum(p.square().sum() for p in y)

    def f(x: list[Tensor], y: list[Tensor]) -> Tensor:
        return F.cross_entropy(network(y, val[0]), val[1])

    return Case(name, BilevelProblem(upper, lower, upper_loss, lower_loss), train, val, g, f, 0.1)


def convolutions(name: str, n: int, channels: tuple[int, ...], device: str, side: int = 32) -> Case:
    """Three convolutions, mean over the image, a linear head; x: one log L2 strength per tensor."""
    body: list[nn.Module] = []
    for i, (a, b) in enumerate(zip(channels[:-1], channels[1:], strict=True)):
        body += [nn.Conv2d(a, b, 3, stride=1 + (i > 0), padding=1), nn.ReLU()]
    lower = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 10)).to(device)
    upper = Vector(len(list(lower.parameters())), -0.5).to(device)
    train, val = (rows(n, (channels[0], side, side), 10, SEED + i, device) for i in range(2))

    def lower_loss(upper: Vector, lower: nn.Module, batch: Any) -> Tensor:
        ridge = sum(s * p.square().sum() for s, p in zip(upper.x.exp(), lower.parameters(), strict=True))
        return F.cross_entropy(lower(batch[0]), batch[1]) + ridge

    def upper_loss(upper: Vector, lower: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(lower(batch[0]), batch[1])

    def network(y: list[Tensor], images: Tensor) -> Tensor:
        for i in range(0, len(y) - 2, 2):
            images = F.conv2d(images, y[i], y[i + 1], stride=1 + (i > 0), padding=1).relu()
        return F.linear(F.adaptive_avg_pool2d(images, 1).flatten(1), y[-2], y[-1])

    def g(x: list[Tensor], y: list[Tensor]) -> Tensor:
        ridge = sum(s * p.square().sum() for s, p in zip(x[0].exp(), y, strict=True))
        return F.cross_entropy(network(y, train[0]), train[1]) + ridge

    def f(x: list[Tensor], y: list[Tensor]) -> Tensor:
        return F.cross_entropy(network(y, val[0]), val[1])

    return Case(name, BilevelProblem(upper, lower, upper_loss, lower_loss), train, val, g, f, 0.1)


# --- the hand-written side ----------------------------------------------------------------------------------------------


def floor(case: Case, products: int) -> list[Tensor]:
    """One retained first-order graph, K bare products with g_yy, one with g_xy, the gradient of f."""
    x, y = case.point()
    f_x_y = grad(case.f(x, y), x + y, allow_unused=True)
    s = f_x_y[len(x) :]
    g_y = grad(case.g(x, y), y, create_graph=True)
    for _ in range(products):
        product = grad(g_y, y, s, retain_graph=True)
    cross = grad(g_y, x, s)
    return [c if a is None else a - c for a, c in zip(f_x_y, cross, strict=False)]


def raw_unrolled(case: Case, steps: int) -> list[Tensor]:
    """d/dx f(x, y_K(x)) through K steps of gradient descent."""
    x, y = case.point()
    for _ in range(steps):
        g_y = grad(case.g(x, y), y, create_graph=True)
        y = [torch.sub(p, d, alpha=case.lr) for p, d in zip(y, g_y, strict=True)]
    return list(grad(case.f(x, y), x))


class RawAID:
    """AID-BiO as one writes it for one problem: lower steps, CG from the last adjoint, cross product, step in x."""

    def __init__(self, case: Case, lr: float, steps: int, iterations: int) -> None:
        self.case, self.lr, self.steps, self.iterations = case, lr, steps, iterations
        x, y = case.point()
        self.x, self.y = [t.detach().clone() for t in x], [t.detach().clone() for t in y]
        self.z: list[Tensor] | None = None

    def step(self) -> None:
        case = self.case
        for _ in range(self.steps):
            y = [t.detach().requires_grad_() for t in self.y]
            self.y = [torch.sub(p, d, alpha=case.lr) for p, d in zip(self.y, grad(case.g(self.x, y), y), strict=True)]
        x, y = [t.detach().requires_grad_() for t in self.x], [t.detach().requires_grad_() for t in self.y]
        gradients = grad(case.f(x, y), x + y, allow_unused=True)
        f_x, f_y = gradients[: len(x)], gradients[len(x) :]
        g_y = grad(case.g(x, y), y, create_graph=True)
        z, r = [torch.zeros_like(t) for t in y], list(f_y)
        if self.z is not None:
            z = self.z
            r = [b - a for b, a in zip(f_y, grad(g_y, y, z, retain_graph=True), strict=True)]
        p, rr = r, self.dot(r, r)
        for _ in range(self.iterations):
            product = grad(g_y, y, p, retain_graph=True)
            alpha = rr / self.dot(p, product)
            z = [a + alpha * b for a, b in zip(z, p, strict=True)]
            r = [a - alpha * b for a, b in zip(r, product, strict=True)]
            rr, previous = self.dot(r, r), rr
            beta = rr / previous
            p = [a + beta * b for a, b in zip(r, p, strict=True)]
        self.z = z
        cross = grad(g_y, x, z)
        v = [-c if a is None else a - c for a, c in zip(f_x, cross, strict=True)]
        self.x = [torch.sub(t, d, alpha=self.lr) for t, d in zip(self.x, v, strict=True)]

    @staticmethod
    def dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
        return sum(torch.dot(s.reshape(-1), t.reshape(-1)) for s, t in zip(a, b, strict=True))


# --- measuring ----------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table."""

    what: str
    quantity: str
    floor: float
    ours: float
    unit: str
    ratio: float
    spread: tuple[float, float]
    repetitions: int
    target: float | None

    @property
    def verdict(self) -> str:
        return "" if self.target is None else "pass" if self.ratio <= self.target else "MISS"


def clock(function: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.process_time()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() - start


def compare(
    base: Callable[[], Any], ours: Callable[[], Any], device: str, seconds: float, calls: int = 1
) -> tuple[float, float, float, tuple[float, float], int]:
    """Alternate the two until the time is up; medians, the median ratio of neighbours and its quartiles."""

    def several(function: Callable[[], Any]) -> float:
        return clock(lambda: [function() for _ in range(calls)], device) / calls

    for function in (base, ours, base, ours):
        function()
    pairs: list[tuple[float, float]] = []
    gc.collect()
    gc.disable()
    stop = time.perf_counter() + seconds
    while len(pairs) < 4 or (time.perf_counter() < stop and len(pairs) < 400):
        # The one that goes second finds warm caches, so they take turns.
        if len(pairs) % 2:
            second = several(ours)
            pairs.append((several(base), second))
        else:
            first = several(base)
            pairs.append((first, several(ours)))
    gc.enable()
    ratios = [b / a for a, b in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return *(statistics.median(t) for t in zip(*pairs, strict=True)), middle, (low, high), len(pairs)


def peak(function: Callable[[], Any], device: str) -> int:
    """The most bytes of tensors alive at once during a call, above what was alive before it."""
    function()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    # Every allocation and release of torch's CPU allocator, in order. Blocks from before are not in the books.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], i, e["args"]["Bytes"]) for i, e in enumerate(events) if e.get("name") == "[memory]")
    live = most = 0
    for _, _, change in changes:
        live += change
        most = max(most, live)
    return most
