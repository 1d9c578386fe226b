"""Second derivatives of L(x, y, z) = f(x, y) - <z, g_y(x, y)>, which carry the curvature of a bilevel Phi."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from torchbilevel.derivatives import differentiable_gradient, explain, scalar, vjp
from torchbilevel.oracle import Oracle
from torchbilevel.samples import Samples
from torchbilevel.shards import whole
from torchbilevel.tensors import Tensors, axpy, detach, dot, leaves, zeros


class Lagrangian:
    """Products with the second derivatives of L in (x, y) at fixed z.

    The gradient of L is built once with its graph (third derivatives of g come in through autograd); each product is
    one reverse sweep over it. On ``Batches`` the graphs of the parts are rebuilt for every product.

    Args:
        oracle: takes and counts the derivatives.
        x: upper variables.
        y: lower variables.
        z: the adjoint.
        samples: f is evaluated on the upper one, g on the lower one.

    Attributes:
        gradient: L_x = f_x - g_xy z, the hypergradient at z.
        residual: L_y = f_y - g_yy z, zero at the exact adjoint.
    """

    def __init__(self, oracle: Oracle, x: Tensors, y: Tensors, z: Tensors, samples: Samples) -> None:
        self._oracle, self._z, self._samples = oracle, detach(whole(z)), samples
        self._x, self._y, self._like = leaves(whole(x)), leaves(whole(y)), (*x, *y)
        self._whole = samples.upper.whole and samples.lower.whole
        oracle.counts.add("upper_gradient", samples.upper)
        oracle.counts.add("lower_gradient", samples.lower)
        self._kept: list[tuple[float, Tensors]] = []
        total = zeros((*self._x, *self._y))
        for weight, gradient in self._graphs():
            total = axpy(weight, detach(gradient), total)
            if self._whole:
                self._kept.append((weight, gradient))
        total = oracle.losses.ranks.average(total, self._like)
        self.gradient, self.residual = total[: len(x)], total[len(x) :]

    def product(self, u: Tensors, s: Tensors) -> tuple[Tensors, Tensors]:
        """The pair (L_xx u + L_xy s, L_yx u + L_yy s).

        Args:
            u: of the shapes of x.
            s: of the shapes of y.

        Returns:
            Tuples of the shapes of x and of y. Cost: one reverse sweep over the gradient of L, about four gradients.
        """
        self._oracle.counts.add("lagrangian_product", self._samples.lower)
        product = self._sweep((*u, *s))
        return product[: len(u)], product[len(u) :]

    def _sweep(self, cotangents: Tensors) -> Tensors:
        inputs, cotangents = (*self._x, *self._y), whole(cotangents)
        total = zeros(inputs)
        try:
            for weight, gradient in self._kept or self._graphs():
                total = axpy(weight, vjp(gradient, inputs, cotangents, keep=self._whole)[0], total)
        except (RuntimeError, NotImplementedError) as error:
            raise explain(error) from error
        return self._oracle.losses.ranks.average(total, self._like)

    def _graphs(self) -> Iterator[tuple[float, Tensors]]:
        """Gradients of the summands of L in (x, y), with their graphs: f part by part, then -<z, g_y> part by part."""
        losses, inputs = self._oracle.losses, (*self._x, *self._y)
        for weight, batch, seed in self._samples.upper.parts():
            with torch.enable_grad():
                value = scalar(losses.upper_value(self._x, self._y, batch, seed), "upper_loss")
                gradient = differentiable_gradient(value, inputs)
            yield weight, gradient
        for weight, batch, seed in self._samples.lower.parts():
            g_y = self._oracle.gradient_graph(self._x, self._y, self._y, batch, seed)
            with torch.enable_grad():
                gradient = differentiable_gradient(-dot(self._z, g_y), inputs)
            yield weight, gradient
