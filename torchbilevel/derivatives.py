"""Derivatives of the two losses: the only caller of ``torch.autograd.grad`` and the only counter of oracle calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from torchbilevel.samples import Sample
from torchbilevel.tensors import Tensors, axpy, detach, leaves, scale, zeros


class Losses(Protocol):
    """What derivatives are taken of: the two losses as functions of tuples of tensors, batch and seed."""

    minimax: bool

    def upper_value(self, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensor:
        """The upper loss f(x, y)."""

    def lower_value(self, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensor:
        """The lower loss g(x, y)."""


@dataclass
class Counts:
    """Oracle calls so far, and the data points they touched (calls times samples), as the papers count them.

    Attributes:
        upper_gradients: gradients of f (grad_x and grad_y together count once); Gc(f) in samples.
        lower_gradients: gradients of g in y; Gc(g) in samples. A minimax problem has one loss and counts under f.
        hessian_products: products g_yy s; HV(g) in samples.
        jacobian_products: products g_xy s; JV(g) in samples.
        upper_values: evaluations of f alone, without a gradient.
    """

    upper_gradients: int = 0
    lower_gradients: int = 0
    hessian_products: int = 0
    jacobian_products: int = 0
    upper_values: int = 0
    upper_gradient_samples: int = 0
    lower_gradient_samples: int = 0
    hessian_product_samples: int = 0
    jacobian_product_samples: int = 0
    upper_value_samples: int = 0

    def add(self, kind: str, sample: Sample, calls: int = 1) -> None:
        """Count ``calls`` oracle calls of one kind (``"upper_gradient"``, ...) on a sample."""
        setattr(self, f"{kind}s", getattr(self, f"{kind}s") + calls)
        setattr(self, f"{kind}_samples", getattr(self, f"{kind}_samples") + calls * sample.size)

    def state_dict(self) -> dict[str, int]:
        """All counters by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Set all counters by name."""
        for f in fields(self):
            setattr(self, f.name, int(state[f.name]))


def vjp(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], keep: bool = False
) -> tuple[Tensors, tuple[bool, ...]]:
    """The product cotangents' d outputs / d inputs.

    Args:
        outputs: tensors, some of which may be constants without a graph.
        inputs: tensors that require gradients.
        cotangents: one per output, of its shape.
        keep: whether the graph is kept for further products.

    Returns:
        One tensor per input, without graph, zeros where an input is not reached; and which inputs are reached.
    """
    alive = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not alive or not inputs:
        return zeros(inputs), (False,) * len(inputs)
    products = torch.autograd.grad(
        [o for o, _ in alive], list(inputs), [c for _, c in alive], retain_graph=keep, allow_unused=True
    )
    filled = tuple(torch.zeros_like(t) if p is None else p for p, t in zip(products, inputs, strict=True))
    return filled, tuple(p is not None for p in products)


def reached(value: Tensor, inputs: Sequence[Tensor]) -> list[bool]:
    """Which inputs the graph of a scalar reaches; the graph is kept."""
    if not value.requires_grad:
        return [False] * len(inputs)
    return [g is not None for g in torch.autograd.grad(value, list(inputs), retain_graph=True, allow_unused=True)]


def scalar(value: Any, name: str) -> Tensor:
    """Return a loss as a 0-d tensor.

    Args:
        value: what the user's loss returned.
        name: of the loss, for the message.

    Returns:
        The value, with its graph.

    Raises:
        ValueError: if it is not a tensor with exactly one floating-point entry.
    """
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        got = (
            f"a {value.dtype} tensor of shape {tuple(value.shape)}"
            if isinstance(value, Tensor)
            else f"a {type(value).__name__}"
        )
        raise ValueError(f"{name} must return a real scalar tensor, got {got}; reduce it with .mean() or .sum()")
    return value.reshape(())


class Oracle:
    """Counted derivatives of a problem's losses.

    Every method takes a point (x, y) as tuples of tensors, whose graphs and ``requires_grad`` flags play no part unless
    said otherwise, and a sample. Averages over the parts of a ``Batches`` are formed here.

    Args:
        losses: the problem.
    """

    def __init__(self, losses: Losses) -> None:
        self.losses = losses
        self.counts = Counts()

    def upper_value(self, x: Tensors, y: Tensors, sample: Sample) -> Tensor:
        """The upper loss f(x, y), detached. Cost: one evaluation."""
        self.counts.add("upper_value", sample)
        with torch.no_grad():
            values = [w * scalar(self.losses.upper_value(x, y, b, s), "upper_loss") for w, b, s in sample.parts()]
        return values[0] if len(values) == 1 else torch.stack(values).sum()

    def upper_gradient(
        self, x: Tensors, y: Tensors, sample: Sample, in_y: bool = True
    ) -> tuple[Tensor, Tensors, Tensors, bool]:
        """Value and gradients of f.

        Args:
            x: upper variables.
            y: lower variables.
            sample: where f is evaluated.
            in_y: whether f_y is wanted; otherwise it is returned empty.

        Returns:
            f, f_x and f_y, and whether the graph of f reaches x at all. Cost: one gradient of f.
        """
        self.counts.add("upper_gradient", sample)
        xs, ys = leaves(x), leaves(y) if in_y else detach(y)
        inputs = xs + ys if in_y else xs
        value, total, in_x = None, None, False
        for weight, batch, seed in sample.parts():
            with torch.enable_grad():
                part = scalar(self.losses.upper_value(xs, ys, batch, seed), "upper_loss")
            grads = (
                torch.autograd.grad(part, inputs, allow_unused=True) if part.requires_grad else (None,) * len(inputs)
            )
            in_x = in_x or any(g is not None for g in grads[: len(xs)])
            filled = tuple(torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs, strict=True))
            if sample.whole:
                value, total = part.detach(), filled
            else:
                value = weight * part.detach() if value is None else value + weight * part.detach()
                total = scale(weight, filled) if total is None else axpy(weight, filled, total)
        assert value is not None and total is not None  # a sample has at least one part
        return value, total[: len(xs)], total[len(xs) :], in_x

    def lower_gradient(self, x: Tensors, y: Tensors, sample: Sample) -> tuple[Tensor, Tensors]:
        """Value of g and g_y, detached. Cost: one gradient of g."""
        self.counts.add("upper_gradient" if self.losses.minimax else "lower_gradient", sample)
        ys = leaves(y)
        value, total = None, None
        for weight, batch, seed in sample.parts():
            with torch.enable_grad():
                part = scalar(self.losses.lower_value(detach(x), ys, batch, seed), "lower_loss")
            grads, _ = vjp([part], ys, [torch.ones_like(part)])
            if sample.whole:
                return part.detach(), grads
            value = weight * part.detach() if value is None else value + weight * part.detach()
            total = scale(weight, grads) if total is None else axpy(weight, grads, total)
        assert value is not None and total is not None
        return value, total

    def lower_gradient_graph(self, x: Tensors, y: Tensors, sample: Sample) -> Tensors:
        """g_y with its graph: ``x`` and ``y`` are used as they come, and y must require gradients.

        Cost: one gradient of g; the graphs of all parts stay in memory.
        """
        self.counts.add("upper_gradient" if self.losses.minimax else "lower_gradient", sample)
        total: Tensors | None = None
        for weight, batch, seed in sample.parts():
            grads = self._differentiable_gradient(x, y, batch, seed)
            if sample.whole:
                return grads
            total = scale(weight, grads) if total is None else axpy(weight, grads, total)
        assert total is not None
        return total

    def linearize(self, x: Tensors, y: Tensors, sample: Sample) -> LowerLinearization:
        """The derivative of g_y at (x, y), for repeated products. Cost: one gradient of g with its graph kept."""
        return LowerLinearization(self, x, y, sample)

    def _differentiable_gradient(self, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensors:
        with torch.enable_grad():
            value = scalar(self.losses.lower_value(x, y, batch, seed), "lower_loss")
            if not value.requires_grad:
                return zeros(y)
            return torch.autograd.grad(value, y, create_graph=True, allow_unused=True, materialize_grads=True)


class LowerLinearization:
    """Products with g_yy and g_xy at one point, from one first-order graph that is built once and kept.

    g is differentiated once with its graph (reverse mode); then each product is one more reverse sweep over that graph.
    On ``Batches`` the graph of every part is rebuilt for every product, so that only one is in memory.

    Attributes:
        gradient: g_y(x, y), detached.
        reaches_x: whether the last Jacobian product found a path from g_y to x.
    """

    def __init__(self, oracle: Oracle, x: Tensors, y: Tensors, sample: Sample) -> None:
        self._oracle, self._sample = oracle, sample
        self._x, self._y = leaves(x), leaves(y)
        oracle.counts.add("upper_gradient" if oracle.losses.minimax else "lower_gradient", sample)
        self._kept: Tensors | None = None
        self.reaches_x = False
        total: Tensors | None = None
        for weight, g in self._graphs():
            total = (
                detach(g)
                if sample.whole
                else scale(weight, detach(g))
                if total is None
                else axpy(weight, detach(g), total)
            )
            if sample.whole:
                self._kept = g
        assert total is not None
        self.gradient = total

    def hessian_product(self, s: Tensors) -> Tensors:
        """g_yy s. Cost: one Hessian-vector product."""
        self._oracle.counts.add("hessian_product", self._sample)
        return self._product(self._y, s, keep=True)[0]

    def jacobian_product(self, s: Tensors, keep: bool = False) -> Tensors:
        """g_xy s = grad_x <g_y, s>, s held constant.

        Args:
            s: of the shapes of y.
            keep: whether further products will be asked for; by default the graph is freed.

        Returns:
            A tuple of the shapes of x. Cost: one Jacobian-vector product.
        """
        self._oracle.counts.add("jacobian_product", self._sample)
        product, self.reaches_x = self._product(self._x, s, keep)
        if not keep:
            self._kept = None
        return product

    def _graphs(self) -> Iterator[tuple[float, Tensors]]:
        for weight, batch, seed in self._sample.parts():
            yield weight, self._oracle._differentiable_gradient(self._x, self._y, batch, seed)

    def _product(self, inputs: Tensors, s: Tensors, keep: bool) -> tuple[Tensors, bool]:
        try:
            if self._sample.whole:
                if self._kept is None:
                    raise RuntimeError("the graph of this linearization was freed by jacobian_product; pass keep=True")
                product, found = vjp(self._kept, inputs, s, keep)
                return product, any(found)
            total, anywhere = zeros(inputs), False
            for weight, g in self._graphs():
                product, found = vjp(g, inputs, s)
                total, anywhere = axpy(weight, product, total), anywhere or any(found)
            return total, anywhere
        except (RuntimeError, NotImplementedError) as error:
            raise explain(error) from error


_REMEDIES = {
    "scaled_dot_product": "run attention in its math form: with torch.nn.attention.sdpa_kernel(SDPBackend.MATH) inside the loss",
    "_efficient_attention": "run attention in its math form: with torch.nn.attention.sdpa_kernel(SDPBackend.MATH) inside the loss",
    "_flash_attention": "run attention in its math form: with torch.nn.attention.sdpa_kernel(SDPBackend.MATH) inside the loss",
    "aot_autograd": "pass the original module instead of the one that torch.compile returned",
    "_cudnn_rnn": "run the recurrent network with torch.backends.cudnn.flags(enabled=False) inside the loss",
    "is not implemented": "replace that operation by one that has a second derivative",
    "does not support double backward": "replace that operation by one that has a second derivative",
}


def explain(error: Exception) -> Exception:
    """Add the remedy to an error that says a loss is not twice differentiable; other errors are returned as they are."""
    text = str(error)
    for symptom, remedy in _REMEDIES.items():
        if symptom in text and ("derivative" in text or "backward" in text):
            return RuntimeError(f"lower_loss is not twice differentiable ({text.splitlines()[0]}); {remedy}")
    return error
