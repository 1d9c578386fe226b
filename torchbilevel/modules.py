"""Two modules as one function of their tensors: the only place where tensors are exchanged in modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchbilevel.samples import replay
from torchbilevel.tensors import Tensors

# A place is an entry of one module's own table: the module's name, and the name in the table. A module registered under
# two names is still one place, and exchanging its tensor twice would leave the first replacement behind; a tied weight
# has two places.
Place = tuple[str, str]
Buffers = dict[Place, Tensor]


class ModulePair(nn.Module):
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
        super().__init__()
        self.upper, self.lower = upper, lower
        self.x, self.y = self.trainable()
        for side, parameters in (("upper", self.x), ("lower", self.y)):
            _require_real(side, parameters)
        lower_names = {id(p): name for name, p in self.y.items()}
        for name, p in self.x.items():
            if id(p) in lower_names:
                raise ValueError(
                    f"upper.{name} and lower.{lower_names[id(p)]} are one trainable parameter; it can be upper or "
                    f"lower: freeze or copy it in one of them"
                )
        places = self._places()
        self._x_places = [places[id(p)] for p in self.x.values()]
        self._y_places = [places[id(p)] for p in self.y.values()]

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
        """
        # One walk over the modules finds everything. torch.func.functional_call would do what follows as well, at
        # several times the price, which small problems pay many times per step.
        modules = dict(self.named_modules())
        if buffers is None:
            buffers = _clone_buffers(modules)
        # Pruning, and weight and spectral normalisation by hooks, leave the weight they computed, graph and all, in a
        # plain attribute.
        hooked = [m for m in modules.values() if m._forward_pre_hooks]
        kept = [{name: t for name, t in vars(m).items() if isinstance(t, Tensor)} for m in hooked]
        before: list[tuple[dict[str, Any], str, Any]] = []

        def exchange(table: dict[str, Any], name: str, value: Tensor) -> None:
            before.append((table, name, table[name]))
            table[name] = value

        try:
            with replay(seed):
                for places, values in ((self._x_places, x), (self._y_places, y)):
                    for place, value in zip(places, values, strict=True):
                        for prefix, name in place:
                            exchange(modules[prefix]._parameters, name, value)
                for (prefix, name), value in buffers.items():
                    exchange(modules[prefix]._buffers, name, value)
                result = function(self.upper, self.lower, *arguments)
                buffers.update({(prefix, name): modules[prefix]._buffers[name] for prefix, name in buffers})
                return result
        finally:
            for table, name, value in reversed(before):
                table[name] = value
            for module, attributes in zip(hooked, kept, strict=True):
                vars(module).update(attributes)

    def clone_buffers(self) -> Buffers:
        """Copies of all buffers by place; places that share a buffer share its copy."""
        return _clone_buffers(dict(self.named_modules()))

    @torch.no_grad()
    def load_buffers(self, buffers: Buffers) -> None:
        """Copy buffers by place into the live ones."""
        for place, b in _live_buffers(dict(self.named_modules())):
            b.copy_(buffers[place])

    def _places(self) -> dict[int, list[Place]]:
        """The places of each parameter, by its id."""
        places: dict[int, list[Place]] = {}
        for prefix, module in self.named_modules():
            for name, p in module._parameters.items():
                if p is not None:
                    places.setdefault(id(p), []).append((prefix, name))
        return places


def _live_buffers(modules: Mapping[str, nn.Module]) -> Iterator[tuple[Place, Tensor]]:
    for prefix, module in modules.items():
        for name, b in module._buffers.items():
            if b is not None:
                yield (prefix, name), b


def _clone_buffers(modules: Mapping[str, nn.Module]) -> Buffers:
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
