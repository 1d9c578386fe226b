"""Steps along the smallest eigenvector: against dense eigenpairs, by differences and by exact products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchbilevel as tb
from benchmarks import octopus
from torchbilevel.optim import NegativeCurvature

OPTIONS: dict[str, Any] = {"grad_tol": 1e-2, "curvature_tol": 0.05, "step_length": 0.3}


def symmetric(spectrum: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix of that spectrum in a random basis, and the basis."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64))
    return (q * spectrum) @ q.T, q


class Surface:
    """A closure on x'Hx / 2 + sin(<c, x>)^3 + slope x over two parameter tensors, with a count of its calls."""

    def __init__(self, H: Tensor, slope: float = 0.0, center: float = 0.0) -> None:
        n = len(H)
        self.H, self.slope, self.center, self.calls = H, slope, center, 0
        x = torch.full((n,), center, dtype=H.dtype)
        self.params = [x[: n // 2].clone().requires_grad_(), x[n // 2 :].clone().reshape(-1, 1).requires_grad_()]

    def offset(self) -> Tensor:
        return torch.cat([p.reshape(-1) for p in self.params]) - self.center

    def __call__(self) -> Tensor:
        self.calls += 1
        for p in self.params:
            p.grad = None
        u = self.offset()
        loss = 0.5 * u @ self.H @ u + torch.sin(u.sum()) ** 3 + self.slope * u.sum()
        loss.backward()
        return loss.detach()


class Exact(Surface):
    """The same with products, in an order of its own, which ``parameters`` tells."""

    def __init__(self, H: Tensor, **options: Any) -> None:
        super().__init__(H, **options)
        self.parameters = (self.params[1], torch.zeros(3, dtype=H.dtype), self.params[0])
        self.products, self.values = 0, 0

    def hvp(self, s: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.products += 1
        assert [t.shape for t in s] == [t.shape for t in self.parameters] and not bool(s[1].any())
        image = self.H @ torch.cat([s[2].reshape(-1), s[0].reshape(-1)])
        n = len(s[2])
        return image[n:].reshape(-1, 1), torch.full((3,), math.nan), image[:n]

    def value(self) -> Tensor:
        self.values += 1
        calls, loss = self.calls, self()
        self.calls = calls
        return loss


@pytest.mark.parametrize("kind", [Surface, Exact])
@pytest.mark.parametrize("n", [2, 7, 40])
def test_direction_is_the_smallest_eigenvector(kind: type[Surface], n: int) -> None:
    H, basis = symmetric(torch.linspace(-0.5, 2.0, n, dtype=torch.float64))
    closure = kind(H)
    rule = NegativeCurvature(closure.params, 0.1, **OPTIONS)
    rule.step(closure)
    moved = closure.offset().detach()
    assert float(moved.norm()) == pytest.approx(0.3, rel=1e-12)
    assert abs(float(moved @ basis[:, 0])) == pytest.approx(0.3, rel=1e-6)
    assert [e.kind for e in rule.events] == ["negative curvature"]
    assert rule.events[0].value == pytest.approx(-0.5, abs=1e-6)


@pytest.mark.parametrize("kind", [Surface, Exact])
@pytest.mark.parametrize("smallest", [-0.06, -0.04, 0.0, 0.5])
def test_curvature_tol_decides_and_the_eigenvalue_is_on_record(kind: type[Surface], smallest: float) -> None:
    H, _ = symmetric(torch.tensor([smallest, 1.0, 2.0, 2.0, 3.0], dtype=torch.float64))
    closure = kind(H)
    rule = NegativeCurvature(closure.params, 0.1, **OPTIONS, stop=True)
    rule.step(closure)
    assert rule.done == (smallest > -0.05) == (not bool(closure.offset().detach().any()))
    kinds = {True: "escape test passed", False: "negative curvature"}
    assert [e.kind for e in rule.events] == [kinds[rule.done]]
    assert rule.events[0].value == pytest.approx(smallest, abs=1e-8)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("center", [0.0, 300.0])
def test_accuracy_of_differences(dtype: torch.dtype, error: float, center: float) -> None:
    """The third derivatives of the sine's cube cancel in central differences, and not in one-sided ones."""
    H, _ = symmetric(torch.tensor([-0.5, -0.1, 0.3, 0.7, 1.0, 2.0], dtype=torch.float64))
    closure = Surface(H.to(dtype), center=center)
    rule = NegativeCurvature(closure.params, 0.1, **OPTIONS)
    rule.step(closure)
    assert rule.events[0].value == pytest.approx(-0.5, abs=error)


@pytest.mark.parametrize("kind", [Surface, Exact])
@pytest.mark.parametrize("slope", [1e-3, -1e-3])
def test_the_lower_side_is_taken(kind: type[Surface], slope: float) -> None:
    """Losses at +- e differ by 2 slope <1, e> step_length, and by the cube of the sine, which is smaller here."""
    H, basis = symmetric(torch.tensor([-1.0, 0.5, 1.0, 2.0], dtype=torch.float64))
    sides = set()
    for seed in range(6):
        closure = kind(H, slope=slope)
        NegativeCurvature(closure.params, 0.1, **{**OPTIONS, "step_length": 1e-2}, seed=seed).step(closure)
        side = float(closure.offset().detach() @ basis[:, 0])
        assert abs(side) == pytest.approx(1e-2, rel=1e-6)
        assert side * slope * float(basis[:, 0].sum()) < 0
        sides.add(side > 0)
    assert len(sides) == 1


def test_cost_is_that_of_the_docstring() -> None:
    H, _ = symmetric(torch.tensor([-0.5, 0.3, 0.7, 2.0], dtype=torch.float64))
    closure, exact = Surface(H), Exact(H)
    for c in (closure, exact):
        NegativeCurvature(c.params, 0.1, **OPTIONS).step(c)
    assert closure.calls == 1 + 2 * 5 + 2  # v; four basis vectors and a residual; both sides
    assert (exact.calls, exact.products, exact.values) == (1, 5, 2)
    closure = Surface(symmetric(torch.linspace(-1, 2, 60, dtype=torch.float64))[0])
    NegativeCurvature(closure.params, 0.1, **OPTIONS, max_basis=3).step(closure)
    assert closure.calls == 1 + 2 * 4 + 2


def test_products_come_in_the_order_of_the_groups_unless_the_closure_tells_another() -> None:
    a, b = torch.zeros(2, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    seen = []

    def closure() -> float:
        a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
        return 0.0

    def hvp(s: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append([tuple(t.shape) for t in s])
        return -2 * s[0], s[1]

    closure.hvp = hvp  # type: ignore[attr-defined]
    rule = NegativeCurvature([{"params": [b]}, {"params": [a]}], 0.1, **OPTIONS)
    rule.step(closure)
    assert seen[0] == [(), (2,)] and abs(float(b)) == pytest.approx(0.3) and rule.events[0].value == pytest.approx(-2)


@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_max_basis_must_be_a_positive_integer(value: Any) -> None:
    with pytest.raises(ValueError, match=f"max_basis must be a positive integer, got {value}"):
        NegativeCurvature([torch.zeros(2)], 0.1, **OPTIONS, max_basis=value)


def test_closure_must_return_the_loss() -> None:
    closure = Surface(-torch.eye(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="closure must return the loss, got None"):
        NegativeCurvature(closure.params, 0.1, **OPTIONS).step(lambda: None if closure() is None else None)
    assert not bool(closure.offset().detach().any())


# On problems


def descend(method: tb.Method, steps: int) -> None:
    for _ in range(steps):
        if not method.done:
            method.zero_grad()
            method.backward()
            method.step()


def octopus_method(make: Callable[[Any], Any]) -> tb.Method:
    problem = octopus.bilevel(3, 1.0, kappa=2.0, start=octopus.saddle(2, 3))
    estimator = tb.Implicit(tb.GD(lr=1.0, steps=60, tol=1e-10), tb.CG(max_iter=3, tol=1e-12))
    return tb.Method(problem, estimator, make(problem.upper_parameters))


@pytest.mark.parametrize("seed", range(2))
def test_bilevel_octopus_from_its_saddle_by_exact_products(seed: int) -> None:
    options = {"grad_tol": 1e-3, "curvature_tol": 1.0, "step_length": 1.0, "stop": True}
    method = octopus_method(lambda x: NegativeCurvature(x, 0.25, **options, seed=seed))
    method.backward()
    method.step()
    moved = method.problem.x[0] - octopus.saddle(2, 3)
    torch.testing.assert_close(moved.abs(), torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-8)
    assert method.events[0].value == pytest.approx(-2.0, abs=1e-8)  # -2 gamma
    assert method.estimator.counts.lagrangian_products > 0
    descend(method, 150)
    assert method.done and method.events[-1].value == pytest.approx(2.0, abs=1e-2)  # 2 L
    result = method.result()
    assert result.claim == "escape test passed"
    torch.testing.assert_close(result.x[0].abs(), octopus.minimum(3), rtol=0, atol=2e-3)
    torch.testing.assert_close(result.y[0], result.x[0], rtol=0, atol=1e-9)


def test_rule_over_a_part_of_the_upper_parameters_in_another_order() -> None:
    """Phi = -p^2 - 3 q^2 + 2 s^2 at 0, y = p; the rule moves s and p: the smallest eigenvalue is that of p."""

    class Upper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in "pqs":
                setattr(self, name, nn.Parameter(torch.zeros((), dtype=torch.float64)))

    class Lower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.y = nn.Parameter(torch.zeros((), dtype=torch.float64))

    upper: Any = Upper()
    problem = tb.BilevelProblem(
        upper,
        Lower(),
        lower_loss=lambda u, low, batch: (low.y - u.p) ** 2,
        upper_loss=lambda u, low, batch: -(low.y**2) - 3 * u.q**2 + 2 * u.s**2,
    )
    rule = NegativeCurvature([upper.s, upper.p], 0.1, **OPTIONS)
    method = tb.Method(problem, tb.Implicit(tb.GD(lr=0.5, steps=1), tb.CG(max_iter=1)), rule)
    method.backward()
    method.step()
    assert abs(upper.p.item()) == pytest.approx(0.3, rel=1e-6) and upper.q.item() == 0.0
    assert method.events[0].value == pytest.approx(-2.0, abs=1e-8)
