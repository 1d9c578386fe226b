"""Finding out what is wrong with a problem, before a run or a copy goes wrong in silence."""

from __future__ import annotations

import functools
import inspect
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchbilevel.derivatives import Oracle, explain, reached, scalar
from torchbilevel.samples import Sample, Samples
from torchbilevel.tensors import Tensors, is_finite, leaves


def check_problem(problem: Any, samples: Samples) -> None:
    """Evaluate and differentiate both losses at the current point; raise on the first thing that is wrong.

    Args:
        problem: a ``Problem``.
        samples: where to evaluate.
    """
    names = ("loss", "loss") if problem.minimax else ("upper_loss", "lower_loss")
    x, y = leaves(problem.x), leaves(problem.y)
    in_upper = _check_loss(problem.upper_value, names[0], problem, x, y, samples.upper)
    in_lower = _check_loss(problem.lower_value, names[1], problem, x, y, samples.lower)
    n = len(x)
    if not any(in_lower[n:]):
        raise ValueError(
            f"{names[1]} ignores the lower parameters y; use the attributes or the output of its second argument"
        )
    if not any(in_upper):
        raise ValueError("upper_loss ignores both the upper parameters x and the lower parameters y")
    if not any(in_upper[:n]) and not any(in_lower[:n]):
        raise ValueError(
            "neither loss depends on the upper parameters x, so every hypergradient is zero; "
            "are they detached, or read through .data, .item() or torch.no_grad()?"
        )
    for i, (upper, lower) in enumerate(zip(in_upper[n:], in_lower[n:], strict=True)):
        if upper and not lower:
            raise ValueError(
                f"lower parameter number {i} (shape {tuple(y[i].shape)}) is used by the upper loss and ignored by the lower "
                f"loss, which therefore has no unique minimiser; add a term such as a small L2 penalty, or freeze it"
            )
    if not problem.minimax:
        _check_second_derivatives(problem, x, y, samples.lower)


def _check_loss(
    value_of: Callable[..., Tensor], name: str, problem: Any, x: Tensors, y: Tensors, sample: Sample
) -> list[bool]:
    """Check one loss on the first part of a sample, and return which of (*x, *y) its graph reaches."""
    _, batch, seed = next(sample.parts())
    with torch.enable_grad():
        value = scalar(value_of(x, y, batch, seed), name)
    again = scalar(value_of(x, y, batch, seed), name).detach()
    if not bool(torch.isfinite(value)):
        raise ValueError(f"{name} is {value.item()} at the current point; it must be finite")
    if not torch.isclose(value.detach(), again, rtol=1e4 * torch.finfo(value.dtype).eps, atol=0.0):
        raise ValueError(
            f"{name} is not deterministic: two evaluations of one sample under one torch seed gave {value.item()} and "
            f"{again.item()}; draw random numbers from torch's global generators, not from numpy or random"
        )
    live = (*problem.upper_parameters, *problem.lower_parameters)
    for captured, p in zip(reached(value, live), live, strict=True):
        if captured:
            raise ValueError(
                f"{name} uses a captured parameter tensor of shape {tuple(p.shape)}; inside the loss, read it from the module "
                f"(such as lower.weight) so that it can be evaluated at other values"
            )
    return reached(value, (*x, *y))


def _check_second_derivatives(problem: Any, x: Tensors, y: Tensors, sample: Sample) -> None:
    _, batch, seed = next(sample.parts())
    try:
        graph = Oracle(problem).linearize(x, y, Sample(batch, seed))
        ones = tuple(torch.ones_like(t) for t in y)
        products = (graph.hessian_product(ones), graph.jacobian_product(ones))
    except (RuntimeError, NotImplementedError) as error:
        raise explain(error) from error
    if not is_finite(*products):
        raise ValueError(
            "lower_loss has second derivatives that are not finite at the current point (a square root or norm at zero?)"
        )


def refuse_captured_modules(functions: Mapping[str, Callable[..., Any]], modules: Mapping[str, nn.Module]) -> None:
    """Refuse to copy a problem whose losses hold on to the modules that are copied.

    Args:
        functions: the user's functions by name.
        modules: ``upper`` and ``lower``.

    Raises:
        ValueError: if a function closes over, or reads from its globals, one of the modules or their parameters.
    """
    owned: dict[int, str] = {}
    for side, module in modules.items():
        for name, part in (*module.named_modules(), *module.named_parameters(), *module.named_buffers()):
            owned[id(part)] = f"{side}.{name}".rstrip(".")
    for name, function in functions.items():
        for variable, value in _captured(function):
            for entry in (
                value,
                *(value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()),
            ):
                if id(entry) in owned:
                    raise ValueError(
                        f"{name} captures {variable!r}, which is {owned[id(entry)]} of the copied problem; the copy would go on using "
                        f"the original: take modules from the arguments (upper, lower) of the loss"
                    )


def _captured(function: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(function, functools.partial):
        yield from ((str(i), a) for i, a in enumerate(function.args))
        yield from function.keywords.items()
        yield from _captured(function.func)
    elif inspect.isfunction(function):
        variables = inspect.getclosurevars(function)
        yield from variables.nonlocals.items()
        yield from variables.globals.items()


def refuse_unpicklable(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Say what pickle would say less clearly.

    Args:
        functions: the user's functions by name.

    Raises:
        PicklingError: if a function is a lambda or was defined inside another function.
    """
    for name, function in functions.items():
        qualified = getattr(function, "__qualname__", "")
        if "<lambda>" in qualified or "<locals>" in qualified:
            raise pickle.PicklingError(
                f"{name} is {qualified}, which cannot be imported by name; pickling a problem needs losses defined at the top level of "
                f"a module (or save method.state_dict() instead)"
            )
