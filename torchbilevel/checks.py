"""Finding out what is wrong with a problem before a run goes wrong in silence."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchbilevel.derivatives import Oracle, reached, scalar, vjp
from torchbilevel.modules import ModulePair
from torchbilevel.samples import Sample, Samples
from torchbilevel.tensors import Tensors, detach, is_finite, leaves, norm, numel, scale, sub


def check_problem(problem: Any, pair: ModulePair, samples: Samples) -> None:
    """Evaluate and differentiate both losses at the current point; raise on the first thing that is wrong.

    Args:
        problem: a ``Problem``.
        pair: its modules.
        samples: where to evaluate; of ``Batches`` the first part.

    Raises:
        ValueError: says what is wrong; see ``Problem.check``.
    """
    for side, now, then in zip(("upper", "lower"), pair.trainable(), (pair.x, pair.y), strict=True):
        if list(now) != list(then) or any(now[name] is not then[name] for name in now):
            raise ValueError(
                f"{side} had the trainable parameters {list(then)} when the problem was made and has {list(now)} now, "
                f"or others in their place; "
                f"freeze or replace parameters first, then make the problem"
            )
    start = problem.start(problem.x)
    if start is not None and not is_finite(start):
        raise ValueError("lower_init returned entries that are not finite")
    names = ("loss", "loss") if problem.minimax else ("upper_loss", "lower_loss")
    x, y = leaves(problem.x), leaves(problem.y)
    live = {f"upper.{name}": p for name, p in pair.x.items()} | {f"lower.{name}": p for name, p in pair.y.items()}
    in_upper = _check_loss(problem.upper_value, names[0], live, x, y, samples.upper)
    in_lower = _check_loss(problem.lower_value, names[1], live, x, y, samples.lower)
    n = len(x)
    if not any(in_lower[n:]):
        raise ValueError(
            f"{names[1]} ignores the lower parameters y; use the attributes or the output of its second argument"
        )
    if not any(in_upper):
        raise ValueError("upper_loss ignores both the upper parameters x and the lower parameters y")
    for name, upper, lower in zip(pair.y, in_upper[n:], in_lower[n:], strict=True):
        if upper and not lower and start is None:
            raise ValueError(
                f"the lower parameter {name!r} is used by the upper loss and ignored by the lower loss, which "
                f"therefore has no unique minimiser; add a term such as a small L2 penalty, or freeze it"
            )
    if not problem.minimax:
        _check_second_derivatives(problem, x, y, samples.lower)


def _check_loss(
    value_of: Callable[..., Tensor], name: str, live: Mapping[str, Tensor], x: Tensors, y: Tensors, sample: Sample
) -> list[bool]:
    """Check one loss on the first part of a sample, and return which of (*x, *y) its graph reaches."""
    _, batch, seed = next(sample.parts())
    with torch.enable_grad():
        value = scalar(value_of(x, y, batch, seed), name)
        again = scalar(value_of(x, y, batch, seed), name)
    if not bool(torch.isfinite(value)):
        raise ValueError(f"{name} is {value.item()} at the current point; it must be finite")
    # Sums that a device adds in no fixed order differ in the last digits; a random number left alone, in more.
    eps = torch.finfo(value.dtype).eps
    if not torch.isclose(value, again, rtol=max(eps, min(1e3 * eps, 1e-3)), atol=0.0):
        raise ValueError(
            f"{name} is not deterministic: two evaluations of one sample under one torch seed gave {value.item()} and "
            f"{again.item()}; draw random numbers from torch's global generators, not from numpy, random or your own "
            f"generator"
        )
    for parameter, captured in zip(live, reached(value, tuple(live.values())), strict=True):
        if captured:
            raise ValueError(
                f"{name} uses a captured parameter tensor, {parameter}; inside the loss, read it from the module "
                f"(such as lower.weight) so that it can be evaluated at other values"
            )
    return reached(value, (*x, *y))


def _check_second_derivatives(problem: Any, x: Tensors, y: Tensors, sample: Sample) -> None:
    _, batch, seed = next(sample.parts())
    ones = tuple(torch.ones_like(t) for t in y)
    gradient = Oracle(problem).gradient_graph(x, y, y, batch, seed)
    products = vjp(gradient, (*y, *x), ones, keep=True)[0]
    if not is_finite(gradient, products):
        raise ValueError(
            "lower_loss has first or second derivatives that are not finite at the current point (a square root or "
            "norm at zero?)"
        )
    if _is_cut(gradient):
        raise RuntimeError(
            "lower_loss is not twice differentiable (an autograd.Function in it is marked once_differentiable, and "
            "autograd would pass over its second derivative in silence); replace that operation by one that has a "
            "second derivative"
        )
    _compare_with_differences(problem, x, y, products[: len(y)], batch, seed)


def _compare_with_differences(problem: Any, x: Tensors, y: Tensors, product: Tensors, batch: Any, seed: int) -> None:
    """Warn where g_yy times ones is far from a difference of gradients: autograd can be wrong in silence."""
    eps, oracle = max(torch.finfo(t.dtype).eps for t in y), Oracle(problem)
    step = eps ** (1 / 3) * max(1.0, float(norm(detach(y)))) / numel(y) ** 0.5
    ends = []
    for h in (step, -step):
        moved = leaves(tuple(t + h for t in y))
        ends.append(detach(oracle.gradient_graph(x, moved, moved, batch, seed)))
    difference = scale(1 / (2 * step), sub(*ends))
    error, noise = float(norm(sub(product, difference))), 100 * eps * float(norm(ends[0])) / step
    if error > 0.05 * float(norm(difference)) + 10 * eps ** (1 / 3) * float(norm(product)) + noise:
        warnings.warn(
            "a product with the second derivative of lower_loss is far from a difference of its gradients: either it "
            "is not smooth at the current point (ReLU), or some operation has wrong second derivatives in torch "
            "(parametrizations.weight_norm has in some releases): write it out in elementary operations",
            stacklevel=4,
        )


def _is_cut(tensors: Tensors) -> bool:
    """Whether a graph holds one of the nodes that raise when they are reached; products go around them."""
    stack, seen = [t.grad_fn for t in tensors], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            if node.name() == "torch::autograd::Error":
                return True
            seen.add(node)
            stack += [previous for previous, _ in node.next_functions]
    return False
