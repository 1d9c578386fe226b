"""Copying and pickling a problem: refusing, in words, what would go on using the original or could not be loaded."""

from __future__ import annotations

import dis
import functools
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn


def refuse_captured_modules(functions: Mapping[str, Callable[..., Any]], modules: Mapping[str, nn.Module]) -> None:
    """Refuse to copy a problem whose functions hold on to the modules that are copied.

    ``deepcopy`` copies what a callable object, a bound method or a partial holds, but not what a plain function reads
    from its closure, its defaults and its globals. Those are searched, containers and attributes of objects included.

    Args:
        functions: the user's functions by name.
        modules: ``upper`` and ``lower``.

    Raises:
        ValueError: if a function captures one of the modules, a part of it, or something that holds one.
    """
    owned: dict[int, str] = {}
    for side, module in modules.items():
        for name, part in (*module.named_modules(), *module.named_parameters(), *module.named_buffers()):
            owned[id(part)] = f"{side}.{name}".rstrip(".")
    for name, function in functions.items():
        for variable, value in _captured(function):
            found = _find(value, owned)
            if found is not None:
                raise ValueError(
                    f"{name} captures {variable!r}, which is or holds {found} of the copied problem; the copy would "
                    f"go on using the original: take modules from the arguments (upper, lower) of the loss"
                )


def refuse_unpicklable(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Say what pickle would say less clearly.

    Args:
        functions: the user's functions by name.

    Raises:
        PicklingError: if a function is a lambda or was defined inside another function.
    """
    for name, function in functions.items():
        function = _innermost(function)
        qualified = getattr(function, "__qualname__", type(function).__qualname__)
        if "<lambda>" in qualified or "<locals>" in qualified:
            raise pickle.PicklingError(
                f"{name} is {qualified}, which cannot be imported by name; pickling a problem needs functions defined "
                f"at the top level of a module (or save method.state_dict() instead)"
            )


def _innermost(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _captured(function: Any) -> Iterator[tuple[str, Any]]:
    """The (variable, value) pairs that a plain function reads from outside its arguments."""
    function = _innermost(function)
    function = getattr(function, "__func__", function)
    if not isinstance(function, FunctionType):
        return
    for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield variable, cell.cell_contents
        except ValueError:  # a variable that is assigned only later
            continue
    yield from (("a default argument", default) for default in function.__defaults__ or ())
    yield from (function.__kwdefaults__ or {}).items()
    for variable in sorted(_global_names(function.__code__)):
        if variable in function.__globals__:
            yield variable, function.__globals__[variable]


def _global_names(code: CodeType) -> set[str]:
    """Names that the code, or a function nested in it, loads from its globals; attribute names are not among them."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(_global_names(c) for c in code.co_consts if isinstance(c, CodeType)))


def _find(value: Any, owned: Mapping[int, str]) -> str | None:
    """What of the owned objects a value is or holds; classes and imported modules are not entered."""
    stack, seen = [value], set()
    while stack:
        value = stack.pop()
        if id(value) in owned:
            return owned[id(value)]
        if id(value) not in seen:
            seen.add(id(value))
            stack += _parts(value)
    return None


def _parts(value: Any) -> list[Any]:
    if isinstance(value, type | ModuleType | Tensor | str | bytes | int | float):
        return []
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, FunctionType):
        # Libraries do not know the user's modules, and their functions lead everywhere.
        library = (value.__module__ or "").split(".")[0] in _LIBRARIES
        return [] if library else [part for _, part in _captured(value)]
    return list(vars(value).values()) if hasattr(value, "__dict__") else []


_LIBRARIES = {"torch", "torchbilevel", "torchvision", "numpy", "scipy", "sklearn", *sys.stdlib_module_names}
