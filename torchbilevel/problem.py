"""Problems: two modules and their losses, seen from below as functions of tuples of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torchbilevel.checks import check_problem, refuse_captured_modules, refuse_unpicklable
from torchbilevel.projections import Projection
from torchbilevel.samples import Samples, draw
from torchbilevel.tensors import Tensors, detach, mix_seed

Loss = Callable[[nn.Module, nn.Module, Any], Tensor]


class _Pair(nn.Module):
    """Both modules under one roof, so that one functional call swaps the tensors of both."""

    def __init__(self, upper: nn.Module, lower: nn.Module) -> None:
        super().__init__()
        self.upper, self.lower = upper, lower

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.upper, self.lower, *arguments)


class Problem:
    """What bilevel and minimax problems share: swapping tensors into modules, seeds, buffers, projections.

    A loss is evaluated at any (x, y) by putting the tensors into the live modules for the duration of the call, so
    attributes (``upper.log_l2.exp()``), closures over the modules, tied weights and parametrizations all see them. Random
    numbers are replayed from the sample's seed and the global random state is put back; buffers are cloned, so no
    evaluation changes them.

    Attributes:
        upper: the module whose trainable parameters are x.
        lower: the module whose trainable parameters are y.
        minimax: whether g = -f.
    """

    minimax = False

    def __init__(
        self,
        upper: nn.Module,
        lower: nn.Module,
        losses: Mapping[str, Loss],
        projection: Projection | Mapping[str, Projection] | None,
        upper_projection: Projection | Mapping[str, Projection] | None,
    ) -> None:
        for name, module in (("upper", upper), ("lower", lower)):
            if not isinstance(module, nn.Module):
                raise TypeError(
                    f"{name} must be an nn.Module, got {type(module).__name__}; wrap tensors as nn.Parameters of a module"
                )
            if not any(p.requires_grad for p in module.parameters()):
                raise ValueError(f"{name} has no trainable parameter; give it one with requires_grad=True")
        for name, loss in losses.items():
            if not callable(loss):
                raise TypeError(f"{name} must be a callable loss(upper, lower, batch), got {type(loss).__name__}")
        self.upper, self.lower = upper, lower
        self._losses = dict(losses)
        self._pair = _Pair(upper, lower)
        self._names = {
            side: [(f"{side}.{name}", p) for name, p in module.named_parameters() if p.requires_grad]
            for side, module in (("upper", upper), ("lower", lower))
        }
        shared = {id(p) for _, p in self._names["upper"]} & {id(p) for _, p in self._names["lower"]}
        for name, p in self._names["upper"]:
            if p.is_complex():
                raise ValueError(f"{name} is complex; use torch.view_as_real and keep real parameters")
            if id(p) in shared:
                twin = next(other for other, q in self._names["lower"] if q is p)
                raise ValueError(
                    f"{name} and {twin} are one trainable parameter; it can be upper or lower: freeze or copy it in one of them"
                )
        self._projections = {
            "lower": self._resolve(projection, "lower"),
            "upper": self._resolve(upper_projection, "upper"),
        }
        self._aliases = self._find_aliases()

    # --- the point -----------------------------------------------------------------------------------------------------

    @property
    def x(self) -> Tensors:
        """The upper variables: the trainable parameters of ``upper``, detached, sharing storage."""
        return detach(self.upper_parameters)

    @property
    def y(self) -> Tensors:
        """The lower variables: the trainable parameters of ``lower``, detached, sharing storage."""
        return detach(self.lower_parameters)

    @property
    def upper_parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters behind ``x``."""
        return tuple(p for _, p in self._names["upper"])

    @property
    def lower_parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters behind ``y``."""
        return tuple(p for _, p in self._names["lower"])

    def set_y(self, y: Tensors) -> None:
        """Copy ``y`` into the lower module."""
        with torch.no_grad():
            for p, t in zip(self.lower_parameters, y, strict=True):
                p.copy_(t)

    def project_y(self, y: Tensors) -> Tensors:
        """The projection of y on its set; y itself where there is none."""
        return self._project("lower", y)

    def project_x(self, x: Tensors) -> Tensors:
        """The projection of x on its set; x itself where there is none."""
        return self._project("upper", x)

    @property
    def constrains_y(self) -> bool:
        """Whether y has a projection."""
        return bool(self._projections["lower"])

    @property
    def constrains_x(self) -> bool:
        """Whether x has a projection."""
        return bool(self._projections["upper"])

    # --- evaluations ---------------------------------------------------------------------------------------------------

    def upper_value(self, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensor:
        """The upper loss f(x, y) on a batch, under a seed."""
        raise NotImplementedError

    def lower_value(self, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensor:
        """The lower loss g(x, y) on a batch, under a seed."""
        raise NotImplementedError

    def call_upper(self, function: Callable[[nn.Module], Any], x: Tensors) -> Any:
        """``function(upper)`` with x in place of the upper parameters."""
        return self._call(lambda upper, lower: function(upper), (), x, self.y, 0)

    def start(self, x: Tensors) -> Tensors | None:
        """The starting point of y at x, with its graph; ``None`` where the problem does not define one."""
        return None

    def commit_buffers(self, x: Tensors, y: Tensors, samples: Samples) -> None:
        """Update the live buffers (running statistics, ...) as one evaluation of both losses at (x, y) does.

        Cost: one evaluation of each loss where a module has buffers and is in training mode; nothing otherwise.
        """
        live = dict(self._pair.named_buffers())
        if not live or not any(m.training for module in (self.upper, self.lower) for m in module.modules()):
            return
        buffers = self._clone_buffers()
        with torch.no_grad():
            for loss, sample in zip(self._losses.values(), (samples.upper, samples.lower), strict=False):
                for _, batch, seed in sample.parts():
                    self._call(loss, (batch,), x, y, seed, buffers)
            for name, b in live.items():
                b.copy_(buffers[name])

    # --- the user's side -------------------------------------------------------------------------------------------------

    def sample(self, batch: Any, lower: Any, upper: Any, seed: int) -> Samples:
        """Turn what ``backward`` was given into samples; see the subclasses."""
        raise NotImplementedError

    def check(self, batch: Any = None, *, lower: Any = None, upper: Any = None) -> None:
        """Try the problem on data and say what is wrong with it, if anything.

        Each loss is evaluated and differentiated at the current point. Nothing is changed.

        Args:
            batch: minimax: a batch (or source).
            lower: bilevel: a batch (or source) for the lower loss.
            upper: bilevel: a batch (or source) for the upper loss.

        Raises:
            ValueError: if a loss is not scalar, not finite or not deterministic once its seed is replayed; if the lower
                loss ignores y, the upper loss ignores both x and y, or neither loss depends on x; if a loss uses a
                captured parameter tensor instead of the module's attribute.
            RuntimeError: if the lower loss is not twice differentiable; the message carries the remedy.

        Cost: a handful of evaluations, three gradients and two products.
        """
        check_problem(self, self.sample(batch, lower, upper, seed=mix_seed(0, 0)))

    # --- copies ----------------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> Problem:
        refuse_captured_modules({**self._losses, **self._callables()}, {"upper": self.upper, "lower": self.lower})
        from copy import deepcopy

        copy = object.__new__(type(self))
        memo[id(self)] = copy
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        return copy

    def __getstate__(self) -> dict[str, Any]:
        refuse_unpicklable({**self._losses, **self._callables()})
        return self.__dict__

    def _callables(self) -> dict[str, Callable[..., Any]]:
        """User functions besides the losses."""
        return {}

    # --- inside ------------------------------------------------------------------------------------------------------------

    def _call(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        x: Tensors,
        y: Tensors,
        seed: int,
        buffers: dict[str, Tensor] | None = None,
    ) -> Any:
        tensors: dict[str, Tensor] = {}
        for side, values in (("upper", x), ("lower", y)):
            for (name, _), value in zip(self._names[side], values, strict=True):
                for alias in self._aliases[name]:
                    tensors[alias] = value
        if buffers is None:
            buffers = self._clone_buffers()
        with _replay(seed, {t.device for t in (*x, *y) if t.is_cuda}):
            return functional_call(self._pair, {**tensors, **buffers}, (function, *arguments), tie_weights=False)

    def _clone_buffers(self) -> dict[str, Tensor]:
        """Copies of all buffers under all their names; names that share a buffer share its copy."""
        copies: dict[int, Tensor] = {}
        return {
            name: copies.setdefault(id(b), b.detach().clone())
            for name, b in self._pair.named_buffers(remove_duplicate=False)
        }

    def _find_aliases(self) -> dict[str, list[str]]:
        """All names under which each trainable parameter is reachable (tied weights have several)."""
        everywhere: dict[int, list[str]] = {}
        for name, p in self._pair.named_parameters(remove_duplicate=False):
            everywhere.setdefault(id(p), []).append(name)
        return {name: everywhere[id(p)] for side in self._names.values() for name, p in side}

    def _resolve(self, projection: Projection | Mapping[str, Projection] | None, side: str) -> dict[int, Projection]:
        if projection is None:
            return {}
        names = [name.removeprefix(f"{side}.") for name, _ in self._names[side]]
        if not isinstance(projection, Mapping):
            return dict.fromkeys(range(len(names)), projection)
        for name in projection:
            if name not in names:
                raise ValueError(
                    f"projection names {name!r}, which is no trainable parameter of {side}; there are {names}"
                )
        return {i: projection[name] for i, name in enumerate(names) if name in projection}

    def _project(self, side: str, values: Tensors) -> Tensors:
        projections = self._projections[side]
        return (
            tuple(projections[i](t) if i in projections else t for i, t in enumerate(values)) if projections else values
        )


class BilevelProblem(Problem):
    """min over x of f(x, y*(x)) with y*(x) = argmin over y of g(x, y).

    x are the trainable parameters of ``upper``, y those of ``lower``; both losses are called as ``loss(upper, lower, batch)``
    and return a scalar. g must be strongly convex in y near y*(x) for implicit hypergradients to mean what they say.

    Args:
        upper: module that holds x.
        lower: module that holds y.
        upper_loss: f.
        lower_loss: g, twice differentiable.
        lower_init: a function of the upper module that returns where y starts when it is not warm: one tensor per
            trainable parameter of ``lower``, in their order, or a dict by name. ``Unrolled`` differentiates it.
        upper_projection: projection of x on its set, applied after every outer step: one Tensor -> Tensor map for all
            parameters, or a dict by parameter name.
        projection: refused; y of a bilevel problem is free.

    Raises:
        TypeError: if a module or loss is of the wrong kind.
        ValueError: if a module has no trainable parameter, or both share one; if ``projection`` is given.

    Example:
        >>> class Shift(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.value = torch.nn.Parameter(torch.zeros(2))
        >>> problem = BilevelProblem(
        ...     upper=Shift(), lower=Shift(),
        ...     lower_loss=lambda upper, lower, batch: (lower.value - upper.value).square().sum(),
        ...     upper_loss=lambda upper, lower, batch: (lower.value - batch).square().sum())
        >>> problem.check(upper=torch.ones(2))
    """

    def __init__(
        self,
        upper: nn.Module,
        lower: nn.Module,
        upper_loss: Loss,
        lower_loss: Loss,
        lower_init: Callable[[nn.Module], Any] | None = None,
        upper_projection: Projection | Mapping[str, Projection] | None = None,
        projection: None = None,
    ) -> None:
        if projection is not None:
            raise ValueError(
                "projection= constrains y, and a bilevel problem cannot have it: the implicit formula is wrong at an active bound; "
                "write y as a function of free parameters (softplus, softmax, ...), or state the problem as a MinimaxProblem"
            )
        if lower_init is not None and not callable(lower_init):
            raise TypeError(f"lower_init must be a function of the upper module, got {type(lower_init).__name__}")
        super().__init__(upper, lower, {"upper_loss": upper_loss, "lower_loss": lower_loss}, None, upper_projection)
        self.lower_init = lower_init

    def upper_value(self, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensor:
        """The upper loss f(x, y) on a batch, under a seed."""
        return self._call(self._losses["upper_loss"], (batch,), x, y, seed)

    def lower_value(self, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensor:
        """The lower loss g(x, y) on a batch, under a seed."""
        return self._call(self._losses["lower_loss"], (batch,), x, y, seed)

    def start(self, x: Tensors) -> Tensors | None:
        """The starting point ``lower_init(upper)`` of y at x, with its graph; ``None`` without ``lower_init``."""
        if self.lower_init is None:
            return None
        names = [name.removeprefix("lower.") for name, _ in self._names["lower"]]
        value = self.call_upper(self.lower_init, x)
        if isinstance(value, Mapping):
            if set(value) != set(names):
                raise ValueError(f"lower_init returned {sorted(value)}, but the lower parameters are {sorted(names)}")
            value = [value[name] for name in names]
        value = (value,) if isinstance(value, Tensor) else tuple(value)
        shapes = [tuple(p.shape) for p in self.lower_parameters]
        if [tuple(t.shape) for t in value] != shapes:
            raise ValueError(f"lower_init returned shapes {[tuple(t.shape) for t in value]}, but {names} have {shapes}")
        return value

    def sample(self, batch: Any, lower: Any, upper: Any, seed: int) -> Samples:
        """One sample per loss. Data are named (``lower=``, ``upper=``), never positional.

        Raises:
            TypeError: if ``batch`` was given, or a DataLoader or iterator stands for a batch.
        """
        if batch is not None:
            raise TypeError("a bilevel problem takes its data by name: backward(lower=..., upper=...)")
        return Samples(draw(lower, None, mix_seed(seed, 0), "lower"), draw(upper, None, mix_seed(seed, 1), "upper"))

    def _callables(self) -> dict[str, Callable[..., Any]]:
        return {} if self.lower_init is None else {"lower_init": self.lower_init}


class MinimaxProblem(Problem):
    """min over x of max over y in Y of f(x, y).

    x are the trainable parameters of ``upper``, y those of ``lower``. Seen as a bilevel problem, g = -f.

    Args:
        upper: module that holds x.
        lower: module that holds y.
        loss: f, called as ``loss(upper, lower, batch)``; strongly concave in y near y*(x).
        projection: Euclidean projection on Y: one Tensor -> Tensor map for all parameters of ``lower``, or a dict by
            parameter name. ``None`` leaves y free.
        upper_projection: likewise for x, applied after every outer step.

    Raises:
        TypeError: if a module or loss is of the wrong kind.
        ValueError: if a module has no trainable parameter, or both share one.
    """

    minimax = True

    def __init__(
        self,
        upper: nn.Module,
        lower: nn.Module,
        loss: Loss,
        projection: Projection | Mapping[str, Projection] | None = None,
        upper_projection: Projection | Mapping[str, Projection] | None = None,
    ) -> None:
        super().__init__(upper, lower, {"loss": loss}, projection, upper_projection)

    def upper_value(self, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensor:
        """The loss f(x, y) on a batch, under a seed."""
        return self._call(self._losses["loss"], (batch,), x, y, seed)

    def lower_value(self, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensor:
        """The lower loss g = -f on a batch, under a seed."""
        return -self.upper_value(x, y, batch, seed)

    def sample(self, batch: Any, lower: Any, upper: Any, seed: int) -> Samples:
        """One sample for both variables.

        Raises:
            TypeError: if ``lower`` or ``upper`` was given, or a DataLoader or iterator stands for the batch.
        """
        if lower is not None or upper is not None:
            raise TypeError("a minimax problem has one loss and takes one batch: backward(batch)")
        one = draw(batch, None, mix_seed(seed, 0), "batch")
        return Samples(one, one)


@contextmanager
def _replay(seed: int, cuda_devices: set[torch.device]) -> Iterator[None]:
    """Run a block under a seed and put the global random state back afterwards."""
    generators = [
        torch.default_generator,
        *(torch.cuda.default_generators[d.index or 0] for d in cuda_devices),
    ]
    states = [g.get_state() for g in generators]
    for g in generators:
        g.manual_seed(seed)
    try:
        yield
    finally:
        for g, state in zip(generators, states, strict=True):
            g.set_state(state)
