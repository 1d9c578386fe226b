"""Derivatives of the two losses at a point on a sample, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from torchbilevel.counts import Counts
from torchbilevel.derivatives import average, differentiable_gradient, scalar, vjp
from torchbilevel.ranks import Ranks
from torchbilevel.samples import Sample
from torchbilevel.tensors import Tensors, detach, leaves


class Losses(Protocol):
    """What derivatives are taken of: the two losses as functions of tuples of tensors, batch and seed."""

    minimax: bool
    tasks: int | None
    ranks: Ranks

    def upper_value(self, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensor:
        """The upper loss f(x, y)."""

    def lower_value(self, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensor:
        """The lower loss g(x, y)."""


class Oracle:
    """Counted derivatives of a problem's losses.

    Every method takes a point (x, y) as tuples of tensors, whose graphs and ``requires_grad`` flags play no part unless
    said otherwise, and a sample. Averages over the parts of a ``Batches`` are formed here. Losses see whole tensors;
    what is of the shapes of x or y comes back spread over the ranks as x and y are.

    Args:
        losses: the problem.
    """

    def __init__(self, losses: Losses) -> None:
        self.losses = losses
        self.counts = Counts()
        self._whole = losses.ranks.whole

    def upper_value(self, x: Tensors, y: Tensors, sample: Sample) -> Tensor:
        """The upper loss f(x, y), detached. Cost: one evaluation."""
        self.counts.add("upper_value", sample)
        x, y = self._whole(x), self._whole(y)
        with torch.no_grad():
            return self.mean(sample, lambda batch, seed: (self._upper_value(x, y, batch, seed),))[0]

    def upper_gradient(self, x: Tensors, y: Tensors, sample: Sample) -> tuple[Tensor, Tensors, Tensors, bool]:
        """Value and gradients of f.

        Args:
            x: upper variables.
            y: lower variables.
            sample: where f is evaluated.

        Returns:
            f, f_x and f_y, and whether the graph of f reaches x at all. Cost: one gradient of f.
        """
        self.counts.add("upper_gradient", sample)
        return self._gradients(self._upper_value, x, y, sample)

    def lower_gradient(self, x: Tensors, y: Tensors, sample: Sample) -> tuple[Tensor, Tensors]:
        """Value of g and g_y, detached. Cost: one gradient of g."""
        self.count_lower_gradient(sample)
        xs, ys = detach(self._whole(x)), leaves(self._whole(y))

        def part(batch: Any, seed: int) -> Tensors:
            with torch.enable_grad():
                value = self._lower_value(xs, ys, batch, seed)
            return value.detach(), *vjp((value,), ys, (None,))[0]

        found = self.mean(sample, part, y)
        return found[0], found[1:]

    def full_lower_gradient(self, x: Tensors, y: Tensors, sample: Sample) -> tuple[Tensor, Tensors, Tensors, bool]:
        """Value and gradients of g.

        Args:
            x: upper variables.
            y: lower variables.
            sample: where g is evaluated.

        Returns:
            g, g_x and g_y, and whether the graph of g reaches x at all. Cost: one gradient of g.
        """
        self.count_lower_gradient(sample)
        return self._gradients(self._lower_value, x, y, sample)

    def lower_gradient_graph(self, x: Tensors, y: Tensors, sample: Sample) -> Tensors:
        """The gradient g_y with its graph.

        Args:
            x: upper variables, used as they come.
            y: lower variables, used as they come; they must require gradients.
            sample: where g is evaluated.

        Returns:
            g_y. Cost: one gradient of g; the graphs of all parts stay in memory.
        """
        self.count_lower_gradient(sample)
        ranks = self.losses.ranks
        shared = ranks.shared((*x, *y))
        xs, ys = shared[: len(x)], shared[len(x) :]
        gradient = over_parts(sample, lambda batch, seed: self.gradient_graph(xs, ys, ys, batch, seed))
        return ranks.averaged(gradient, shared, y)

    def linearize(self, x: Tensors, y: Tensors, sample: Sample, in_x: bool = False) -> LowerLinearization:
        """The derivative of g_y at (x, y), for repeated products. Cost: one gradient of g with its graph kept."""
        return LowerLinearization(self, x, y, sample, in_x)

    def hessian_product(self, x: Tensors, y: Tensors, s: Tensors, sample: Sample) -> Tensors:
        """The product g_yy s, for once: its graph is freed.

        Args:
            x: upper variables.
            y: lower variables.
            s: of the shapes of y.
            sample: where g is evaluated.

        Returns:
            A tuple of the shapes of y. Cost: one Hessian-vector product.
        """
        self.counts.add("hessian_product", sample)
        xs, ys, s = detach(self._whole(x)), leaves(self._whole(y)), self._whole(s)
        return self.mean(sample, lambda batch, seed: vjp(self.gradient_graph(xs, ys, ys, batch, seed), ys, s)[0], y)

    def jacobian_product(self, x: Tensors, y: Tensors, s: Tensors, sample: Sample) -> tuple[Tensors, bool]:
        """The product g_xy s, for once: its graph is freed.

        Args:
            x: upper variables.
            y: lower variables.
            s: of the shapes of y.
            sample: where g is evaluated.

        Returns:
            A tuple of the shapes of x, and whether a path leads from g_y to x. Cost: one Jacobian-vector product.
        """
        self.counts.add("jacobian_product", sample)
        xs, ys, s = leaves(self._whole(x)), leaves(self._whole(y)), self._whole(s)
        anywhere = False

        def part(batch: Any, seed: int) -> Tensors:
            nonlocal anywhere
            product, found = vjp(self.gradient_graph(xs, ys, ys, batch, seed), xs, s)
            anywhere = anywhere or any(found)
            return product

        product = over_parts(sample, part)
        return self.losses.ranks.average_and_any(product, anywhere, x)

    def mean(self, sample: Sample, function: Callable[[Any, int], Tensors], like: Tensors = ()) -> Tensors:
        """The average of a function of batch and seed over the parts of a sample, and over the ranks.

        Args:
            sample: for whose parts it is called.
            function: of whole tensors.
            like: the last of its results are spread over the ranks as these are.

        Returns:
            The averages.
        """
        return self.losses.ranks.average(over_parts(sample, function), like)

    def count_lower_gradient(self, sample: Sample) -> None:
        """Count one gradient of g; a minimax problem has one loss and counts all gradients under f."""
        self.counts.add("upper_gradient" if self.losses.minimax else "lower_gradient", sample)

    def gradient_graph(self, x: Tensors, y: Tensors, inputs: Tensors, batch: Any, seed: int) -> Tensors:
        """The gradient of g in ``inputs`` on one part of a sample, with its graph; not counted."""
        with torch.enable_grad():
            return differentiable_gradient(self._lower_value(x, y, batch, seed), inputs)

    def _gradients(
        self, loss: Callable[[Tensors, Tensors, Any, int], Tensor], x: Tensors, y: Tensors, sample: Sample
    ) -> tuple[Tensor, Tensors, Tensors, bool]:
        xs, ys = leaves(self._whole(x)), leaves(self._whole(y))
        in_x = False

        def part(batch: Any, seed: int) -> Tensors:
            nonlocal in_x
            with torch.enable_grad():
                value = loss(xs, ys, batch, seed)
            gradients, found = vjp((value,), xs + ys, (None,))
            in_x = in_x or any(found[: len(xs)])
            return value.detach(), *gradients

        total = over_parts(sample, part)
        total, in_x = self.losses.ranks.average_and_any(total, in_x, (*x, *y))
        return total[0], total[1 : 1 + len(xs)], total[1 + len(xs) :], in_x

    def _upper_value(self, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensor:
        return scalar(self.losses.upper_value(x, y, batch, seed), "upper_loss")

    def _lower_value(self, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensor:
        return scalar(self.losses.lower_value(x, y, batch, seed), "lower_loss")


def over_parts(sample: Sample, function: Callable[[Any, int], Tensors]) -> Tensors:
    """The average of a function of batch and seed over the parts of a sample.

    Args:
        sample: most are one batch, for which this is a plain call.
        function: of one part.

    Returns:
        What it returned, averaged.
    """
    if sample.whole:
        return function(sample.batch, sample.seed)
    return average((weight, function(batch, seed)) for weight, batch, seed in sample.parts())


class LowerLinearization:
    """Products with g_yy and g_xy at one point, from one first-order graph that is built once and kept.

    g is differentiated once with its graph (reverse mode); then each product is one more reverse sweep over that graph.
    On ``Batches`` the graph of every part is rebuilt for every product, so that only one is in memory.

    Attributes:
        gradient: g_y(x, y), detached.
        reaches_x: whether the last Jacobian product found a path from g_y to x.
    """

    def __init__(self, oracle: Oracle, x: Tensors, y: Tensors, sample: Sample, in_x: bool = False) -> None:
        self._oracle, self._ranks, self._sample, self._in_x = oracle, oracle.losses.ranks, sample, in_x
        whole = self._ranks.whole
        self._x, self._y, self._like_x, self._like_y = leaves(whole(x)), leaves(whole(y)), x, y
        oracle.count_lower_gradient(sample)
        self._kept = self._graph(sample.batch, sample.seed) if sample.whole else None
        self.gradient = self._ranks.average(self._over_parts(lambda g: detach(self._in_y(g))), self._like_y)
        self.reaches_x = False

    def hessian_product(self, s: Tensors) -> Tensors:
        """g_yy s. Cost: one Hessian-vector product."""
        self._oracle.counts.add("hessian_product", self._sample)
        return self._ranks.average(self._product(self._in_y, self._y, s, keep=True)[0], self._like_y)

    def jacobian_product(self, s: Tensors, keep: bool = False) -> Tensors:
        """g_xy s = grad_x <g_y, s>, s held constant.

        Args:
            s: of the shapes of y.
            keep: whether further products will be asked for; by default the graph is freed.

        Returns:
            A tuple of the shapes of x. Cost: one Jacobian-vector product.
        """
        self._oracle.counts.add("jacobian_product", self._sample)
        product, reached = self._product(self._in_y, self._x, s, keep)
        product, self.reaches_x = self._ranks.average_and_any(product, reached, self._like_x)
        if not keep:
            self._kept = None
        return product

    def cross_product(self, u: Tensors) -> Tensors:
        """g_yx u = grad_y <g_x, u>, the transpose of ``jacobian_product``; needs ``in_x=True`` on construction.

        Args:
            u: of the shapes of x.

        Returns:
            A tuple of the shapes of y. Cost: one Jacobian-vector product.
        """
        self._oracle.counts.add("jacobian_product", self._sample)
        return self._ranks.average(self._product(lambda g: g[: len(self._x)], self._y, u, keep=True)[0], self._like_y)

    def second_derivative(self, u: Tensors, s: Tensors) -> tuple[Tensors, Tensors]:
        """(g_xx u + g_xy s, g_yx u + g_yy s); needs ``in_x=True`` on construction.

        Args:
            u: of the shapes of x.
            s: of the shapes of y.

        Returns:
            Tuples of the shapes of x and of y. Cost: one Hessian-vector product, in (x, y) jointly.
        """
        self._oracle.counts.add("hessian_product", self._sample)
        product = self._product(lambda g: g, (*self._x, *self._y), (*u, *s), keep=True)[0]
        product = self._ranks.average(product, (*self._like_x, *self._like_y))
        return product[: len(self._x)], product[len(self._x) :]

    def _in_y(self, g: Tensors) -> Tensors:
        return g[len(self._x) :] if self._in_x else g

    def _graph(self, batch: Any, seed: int) -> Tensors:
        inputs = (*self._x, *self._y) if self._in_x else self._y
        return self._oracle.gradient_graph(self._x, self._y, inputs, batch, seed)

    def _over_parts(self, function: Callable[[Tensors], Tensors]) -> Tensors:
        """Average a function of the gradient's graph over the parts of this rank's sample."""
        if self._kept is not None:
            return function(self._kept)
        if self._sample.whole:
            raise RuntimeError("the graph of this linearization was freed by jacobian_product; pass keep=True")
        # No name here may hold on to a part's graph, or two would be in memory at a time.
        return over_parts(self._sample, lambda batch, seed: function(self._graph(batch, seed)))

    def _product(
        self, part: Callable[[Tensors], Tensors], inputs: Tensors, s: Tensors, keep: bool
    ) -> tuple[Tensors, bool]:
        s = self._ranks.whole(s)
        anywhere, loss = False, "loss" if self._oracle.losses.minimax else "lower_loss"

        def product(g: Tensors) -> Tensors:
            nonlocal anywhere
            in_inputs, found = vjp(part(g), inputs, s, keep, loss)
            anywhere = anywhere or any(found)
            return in_inputs

        total = self._over_parts(product)
        return total, anywhere
