"""Speed and memory: the package against hand-written loops, interleaved in one run.

    python -m benchmarks.cost [--smoke] [--device cpu|cuda] [--threads N] [--output DIR]

docs/cost.md says what the floor is, how time and memory are measured, and what came out.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad
from tqdm import tqdm

from torchbilevel import CG, GD, AIDBiO, BilevelProblem, Implicit, Neumann, Unrolled
from torchbilevel.estimators.base import Estimator
from torchbilevel.linear_solve import LinearSolver

Run = Callable[[], Any]

SEED = 0
TIME_TARGETS = {10: 1.12, 50: 1.05}
MEMORY_TARGET = 1.10
UNROLLED_TARGET = 1.05
STEP_TARGET = 1.50
GROWTH_TARGET = 1.01


@dataclass
class Case:
    """One problem twice: as modules and their losses, and as two functions of lists of tensors."""

    name: str
    modules: tuple[nn.Module, nn.Module]
    upper_loss: Callable[..., Tensor]
    lower_loss: Callable[..., Tensor]
    lower: tuple[Tensor, ...]
    upper: tuple[Tensor, ...]
    g: Callable[[list[Tensor], list[Tensor]], Tensor]
    f: Callable[[list[Tensor], list[Tensor]], Tensor]
    lr: float
    data: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        self.problem = BilevelProblem(*self.modules, self.upper_loss, self.lower_loss)
        self.start = tuple(t.clone() for t in self.problem.y)
        held = (*self.problem.x, *self.problem.y, *self.lower, *self.upper, *self.data)
        self.resident = sum(t.nbytes for t in held)

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

    return Case(name, (upper, lower), upper_loss, lower_loss, train, val, g, f, 0.1)


def mlp(name: str, n: int, size: int, widths: tuple[int, ...], device: str) -> Case:
    """A tanh network on one batch out of n training samples; x: the logit of a weight for each sample."""
    layers: list[nn.Module] = []
    for a, b in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(a, b), nn.Tanh()]
    upper, lower = Vector(n, 0.0).to(device), nn.Sequential(*layers[:-1]).to(device)
    data = [rows(n, widths[:1], widths[-1], SEED + i, device) for i in range(2)]
    index = torch.randperm(n, generator=torch.Generator().manual_seed(SEED))[:size].to(device)
    train, val = ((inputs[index], labels[index], index) for inputs, labels in data)

    def lower_loss(upper: Vector, lower: nn.Module, batch: Any) -> Tensor:
        losses = F.cross_entropy(lower(batch[0]), batch[1], reduction="none")
        ridge = sum(p.square().sum() for p in lower.parameters())
        return (upper.x[batch[2]].sigmoid() * losses).mean() + 0.5 * ridge

    def upper_loss(upper: Vector, lower: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(lower(batch[0]), batch[1])

    def network(y: list[Tensor], inputs: Tensor) -> Tensor:
        for i in range(0, len(y) - 2, 2):
            inputs = F.linear(inputs, y[i], y[i + 1]).tanh()
        return F.linear(inputs, y[-2], y[-1])

    def g(x: list[Tensor], y: list[Tensor]) -> Tensor:
        losses = F.cross_entropy(network(y, train[0]), train[1], reduction="none")
        return (x[0][index].sigmoid() * losses).mean() + 0.5 * sum(p.square().sum() for p in y)

    def f(x: list[Tensor], y: list[Tensor]) -> Tensor:
        return F.cross_entropy(network(y, val[0]), val[1])

    return Case(name, (upper, lower), upper_loss, lower_loss, train, val, g, f, 0.1, (*data[0], *data[1]))


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

    return Case(name, (upper, lower), upper_loss, lower_loss, train, val, g, f, 0.1)


# --- the hand-written side ------------------------------------------------------------------------


def bare(case: Case, products: int) -> list[Tensor]:
    """One retained first-order graph, K bare products with g_yy, one with g_xy, the gradient of f."""
    x, y = case.point()
    f_x_y = grad(case.f(x, y), x + y, allow_unused=True)
    s = f_x_y[len(x) :]
    g_y = grad(case.g(x, y), y, create_graph=True)
    for _ in range(products):
        grad(g_y, y, s, retain_graph=True)
    cross = grad(g_y, x, s)
    return [-c if a is None else a - c for a, c in zip(f_x_y[: len(x)], cross, strict=True)]


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
        self.upper, self.lower = copy.deepcopy(case.modules)
        self.x, self.y = list(self.upper.parameters()), list(self.lower.parameters())
        self.z: list[Tensor] | None = None

    def step(self) -> None:
        case, x, y = self.case, self.x, self.y
        for _ in range(self.steps):
            self.descend(y, grad(case.lower_loss(self.upper, self.lower, case.lower), y), case.lr)
        gradients = grad(case.upper_loss(self.upper, self.lower, case.upper), x + y, allow_unused=True)
        f_x, f_y = gradients[: len(x)], gradients[len(x) :]
        g_y = grad(case.lower_loss(self.upper, self.lower, case.lower), y, create_graph=True)
        if self.z is None:
            z, r = [torch.zeros_like(t) for t in y], list(f_y)
        else:
            z, r = self.z, [b - a for b, a in zip(f_y, grad(g_y, y, self.z, retain_graph=True), strict=True)]
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
        v = [-c if a is None else a - c for a, c in zip(f_x, grad(g_y, x, z), strict=True)]
        self.descend(x, v, self.lr)

    @staticmethod
    @torch.no_grad()
    def descend(point: list[nn.Parameter], direction: Iterable[Tensor], lr: float) -> None:
        for p, d in zip(point, direction, strict=True):
            p.sub_(d, alpha=lr)

    @staticmethod
    def dot(a: Iterable[Tensor], b: Iterable[Tensor]) -> Tensor:
        parts = [torch.dot(s.reshape(-1), t.reshape(-1)) for s, t in zip(a, b, strict=True)]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


# --- measuring ------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table: a quantity of ours beside the hand-written one."""

    problem: str
    what: str
    unit: str
    floor: float
    ours: float
    ratio: float
    target: float | None = None
    quartiles: tuple[float, float] | None = None
    repetitions: int = 1
    ratio_without_problem: float | None = None

    @property
    def verdict(self) -> str:
        return "" if self.target is None else "pass" if self.ratio <= self.target else "MISS"

    def __str__(self) -> str:
        target = "" if self.target is None else f"<= {self.target:.2f}"
        note = "" if self.ratio_without_problem is None else f"{self.ratio_without_problem:.3f} without the problem"
        if self.quartiles:
            note = f"quartiles {self.quartiles[0]:.3f} {self.quartiles[1]:.3f} of {self.repetitions}"
        return (
            f"{self.problem:5} {self.what:20} {self.floor:9.4g} {self.ours:9.4g} {self.unit:3} {self.ratio:7.3f} "
            f"{target:8} {self.verdict:5} {note}"
        ).rstrip()


