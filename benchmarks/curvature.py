"""What a product with hess Phi costs beside the same product by hand, and what a certificate costs as problems grow.

    python -m benchmarks.curvature [--smoke] [--device cpu|cuda] [--threads N] [--output DIR]

The problem: a layer of features above (x), a regularised softmax regression on them below (y), as many variables in
each. A linear term makes the start stationary, and a quadratic one, or none, makes it a minimum or a saddle.
docs/certificate.md says what came out.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad
from tqdm import tqdm

from benchmarks.cost import SEED, Meter, Row, describe
from torchbilevel import CG, BilevelProblem, HessianOperator, certify, hessian_operator
from torchbilevel.lanczos import smallest_eigenpair

PRODUCT_TARGET = 1.2
SECONDS_TARGET = 60.0
RIDGE = 1e-2
EPS = torch.finfo(torch.float64).eps


class Features(nn.Module):
    """Tanh features of the rows, W tanh-ed, with the point of reference and the slope there."""

    start: Tensor
    slope: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.register_buffer("start", weight.clone())
        self.register_buffer("slope", torch.zeros_like(weight))

    def forward(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weight).tanh()


@dataclass
class Case:
    """The problem at one size, and its two losses as functions of the two weights."""

    side: int
    rows: int
    device: str
    strength: float = 0.0
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(SEED)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=self.dtype)

        rule = normal(self.side, self.side)
        self.batches: list[tuple[Tensor, Tensor]] = []
        for _ in range(2):
            inputs = normal(self.rows, self.side)
            labels = (inputs @ rule + normal(self.rows, self.side)).argmax(1)
            self.batches.append((inputs.to(self.device), labels.to(self.device)))
        self.features = Features(normal(self.side, self.side) / self.side**0.5).to(self.device).eval()
        self.head = nn.Linear(self.side, self.side, bias=False).to(self.device, self.dtype).eval()
        nn.init.zeros_(self.head.weight)

        def lower_loss(upper: Features, lower: nn.Linear, batch: Any) -> Tensor:
            return F.cross_entropy(lower(upper(batch[0])), batch[1]) + 0.5 * RIDGE * lower.weight.square().sum()

        def upper_loss(upper: Features, lower: nn.Linear, batch: Any) -> Tensor:
            moved = upper.weight - upper.start
            own = 0.5 * self.strength * moved.square().sum() - (upper.slope * moved).sum()
            return F.cross_entropy(lower(upper(batch[0])), batch[1]) + own

        self.problem = BilevelProblem(self.features, self.head, upper_loss, lower_loss)
        self.data = {"lower": self.batches[0], "upper": self.batches[1]}
        # From here on grad Phi = 0 at the start.
        self.features.slope.copy_(hessian_operator(self.problem, **self.data).gradient[0])

    @property
    def size(self) -> int:
        return self.side**2

    def g(self, x: Tensor, y: Tensor) -> Tensor:
        logits = F.linear(F.linear(self.batches[0][0], x).tanh(), y)
        return F.cross_entropy(logits, self.batches[0][1]) + 0.5 * RIDGE * y.square().sum()

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        moved = x - self.features.start
        own = 0.5 * self.strength * moved.square().sum() - (self.features.slope * moved).sum()
        return F.cross_entropy(F.linear(F.linear(self.batches[1][0], x).tanh(), y), self.batches[1][1]) + own


class ByHand:
    """The product that HessianOperator gives, written for one tensor above and one below."""

    def __init__(self, case: Case, operator: HessianOperator) -> None:
        assert operator.z is not None
        self.x, self.y = (t.detach().requires_grad_() for t in (operator.x[0], operator.response.y[0]))
        self.g_x, self.g_y = grad(case.g(self.x, self.y), (self.x, self.y), create_graph=True)
        lagrangian = case.f(self.x, self.y) - (operator.z[0] * self.g_y).sum()
        self.L = grad(lagrangian, (self.x, self.y), create_graph=True)

    def product(self, u: Tensor, iterations: tuple[int, int]) -> Tensor:
        dy = -self.solve(grad(self.g_x, self.y, u, retain_graph=True)[0], iterations[0])
        in_x, in_y = grad(self.L, (self.x, self.y), (u, dy), retain_graph=True)
        dz = self.solve(in_y, iterations[1])
        return in_x - grad(self.g_y, self.x, dz, retain_graph=True)[0]

    def solve(self, b: Tensor, iterations: int) -> Tensor:
        z, r, p = torch.zeros_like(b), b, b
        rr = (r * r).sum()
        for _ in range(iterations):
            product = grad(self.g_y, self.y, p, retain_graph=True)[0]
            alpha = rr / (p * product).sum()
            z, r = z + alpha * p, r - alpha * product
            rr, previous = (r * r).sum(), rr
            p = r + (rr / previous) * p
        return z


def product_row(case: Case, meter: Meter) -> Row:
    """One product by hand and by the package, with the same iterations in both solves."""
    operator = hessian_operator(case.problem, **case.data)
    u = torch.randn(operator.x[0].shape, generator=torch.Generator().manual_seed(1), dtype=case.dtype).to(case.device)
    b, solver = operator.response.linearization.cross_product((u,)), CG(case.size, EPS**0.77)
    first, before = operator.response.solve(b, solver).iterations, operator.counts.hessian_products
    ours = operator.product((u,))[0]
    hand, counts = ByHand(case, operator), (first, operator.counts.hessian_products - before - first)
    torch.testing.assert_close(hand.product(u, counts), ours, rtol=1e-6, atol=1e-9)
    floor, run = partial(hand.product, u, counts), partial(operator.product, (u,))
    return meter.time(str(case.size), f"{counts[0]} + {counts[1]}", floor, run, PRODUCT_TARGET)


@dataclass
class Line:
    """One certificate."""

    size: int
    strength: float
    verdict: str
    lambda_min: float
    error: float
    products: int
    lower_products: int
    gradients: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.size:7} {self.strength:9.3f}  {self.verdict:22} {self.lambda_min:+9.2e} - {self.error:.0e} "
            f"{self.products:9} {self.lower_products:9} {self.gradients:9} {self.seconds:9.2f}"
        )


def certificate_lines(side: int, rows: int, device: str) -> Iterator[Line]:
    """The saddle, and the minimum that it becomes when a little more curvature is added than is missing."""
    case = Case(side, rows, device)
    operator = hessian_operator(case.problem, **case.data)
    generator = torch.Generator().manual_seed(2)
    pair = smallest_eigenpair(
        operator.matvec,
        torch.randn(case.size, generator=generator, dtype=case.dtype).to(device),
        enough=lambda value, residual, error: error <= 0.1 * abs(value),
    )
    yield certificate_line(case, "strict saddle")
    yield certificate_line(Case(side, rows, device, strength=-1.2 * pair.value), "epsilon-local minimum")


def certificate_line(case: Case, expected: str) -> Line:
    start = time.perf_counter()
    c = certify(case.problem, **case.data, grad_tol=1e-4, curvature_tol=1e-3)
    seconds = time.perf_counter() - start  # the certificate's numbers have been waited for
    if c.verdict != expected:
        raise RuntimeError(f"expected {expected}, got\n{c}")
    counts = c.counts
    return Line(
        size=case.size,
        strength=case.strength,
        verdict=c.verdict,
        lambda_min=c.lambda_min,
        error=c.lambda_min_error,
        products=counts.lagrangian_products,
        lower_products=counts.hessian_products,
        gradients=counts.upper_gradients + counts.lower_gradients,
        seconds=seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curvature", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="small sizes, a few seconds: does it run at all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of curvature.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("error")
    machine = describe(options.device, options.threads)
    meter = Meter(options.device, options.threads, seconds=0.05 if options.smoke else 15.0)
    sides, rows = ([5, 10], 50) if options.smoke else ([10, 32, 100], 1000)
    table, lines = [], []
    for side in tqdm(sides, desc="sizes"):
        table.append(product_row(Case(side, rows, options.device), meter))
        lines += certificate_lines(side, rows, options.device)
    print(" ".join(f"{key}={value}" for key, value in machine.items()))
    print(
        f"{'n':>7} {'iterations':>10} {'by hand':>9} {'ours':>9} {'ratio':>10}  {'quartiles':14} {'pairs':>6}  target"
    )
    for r in table:
        times = f"{r.floor:9.2f} {r.ours:9.2f} {r.unit} {r.ratio:7.3f}"
        quartiles = " ".join(f"{q:.3f}" for q in r.quartiles or ())
        print(f"{r.problem:>7} {r.what:>10} {times}  {quartiles:14} {r.repetitions:6}  <= {r.target}")
    numbers = f"{'products':>9} {'g_yy s':>9} {'gradients':>9} {'seconds':>9}"
    print(f"\n{'n':>7} {'strength':>9}  {'verdict':22} {'lambda_min':17} {numbers}")
    print("\n".join(map(str, lines)))
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "curvature.json"
    content = {
        "machine": machine,
        "smoke": options.smoke,
        "products": [{**asdict(row), "verdict": row.verdict} for row in table],
        "certificates": [asdict(line) for line in lines],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
