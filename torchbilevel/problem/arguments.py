"""What users pass to problems, by parameter: projections, and the start of y."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from torchbilevel.projections import Projection
from torchbilevel.tensors import Tensors

Projections = Projection | Mapping[str, Projection] | None


def by_name(given: Projections, parameters: Mapping[str, Tensor], argument: str) -> dict[str, Projection]:
    """The projection of each parameter that has one.

    Args:
        given: the argument.
        parameters: by name.
        argument: its name, for messages.

    Returns:
        The projections by parameter name.

    Raises:
        TypeError: if a projection cannot be called.
        ValueError: if there is no parameter of a name.
    """
    if given is None:
        return {}
    by_name = dict(given) if isinstance(given, Mapping) else dict.fromkeys(parameters, given)
    for name, projection in by_name.items():
        if name not in parameters:
            raise ValueError(
                f"{argument} names {name!r}, which is no trainable parameter; there are {list(parameters)}"
            )
        if not callable(projection):
            raise TypeError(
                f"{argument} must map a Tensor to a Tensor, as projections.simplex() does, got "
                f"{type(projection).__name__}"
            )
    return by_name


def fitting(value: Any, parameters: Mapping[str, Tensor], tasks: int | None = None) -> Tensors:
    """What ``lower_init`` returned, as one tensor per lower parameter.

    Args:
        value: what it returned.
        parameters: the lower ones, by name.
        tasks: their first dimension, if ``lower`` is a ``TaskBatch``: tensors without it are the start of every task.

    Returns:
        The tensors, in the order of the parameters.

    Raises:
        ValueError: if there is not one tensor for each of them, of its shape, dtype and device.
    """
    names = list(parameters)
    if isinstance(value, Mapping):
        if set(value) != set(names):
            raise ValueError(f"lower_init returned {sorted(value)}, but the lower parameters are {sorted(names)}")
        value = [value[name] for name in names]
    value = (value,) if isinstance(value, Tensor) else value
    tensors: Tensors | None = tuple(value) if isinstance(value, Iterable) else None
    if tensors is None or not all(isinstance(t, Tensor) for t in tensors):
        raise ValueError(
            f"lower_init must return one tensor per lower parameter or a dict by name, got a {type(value).__name__}"
        )
    if tasks is not None and len(tensors) == len(names):
        pairs = zip(tensors, parameters.values(), strict=True)
        tensors = tuple(t.expand(p.shape) if t.shape == p.shape[1:] else t for t, p in pairs)
    for what, kind in (
        ("shapes", lambda t: tuple(t.shape)),
        ("dtypes", lambda t: t.dtype),
        ("devices", lambda t: t.device),
    ):
        returned, expected = [kind(t) for t in tensors], [kind(p) for p in parameters.values()]
        if returned != expected:
            raise ValueError(f"lower_init returned {what} {returned}, but {names} have {expected}")
    return tensors