class Meter:
    """Time and memory of one machine.

    On one CPU thread, time is the processor time of this process, which leaves out what other programs take. With more
    threads it is wall-clock time, and on a GPU wall-clock time between synchronisations.
    """

    def __init__(self, device: str, threads: int, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.now = time.process_time if device == "cpu" and threads == 1 else time.perf_counter

    def time(self, problem: str, what: str, floor: Run, ours: Run, target: float | None = None, calls: int = 1) -> Row:
        """Alternate the two until the time is up; the ratio is the median over neighbours."""
        for function in (floor, ours, floor, ours):
            function()
        pairs: list[tuple[float, float]] = []
        gc.collect()
        gc.disable()  # a collection would fall on one of the two by chance
        stop = time.perf_counter() + self.seconds
        while len(pairs) < 4 or (time.perf_counter() < stop and len(pairs) < 1000):
            if len(pairs) % 2:  # in turns, since the second one meets the caches that the first one left
                second = self._clock(ours, calls)
                pairs.append((self._clock(floor, calls), second))
            else:
                first = self._clock(floor, calls)
                pairs.append((first, self._clock(ours, calls)))
        gc.enable()
        low, ratio, high = statistics.quantiles([b / a for a, b in pairs], n=4)
        a, b = (1e3 * statistics.median(t) for t in zip(*pairs, strict=True))
        return Row(problem, what, "ms", a, b, ratio, target, (low, high), len(pairs))

    def memory(
        self, problem: str, what: str, floor: Run, make: Callable[[], Run], resident: int, target: float | None = None
    ) -> Row:
        """Peak memory of two calls in a row, the problem's own tensors (``resident`` bytes) included.

        The second call is the steady state, in which ours keeps what it remembers from the first one.
        """

        def ours() -> None:
            run = make()
            run(), run()

        floor()  # libraries allocate their workspaces once
        a, b = (1e-6 * self._peak(function) for function in (floor, ours))
        own = 1e-6 * resident
        ratio = (own + b) / (own + a)
        return Row(problem, f"{what}, peak", "MB", own + a, own + b, ratio, target, ratio_without_problem=b / a)

    def growth(self, problem: str, steps: int, run: Run) -> Row:
        """Memory held after ``steps`` further calls beside that after 100, as a ratio; nothing may run before it."""
        for _ in range(100):
            run()
        before = self._held()
        for _ in tqdm(range(steps), desc="memory over steps", leave=False):
            run()
        after = self._held()
        return Row(problem, f"{steps} steps, memory", "MB", before, after, after / before, GROWTH_TARGET)

    def _clock(self, function: Run, calls: int) -> float:
        self._synchronize()
        start = self.now()
        for _ in range(calls):
            function()
        self._synchronize()
        return (self.now() - start) / calls

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _held(self) -> float:
        if self.device == "cuda":
            return 1e-6 * torch.cuda.memory_allocated()
        # The most the process ever held; in kilobytes, but in bytes on macOS.
        unit = 1e-6 if sys.platform == "darwin" else 1.024e-3
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def _peak(self, function: Run) -> int:
        """The most bytes of tensors alive at once during a call, above what was alive before."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            function()
            return torch.cuda.max_memory_allocated() - before
        # Every allocation and release of torch's CPU allocator, in order, workspaces of the kernels included. A block
        # from before the call has no entry when it is released.
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            function()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        blocks = [(e["ts"], i, e["args"]["Bytes"]) for i, e in enumerate(events) if e.get("name") == "[memory]"]
        return max(accumulate(change for _, _, change in sorted(blocks)))


# --- what is measured -----------------------------------------------------------------------------


def implicit(case: Case, solver: LinearSolver) -> Run:
    """One implicit hypergradient, y staying where it is and the adjoint starting at zero."""
    return backward(case, Implicit(None, solver, warm_start_adjoint=False))


def unrolled(case: Case, steps: int, recompute: bool) -> Run:
    """One unrolled hypergradient, from the same y every time."""
    case.problem.set_y(case.start)
    return backward(case, Unrolled(GD(case.lr, steps), recompute=recompute, warm_start=False))


def backward(case: Case, estimator: Estimator) -> Run:
    estimator.bind(case.problem)
    estimator.keeps_past = False  # as in a method whose rule does not probe

    def run() -> list[Tensor | None]:
        estimator.backward(lower=case.lower, upper=case.upper)
        gradients = [p.grad for p in case.problem.upper.parameters()]
        case.problem.upper.zero_grad()
        return gradients

    return run


def outer_steps(case: Case) -> tuple[Run, Run]:
    """One outer step of AID-BiO, by hand and by the package, from the same point."""
    raw = RawAID(case, lr=0.1, steps=5, iterations=5)
    method = AIDBiO(case.problem, lr=0.1, lower_solver=GD(case.lr, 5), linear_solver=CG(5, tol=None))

    def step() -> None:
        method.zero_grad()
        method.backward(lower=case.lower, upper=case.upper)
        method.step()

    for _ in range(3):
        raw.step()
        step()
    require_equal((*raw.x, *raw.y), (*case.problem.x, *case.problem.y))
    return raw.step, step


def require_equal(a: Iterable[Tensor], b: Iterable[Tensor]) -> None:
    """The two sides must compute the same thing before it makes sense to time them."""
    for s, t in zip(a, b, strict=True):
        torch.testing.assert_close(s, t, rtol=1e-3, atol=1e-6)


def measure(device: str, threads: int, smoke: bool) -> list[Row]:
    meter = Meter(device, threads, seconds=0.05 if smoke else 15.0)
    tiny = logistic("tiny", 20, 5, device, classes=3)
    raw_step, step = outer_steps(tiny)
    # First of all, because on a CPU it reads the high-water mark of the process.
    rows = [meter.growth("tiny", 50 if smoke else 1000, step)]
    rows.append(meter.time("tiny", "AID-BiO outer step", raw_step, step, STEP_TARGET, calls=20))
    for make in tqdm(SMALL if smoke else PROBLEMS, desc="problems"):
        case = make(device)
        rows += implicit_rows(case, meter, [3] if smoke else [10, 50])
        rows += unrolled_rows(case, meter, 3 if smoke else 20)
    # Where a call takes a fraction of a millisecond, the targets say nothing.
    return [replace(row, target=None) if smoke else row for row in rows]


PROBLEMS = (
    partial(logistic, "a64", 5000, 64),
    partial(logistic, "a784", 5000, 784),
    partial(mlp, "b", 5000, 512, (128, 256, 256, 10)),
    partial(convolutions, "c", 64, (3, 16, 32, 32)),
)
SMALL = (
    partial(logistic, "a64", 200, 64),
    partial(mlp, "b", 100, 32, (16, 32, 32, 10)),
)


def implicit_rows(case: Case, meter: Meter, counts: list[int]) -> Iterator[Row]:
    for k in counts:
        floor = partial(bare, case, k)
        for solver in (CG(k, tol=None), Neumann(k, lr=case.lr)):
            what, ours = f"{type(solver).__name__} {k}", partial(implicit, case, solver)
            yield meter.time(case.name, what, floor, ours(), TIME_TARGETS.get(k))
            if k == counts[0]:  # more products need no more memory
                yield meter.memory(case.name, what, floor, ours, case.resident, MEMORY_TARGET)


def unrolled_rows(case: Case, meter: Meter, steps: int) -> Iterator[Row]:
    floor = partial(raw_unrolled, case, steps)
    for recompute in (False, True):
        what = f"{'recomputed' if recompute else 'unrolled'} {steps}"
        ours = partial(unrolled, case, steps, recompute)
        run = ours()
        require_equal(floor(), run())
        yield meter.time(case.name, what, floor, run, None if recompute else UNROLLED_TARGET)
        yield meter.memory(case.name, what, floor, ours, case.resident)


def describe(device: str, threads: int) -> dict[str, Any]:
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else platform.processor() or platform.machine()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "device": device,
        "device_name": name,
        "threads": threads,
        "seed": SEED,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="small sizes, a few seconds: does it run at all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--output", type=Path, help="folder of cost.json (results, or smoke)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its own start and stop otherwise
    warnings.simplefilter("error")  # a solve that breaks down would be timed for nothing
    machine = describe(options.device, options.threads)
    rows = measure(options.device, options.threads, options.smoke)
    print(" ".join(f"{key}={value}" for key, value in machine.items()))
    print(f"{'':26} {'floor':>9} {'ours':>9} {'':3} {'ratio':>7} target")
    print("\n".join(map(str, rows)))
    folder = options.output or Path("smoke" if options.smoke else "results")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cost.json"
    table = [{**asdict(row), "verdict": row.verdict} for row in rows]
    path.write_text(json.dumps({"machine": machine, "smoke": options.smoke, "rows": table}, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
