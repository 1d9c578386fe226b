"""Derivatives of graphs: the only caller of ``torch.autograd.grad``, and of the engine below it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchbilevel.tensors import Tensors, axpy, scale, zeros

# It is private, so that a torch to come may lack it.
_engine = getattr(torch.autograd.graph, "_engine_run_backward", None)


def vjp(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    keep: bool = False,
    loss: str = "a loss",
) -> tuple[Tensors, tuple[bool, ...]]:
    """The product cotangents' d outputs / d inputs.

    Args:
        outputs: tensors, some of which may be constants without a graph.
        inputs: tensors that require gradients.
        cotangents: one per output, of its shape; ``None`` for a scalar stands for 1.
        keep: whether the graph is kept for further products.
        loss: whose derivatives these are, for messages.

    Returns:
        One tensor per input, without graph, zeros where an input is not reached; and which inputs are reached.

    Raises:
        RuntimeError: if an operation on the way has no further derivative; the message carries the remedy.
    """
    if not all([o.requires_grad for o in outputs]):
        alive = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        outputs, cotangents = [o for o, _ in alive], [c for _, c in alive]
    if not outputs or not inputs:
        return zeros(inputs), (False,) * len(inputs)
    try:
        products = _sweep(outputs, inputs, cotangents, keep, graph=False)
    except (RuntimeError, NotImplementedError) as error:
        explained = explain(error, loss)
        if explained is error:
            raise
        raise explained from error
    return _dense(products, inputs, loss), tuple([p is not None for p in products])


def reached(value: Tensor, inputs: Sequence[Tensor]) -> list[bool]:
    """Which inputs the graph of a scalar reaches; the graph is kept."""
    if not value.requires_grad:
        return [False] * len(inputs)
    return [g is not None for g in torch.autograd.grad(value, list(inputs), retain_graph=True, allow_unused=True)]


def differentiable_gradient(value: Tensor, inputs: Sequence[Tensor]) -> Tensors:
    """The gradient of a scalar with its graph; zeros where an input is not reached."""
    if not value.requires_grad:
        return zeros(inputs)
    return _dense(_sweep((value,), inputs, (None,), keep=True, graph=True), inputs, "a loss", graph=True)


def _sweep(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor | None], keep: bool, graph: bool
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad`` less its look at the arguments, which takes a third of the time of a small product."""
    seeds = tuple([torch.ones_like(o) if c is None else c for o, c in zip(outputs, cotangents, strict=True)])
    if _engine is None or any([c.shape != o.shape for o, c in zip(outputs, seeds, strict=True)]):
        # Which also says what is wrong with a shape.
        return torch.autograd.grad(outputs, inputs, cotangents, keep, graph, allow_unused=True)
    products: tuple[Tensor | None, ...] = _engine(
        tuple(outputs), seeds, keep, graph, tuple(inputs), True, accumulate_grad=False
    )
    return products


def _dense(products: Sequence[Tensor | None], inputs: Sequence[Tensor], loss: str, graph: bool = False) -> Tensors:
    """The products, zeros where an input is not reached; a sparse one is refused."""
    for p in products:
        if p is not None and p.layout is not torch.strided:
            raise ValueError(
                f"derivatives of {loss} must be dense, got a sparse one of a parameter of shape {tuple(p.shape)}: give "
                "nn.Embedding sparse=False"
            )
    return tuple(
        [torch.zeros_like(t, requires_grad=graph) if p is None else p for p, t in zip(products, inputs, strict=True)]
    )


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
    return value if value.dim() == 0 else value.reshape(())


def average(terms: Iterable[tuple[float, Tensors]]) -> Tensors:
    """The sum of weighted terms, of which there is at least one; a term of weight 1 that comes first is not copied."""
    total: Tensors = ()
    for weight, t in terms:
        total = axpy(weight, t, total) if total else t if weight == 1.0 else scale(weight, t)
    return total


_ATTENTION = "run attention in its math form: with torch.nn.attention.sdpa_kernel(SDPBackend.MATH) inside the loss"
_REMEDIES = {
    "scaled_dot_product": _ATTENTION,
    "_efficient_attention": _ATTENTION,
    "_flash_attention": _ATTENTION,
    "aot_autograd": "pass the original module instead of the one that torch.compile returned",
    "_cudnn_rnn": "run the recurrent network with torch.backends.cudnn.flags(enabled=False) inside the loss",
    "is not implemented": "replace that operation by one that has a second derivative",
    "does not support double backward": "replace that operation by one that has a second derivative",
}


def explain(error: Exception, loss: str = "a loss") -> Exception:
    """Add the remedy to an error that says a loss is not twice differentiable; return other errors as they are."""
    text = str(error)
    if "is not twice differentiable (" in text:
        return error
    for symptom, remedy in _REMEDIES.items():
        if symptom in text and ("derivative" in text or "backward" in text):
            return RuntimeError(f"{loss} is not twice differentiable ({text.splitlines()[0]}); {remedy}")
    return error
