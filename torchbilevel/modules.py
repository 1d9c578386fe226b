"""Two modules as one function of their tensors: the only place where tensors are exchanged in modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchbilevel.samples import replay
from torchbilevel.tensors import Tensors

# A place is an entry of one module's own table. A module registered under two names is still one place, and exchanging
# its tensor twice would leave the first replacement behind; a tied weight has two places.
Place = tuple[nn.Module, str]
Buffers = dict[Place, Tensor]


class ModulePair:
    """The upper and the lower module under one roof, so that one call exchanges the tensors of both.

    Tensors are put into the live modules for the duration of a call, so attributes (``upper.log_l2.exp()``), closures
    over the modules, tied weights and parametrizations all see them.

    Args:
        upper: holds x.
        lower: holds y.

    Attributes:
        x: the trainable parameters of ``upper`` by name.
        y: the trainable parameters of ``lower`` by name.

    Raises:
        ValueError: if a module has no trainable parameter, a complex or an uninitialised one, or both share one.
    """

    def __init__(self, upper: nn.Module, lower: nn.Module) -> None:
        self.upper, self.lower = upper, lower
        self.x, self.y = self.trainable()
        for side, parameters in self._sides():
            _require_real(side, parameters)
        lower_names = {id(p): name for name, p in self.y.items()}
        for name, p in self.x.items():
            if id(p) in lower_names:
                raise ValueError(
                    f"upper.{name} and lower.{lower_names[id(p)]} are one trainable parameter; it can be upper or "
                    f"lower: freeze or copy it in one of them"
                )
        self._places = self._count_places()
        self._held = self._places.total()

    def trainable(self) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """The parameters of ``upper`` and of ``lower`` that require gradients now, by name."""
        upper, lower = (
            {name: p for name, p in side.named_parameters() if p.requires_grad} for side in (self.upper, self.lower)
        )
        return upper, lower

    def call(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        x: Tensors,
        y: Tensors,
        seed: int,
        buffers: Buffers | None = None,
    ) -> Any:
        """``function(upper, lower, *arguments)`` with x and y in place of the parameters; the modules stay as they are.

        Args:
            function: the user's.
            arguments: its further arguments.
            x: in place of the trainable parameters of ``upper``.
            y: in place of the trainable parameters of ``lower``.
            seed: of the random numbers drawn inside; the global random state is put back.
            buffers: what ``clone_buffers`` returned, to be updated by the call; a new copy by default.

        Returns:
            What the function returned, with its graph.

        Raises:
            RuntimeError: if a parameter was replaced or removed since the pair was made.
        """
        # torch.func.functional_call would do what follows as well, at several times the price, which small problems pay
        # many times per step. Nothing is remembered from one call to the next, so modules may be cast, hooked and
        # extended in between.
        values = dict(zip(map(id, self.x.values()), x, strict=True))
        values.update(zip(map(id, self.y.values()), y, strict=True))
        modules = self._walk()
        held: list[tuple[dict[str, Any], str, Any]] = [
            (m._parameters, name, p) for m in modules for name, p in m._parameters.items() if id(p) in values
        ]
        if len(held) < self._held:
            raise RuntimeError(self._disconnected())
        # Buffers are copied whatever happens to them inside: the version counter, which could tell, misses what batch
        # normalisation does, and all that goes through .data.
        if buffers is None:
            buffers = _clone_buffers(modules)
        kept: list[tuple[dict[str, Any], str, Any]] = [(m._buffers, name, m._buffers[name]) for m, name in buffers]
        # Pruning, and weight and spectral normalisation by hooks, leave the weight they computed, graph and all, in a
        # plain attribute.
        kept += [(vars(m), name, t) for m in modules if m._forward_pre_hooks for name, t in _attributes(m)]
        try:
            with replay(seed):
                for parameters, name, p in held:
                    parameters[name] = values[id(p)]
                for (module, name), value in buffers.items():
                    module._buffers[name] = value
                result = function(self.upper, self.lower, *arguments)
                for module, name in buffers:
                    buffers[module, name] = module._buffers[name]  # type: ignore[assignment]
                return result
        finally:
            for table, name, t in (*held, *kept):
                table[name] = t

    def clone_buffers(self) -> Buffers:
        """Copies of all buffers by place; places that share a buffer share its copy."""
        return _clone_buffers(self._walk())

    @torch.no_grad()
    def load_buffers(self, buffers: Buffers) -> None:
        """Copy buffers by place into the live ones."""
        for place, b in _live_buffers(self._walk()):
            b.copy_(buffers[place])

    def _walk(self) -> list[nn.Module]:
        """All modules, each once: ``modules()`` in a fraction of its time."""
        found = [self.upper, self.lower]
        seen = set(found)
        for module in found:
            for child in module._modules.values():
                if child is not None and child not in seen:
                    seen.add(child)
                    found.append(child)
        return found

    def _count_places(self) -> Counter[str]:
        """The number of places of each parameter of x and y."""
        names = {id(p): f"{side}.{name}" for side, by_name in self._sides() for name, p in by_name.items()}
        held = (id(p) for module in self._walk() for p in module._parameters.values())
        return Counter(names[key] for key in held if key in names)

    def _sides(self) -> tuple[tuple[str, dict[str, nn.Parameter]], ...]:
        return ("upper", self.x), ("lower", self.y)

    def _disconnected(self) -> str:
        lost = ", ".join(self._places - self._count_places())
        return (
            f"{lost}: replaced in the module (or removed from it) after the problem was made, which would go on with "
            f"the old one; make the problem last, or write new numbers into the parameter: with torch.no_grad(): "
            f"parameter.copy_(...)"
        )


def _live_buffers(modules: list[nn.Module]) -> Iterator[tuple[Place, Tensor]]:
    for module in modules:
        for name, b in module._buffers.items():
            if b is not None:
                yield (module, name), b


def _attributes(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, t) for name, t in vars(module).items() if isinstance(t, Tensor)]


def _clone_buffers(modules: list[nn.Module]) -> Buffers:
    if not any([m._buffers for m in modules]):  # most modules of small problems have none
        return {}
    copies: dict[int, Tensor] = {}
    return {place: copies.setdefault(id(b), b.detach().clone()) for place, b in _live_buffers(modules)}


def _require_real(side: str, parameters: dict[str, nn.Parameter]) -> None:
    if not parameters:
        raise ValueError(f"{side} has no trainable parameter; give it one with requires_grad=True")
    for name, p in parameters.items():
        if is_lazy(p):
            raise ValueError(f"{side}.{name} has no shape yet; run a lazy module once before making the problem")
        if p.is_complex():
            raise ValueError(f"{side}.{name} is complex; keep real parameters and use torch.view_as_complex")
