"""The oracle: derivatives against formulas, averages over parts against one batch, counts, memory, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.memory import saved_tensors
from tests.problems import flat, generator
from torchbilevel import Batches
from torchbilevel.counts import Counts
from torchbilevel.derivatives import average, explain, reached, scalar, vjp
from torchbilevel.oracle import Oracle
from torchbilevel.ranks import Ranks
from torchbilevel.samples import Sample
from torchbilevel.tensors import Tensors

N = 6


class Cubic:
    """f = mean_i (<t_i, y> + x0 |y|^2) + x1^3,  g = mean_i 1/3 sum_j (y_j - t_ij)^3 exp(x0) + x1 <s, y>, t the batch.

    x = (x0, x1) are 0-d, y is (a, b) of shapes (2,) and (). Losses see the seed only through `seen`.
    """

    def __init__(self, minimax: bool = False) -> None:
        self.minimax, self.tasks, self.ranks = minimax, None, Ranks()
        self.s = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
        self.seen: list[int] = []

    def upper_value(self, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensor:
        self.seen.append(seed)
        v = flat(y)
        return (batch @ v).mean() + x[0] * (v * v).sum() + x[1] ** 3

    def lower_value(self, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensor:
        self.seen.append(seed)
        v = flat(y)
        return ((v - batch) ** 3).sum(1).mean() * x[0].exp() / 3 + x[1] * (self.s @ v)


@pytest.fixture
def data() -> Tensor:
    return generator(1)(N, 3)


def point() -> tuple[Tensors, Tensors]:
    tensor = torch.tensor
    x = (tensor(0.3, dtype=torch.float64), tensor(-0.7, dtype=torch.float64))
    return x, (tensor([1.0, 2.0], dtype=torch.float64), tensor(-1.5, dtype=torch.float64))


def samples(data: Tensor) -> list[Sample]:
    """The same data as one batch and in three parts of different sizes."""
    return [Sample(data, 5), Sample(Batches([data[:1], data[1:4], data[4:]]), 5)]


def close(a: Tensors | Tensor, b: Tensor) -> None:
    a = a if isinstance(a, Tensor) else flat(a)
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    assert not a.requires_grad


def test_first_derivatives(data: Tensor) -> None:
    losses = Cubic()
    (x0, x1), y = x, y = point()
    v = flat(y)
    f = (data @ v).mean() + x0 * (v * v).sum() + x1**3
    g = ((v - data) ** 3).sum(1).mean() * x0.exp() / 3 + x1 * (losses.s @ v)
    g_y = ((v - data) ** 2).mean(0) * x0.exp() + x1 * losses.s
    for sample in samples(data):
        oracle = Oracle(losses)
        close(oracle.upper_value(x, y, sample), f)
        value, f_x, f_y, in_x = oracle.upper_gradient(x, y, sample)
        close(value, f)
        close(f_x, torch.stack([(v * v).sum(), 3 * x1**2]))
        close(f_y, data.mean(0) + 2 * x0 * v)
        assert in_x and [t.shape for t in (*f_x, *f_y)] == [t.shape for t in (*x, *y)]
        value, gradient = oracle.lower_gradient(x, y, sample)
        close(value, g)
        close(gradient, g_y)
        ys = tuple(t.clone().requires_grad_() for t in y)
        graph = oracle.lower_gradient_graph(x, ys, sample)
        close(flat(graph).detach(), g_y)
        hessian_row = flat(torch.autograd.grad(flat(graph)[0], ys))
        close(hessian_row, torch.stack([2 * (v - data).mean(0)[0] * x0.exp(), v[0] * 0, v[0] * 0]))


@pytest.mark.parametrize("in_x", [False, True])
def test_second_derivatives(data: Tensor, in_x: bool) -> None:
    losses, normal = Cubic(), generator(2)
    (x0, x1), y = x, y = point()
    v, s, u = flat(y), (normal(2), normal(1)[0]), tuple(normal(2))
    residual = v - data
    hessian = torch.diag(2 * residual.mean(0) * x0.exp())
    jacobian = torch.stack([(residual**2).mean(0) * x0.exp(), losses.s])  # g_xy, (2, 3)
    g_xx = torch.zeros(2, 2, dtype=torch.float64)
    g_xx[0, 0] = (residual**3).sum(1).mean() * x0.exp() / 3
    for sample in samples(data):
        lower = Oracle(losses).linearize(x, y, sample, in_x)
        close(lower.gradient, jacobian[0] + x1 * losses.s)
        for _ in range(2):  # the graph survives its use
            close(lower.hessian_product(s), hessian @ flat(s))
        if in_x:
            close(lower.cross_product(u), jacobian.T @ flat(u))
            in_u, in_s = lower.second_derivative(u, s)
            close(in_u, g_xx @ flat(u) + jacobian @ flat(s))
            close(in_s, jacobian.T @ flat(u) + hessian @ flat(s))
        assert not lower.reaches_x
        close(lower.jacobian_product(s, keep=True), jacobian @ flat(s))
        assert lower.reaches_x
        close(lower.jacobian_product(s), jacobian @ flat(s))
        if sample.whole:
            with pytest.raises(RuntimeError, match=r"freed by jacobian_product; pass keep=True"):
                lower.hessian_product(s)
        else:
            close(lower.hessian_product(s), hessian @ flat(s))


def test_works_where_gradients_are_switched_off(data: Tensor) -> None:
    x, y = point()
    oracle = Oracle(Cubic())
    want = oracle.linearize(x, y, Sample(data, 0)).hessian_product(y)
    with torch.no_grad():
        got = oracle.linearize(x, y, Sample(data, 0)).hessian_product(y)
        assert oracle.upper_gradient(x, y, Sample(data, 0))[3]
    assert torch.equal(flat(got), flat(want))


def test_every_evaluation_on_a_sample_sees_its_seed(data: Tensor) -> None:
    x, y = point()
    whole, parts = samples(data)
    for sample, number in ((whole, 1), (parts, 3)):
        losses = Cubic()
        oracle = Oracle(losses)
        oracle.upper_gradient(x, y, sample)
        oracle.lower_gradient(x, y, sample)
        oracle.linearize(x, y, sample)
        first, *rest = (losses.seen[i * number : (i + 1) * number] for i in range(3))
        assert len(set(first)) == number
        assert rest == [first, first]
        assert sample.whole is (first == [5])


@pytest.mark.parametrize("minimax", [False, True])
@pytest.mark.parametrize("parts", [False, True])
def test_counts(data: Tensor, minimax: bool, parts: bool) -> None:
    (x, y), sample = point(), samples(data)[parts]
    oracle = Oracle(Cubic(minimax))

    def spent(call: Callable[[], Any]) -> dict[str, int]:
        before = oracle.counts.state_dict()
        call()
        after = oracle.counts.state_dict()
        return {name: after[name] - before[name] for name in after if after[name] != before[name]}

    def one(kind: str) -> dict[str, int]:
        return {f"{kind}s": 1, f"{kind}_samples": N}

    gradient = one("upper_gradient" if minimax else "lower_gradient")
    ys = tuple(t.clone().requires_grad_() for t in y)
    assert spent(lambda: oracle.upper_value(x, y, sample)) == one("upper_value")
    assert spent(lambda: oracle.upper_gradient(x, y, sample)) == one("upper_gradient")
    assert spent(lambda: oracle.lower_gradient(x, y, sample)) == gradient
    assert spent(lambda: oracle.lower_gradient_graph(x, ys, sample)) == gradient
    assert spent(lambda: oracle.linearize(x, y, sample)) == gradient
    lower = oracle.linearize(x, y, sample, in_x=True)
    assert spent(lambda: lower.hessian_product(y)) == one("hessian_product")
    assert spent(lambda: lower.cross_product(x)) == one("jacobian_product")
    assert spent(lambda: lower.second_derivative(x, y)) == one("hessian_product")
    assert spent(lambda: lower.jacobian_product(y)) == one("jacobian_product")
    assert oracle.counts.calls == 10 and oracle.counts.samples == 10 * N
    copy = Counts()
    copy.load_state_dict(oracle.counts.state_dict())
    assert copy == oracle.counts
    copy.include(oracle.counts)
    assert copy.hessian_products == 2 * oracle.counts.hessian_products == 4


def test_memory_of_parts_is_that_of_one_part() -> None:
    """The graph of a part is gone before the next one is built, in gradients and in products."""
    normal = generator(3)

    class Deep(Cubic):
        def lower_value(self, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensor:
            return ((flat(y) - (batch * flat(y)).sin().cos()) ** 3).sum(1).mean() * x[0] ** 2

        upper_value = lower_value

    (x, y), parts = point(), [normal(50, 3) for _ in range(5)]

    def most(sample: Sample) -> list[int]:
        peaks = []
        for use in (
            lambda oracle: oracle.upper_gradient(x, y, sample),
            lambda oracle: oracle.lower_gradient(x, y, sample),
            lambda oracle: oracle.linearize(x, y, sample),
            lambda oracle: oracle.linearize(x, y, sample, in_x=True).hessian_product(y),
            lambda oracle: oracle.linearize(x, y, sample).jacobian_product(y),
        ):
            with saved_tensors() as saved:
                use(Oracle(Deep()))
                peaks.append(saved.most)
        return peaks

    assert most(Sample(Batches(parts), 0)) == most(Sample(parts[0], 0))


# --- what is not reached --------------------------------------------------------------------------


def test_zeros_stand_for_what_is_not_reached() -> None:
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    assert reached((a * a).sum(), (a, b)) == [True, False]
    assert reached(torch.ones(()), (a, b)) == [False, False]
    products, found = vjp([a * a, torch.ones(3)], (a, b), [torch.ones(2), torch.ones(3)])
    assert found == (True, False)
    assert torch.equal(products[0], torch.full((2,), 2.0)) and torch.equal(products[1], torch.zeros(2))
    for outputs, inputs in (([torch.ones(3)], (a,)), ([], (a,)), ([a * a], ())):
        products, found = vjp(outputs, inputs, [torch.ones_like(t) for t in outputs])
        assert found == (False,) * len(inputs) and not any(p.any() for p in products)


def test_losses_that_ignore_a_variable(data: Tensor) -> None:
    class Apart(Cubic):
        def upper_value(self, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensor:
            return (y[0] * y[0]).sum()

        def lower_value(self, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensor:
            return torch.tensor(2.0, dtype=torch.float64) + 0 * batch.sum()

    (x, y), oracle = point(), Oracle(Apart())
    for sample in samples(data):
        _, f_x, f_y, in_x = oracle.upper_gradient(x, y, sample)
        assert not in_x and not flat(f_x).any() and not f_y[1].any()
        lower = oracle.linearize(x, y, sample)
        nothing = (lower.gradient, lower.hessian_product(y), lower.jacobian_product(y, keep=True))
        assert not any(flat(t).any() for t in nothing) and not lower.reaches_x


def test_average_is_a_weighted_sum_and_copies_nothing_that_stands_alone() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    assert average([(1.0, (a,))])[0] is a
    (mixed,) = average([(0.25, (a,)), (0.75, (b,))])
    assert torch.equal(mixed, 0.25 * a + 0.75 * b)
    assert torch.equal(a, torch.tensor([1.0, 2.0]))


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (1.0, "a float"),
        (None, "a NoneType"),
        (torch.ones(2), r"a torch.float32 tensor of shape \(2,\)"),
        (torch.ones(()).long(), r"a torch.int64 tensor of shape \(\)"),
        (torch.ones((), dtype=torch.complex64), r"a torch.complex64 tensor of shape \(\)"),
    ],
)
def test_losses_that_are_no_numbers(value: Any, got: str) -> None:
    with pytest.raises(ValueError, match=f"lower_loss must return a real scalar tensor, got {got}; reduce it"):
        scalar(value, "lower_loss")
    assert scalar(torch.ones(1, 1), "lower_loss").shape == ()


@pytest.mark.parametrize("parts", [False, True])
def test_losses_without_second_derivative_meet_a_remedy(data: Tensor, parts: bool) -> None:
    class Fused(Cubic):
        def lower_value(self, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensor:
            a = (y[0] * x[0].exp())[None, None, :, None]
            return F.scaled_dot_product_attention(a, a, a).square().sum()

    x, y = point()
    lower = Oracle(Fused()).linearize(x, y, samples(data)[parts])
    for product in (lower.hessian_product, lower.jacobian_product):
        with pytest.raises(RuntimeError, match="lower_loss is not twice differentiable .*; run attention in its math"):
            product(y)


def test_other_errors_pass_as_they_are(data: Tensor) -> None:
    x, y = point()
    lower = Oracle(Cubic()).linearize(x, y, Sample(data, 0))
    with pytest.raises(RuntimeError, match="Mismatch in shape") as caught:
        lower.hessian_product((y[1], y[0]))
    assert caught.value.__cause__ is None


def test_the_loss_at_fault_is_named_where_it_is_known() -> None:
    error = RuntimeError("derivative for aten::_scaled_dot_product_x is not implemented")
    known, unknown = explain(error, "loss"), explain(error)
    assert str(known).startswith("loss is not twice differentiable (derivative for")
    assert str(unknown).startswith("a loss is not twice differentiable (derivative for")
    assert explain(unknown) is unknown and explain(known) is known
