"""Two modules as one function of their tensors: the only caller of ``functional_call``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from torchbilevel.samples import replay
from torchbilevel.tensors import Tensors


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
        tensors: dict[str, Tensor] | None = None,
    ) -> Any:
        """``function(upper, lower, *arguments)`` with x and y in place of the parameters; the modules stay as they are.

        Args:
            function: the user's.
            arguments: its further arguments.
            x: in place of the trainable parameters of ``upper``.
            y: in place of the trainable parameters of ``lower``.
            seed: of the random numbers drawn inside; the global random state is put back.
            tensors: what ``clone_buffers`` returned, to be updated by the call; a new copy by default.

        Returns:
            What the function returned, with its graph.
        """
        if tensors is None:
            tensors = self.clone_buffers()
        for places, values in ((self._x_places, x), (self._y_places, y)):
            for names, value in zip(places, values, strict=True):
                tensors.update(dict.fromkeys(names, value))
        with replay(seed):
            return functional_call(self, tensors, (function, *arguments), tie_weights=False)

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(upper, lower, *arguments)``; see ``call``."""
        # Pruning, and weight and spectral normalisation by hooks, leave the weight they computed, graph and all, in a
        # plain attribute.
        hooked = [m for m in self.modules() if m._forward_pre_hooks]
        kept = [{name: t for name, t in vars(m).items() if isinstance(t, Tensor)} for m in hooked]
        try:
            return function(self.upper, self.lower, *arguments)
        finally:
            for module, attributes in zip(hooked, kept, strict=True):
                vars(module).update(attributes)

    def clone_buffers(self) -> dict[str, Tensor]:
        """Copies of all buffers by place; places that share a buffer share its copy."""
        copies: dict[int, Tensor] = {}
        return {name: copies.setdefault(id(b), b.detach().clone()) for name, b in self._buffer_places()}

    @torch.no_grad()
    def load_buffers(self, tensors: dict[str, Tensor]) -> None:
        """Copy tensors by place into the live buffers."""
        for name, b in self._buffer_places():
            b.copy_(tensors[name])

    # A place is an entry of one module's own table. A module registered under two names is still one place, and
    # exchanging its tensor twice would leave the first replacement behind; a tied weight has two places.

    def _places(self) -> dict[int, list[str]]:
        """The names of the places of each parameter, by its id."""
        places: dict[int, list[str]] = {}
        for prefix, module in self.named_modules():
            for name, p in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
                places.setdefault(id(p), []).append(name)
        return places

    def _buffer_places(self) -> Iterator[tuple[str, Tensor]]:
        for prefix, module in self.named_modules():
            yield from module.named_buffers(prefix, recurse=False, remove_duplicate=False)


def _require_real(side: str, parameters: dict[str, nn.Parameter]) -> None:
    if not parameters:
        raise ValueError(f"{side} has no trainable parameter; give it one with requires_grad=True")
    for name, p in parameters.items():
        if is_lazy(p):
            raise ValueError(f"{side}.{name} has no shape yet; run a lazy module once before making the problem")
        if p.is_complex():
            raise ValueError(f"{side}.{name} is complex; keep real parameters and use torch.view_as_complex")
