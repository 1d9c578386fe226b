"""What all problems share: the point, evaluations, projections, copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from torchbilevel.checks import check_problem, check_projections
from torchbilevel.copies import refuse_captured_modules, refuse_unpicklable
from torchbilevel.draws import BatchSizes, Draw, Draws
from torchbilevel.modules import ModulePair
from torchbilevel.problem.arguments import Projections, by_name, fitting
from torchbilevel.projections import Projection
from torchbilevel.ranks import Ranks, unwrapped
from torchbilevel.samples import Samples
from torchbilevel.shards import any_sharded, cut, whole
from torchbilevel.tasks import tasks_of
from torchbilevel.tensors import Tensors, detach, mix_seed

Loss = Callable[[nn.Module, nn.Module, Any], Tensor]


class Problem:
    """What bilevel and minimax problems share.

    A loss is evaluated at any (x, y) by putting the tensors into the live modules for the duration of the call. Random
    numbers are replayed from the sample's seed and the global random state is put back; buffers are cloned, so no
    evaluation changes them. ``backward`` alone commits them, as one evaluation of each loss does, however many it took:
    where both losses of a bilevel problem run a batch normalisation in training mode, its ``num_batches_tracked`` rises
    by two per ``backward``, and its running statistics mix both batches.

    Attributes:
        upper: the module whose trainable parameters are x.
        lower: the module whose trainable parameters are y.
        minimax: whether g = -f.
        tasks: the number of tasks that y holds side by side, if ``lower`` is a ``TaskBatch``, else ``None``.
    """

    minimax = False

    def __init__(
        self,
        upper: nn.Module,
        lower: nn.Module,
        losses: Mapping[str, Loss],
        projection: Projections = None,
        upper_projection: Projections = None,
        lower_init: Callable[[nn.Module], Any] | None = None,
        process_group: Any = None,
    ) -> None:
        upper, lower = unwrapped(upper, "upper"), unwrapped(lower, "lower")
        for name, module in (("upper", upper), ("lower", lower)):
            if not isinstance(module, nn.Module):
                raise TypeError(
                    f"{name} must be an nn.Module, got {type(module).__name__}; wrap tensors as nn.Parameters of a "
                    f"module"
                )
        for name, loss in losses.items():
            if not callable(loss):
                raise TypeError(f"{name} must be a callable loss(upper, lower, batch), got {type(loss).__name__}")
        if lower_init is not None and not callable(lower_init):
            raise TypeError(f"lower_init must be a function of the upper module, got {type(lower_init).__name__}")
        self.upper, self.lower, self.lower_init = upper, lower, lower_init
        self.tasks = tasks_of(lower)
        self.ranks = Ranks(process_group)
        self._losses = dict(losses)
        self._pair = ModulePair(upper, lower)
        for name, parameters in (("upper", self._pair.x), ("lower", self._pair.y)):
            self.ranks.require_spread(name, parameters)
        if self.tasks is not None and any_sharded(self.lower_parameters):
            raise ValueError(
                "lower is a TaskBatch of sharded parameters, whose tasks are solved whole: keep them whole"
            )
        self._projections = {
            "projection": by_name(projection, self._pair.y, "projection"),
            "upper_projection": by_name(upper_projection, self._pair.x, "upper_projection"),
        }
        for argument, parameters in (("projection", self._pair.y), ("upper_projection", self._pair.x)):
            check_projections(argument, self._projections[argument], parameters)
        self.ranks.broadcast(t for m in (upper, lower) for t in (*m.parameters(), *m.buffers()))

    # --- the point ---

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
        return tuple(self._pair.x.values())

    @property
    def lower_parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters behind ``y``."""
        return tuple(self._pair.y.values())

    def set_y(self, y: Tensors) -> None:
        """Copy ``y`` into the lower module."""
        with torch.no_grad():
            for p, t in zip(self.lower_parameters, cut(y, self.lower_parameters), strict=True):
                p.copy_(t)

    def project_y(self, y: Tensors) -> Tensors:
        """The projection of y on its set; y itself where there is none."""
        return self._project("projection", self._pair.y, y)

    def project_x(self, x: Tensors) -> Tensors:
        """The projection of x on its set; x itself where there is none."""
        return self._project("upper_projection", self._pair.x, x)

    @property
    def constrains_y(self) -> bool:
        """Whether y has a projection."""
        return bool(self._projections["projection"])

    @property
    def constrains_x(self) -> bool:
        """Whether x has a projection."""
        return bool(self._projections["upper_projection"])

    @property
    def upper_projections(self) -> dict[Tensor, Projection]:
        """The projections behind ``project_x``, by parameter."""
        maps = self._projections["upper_projection"]
        return {p: maps[name] for name, p in self._pair.x.items() if name in maps}

    # --- evaluations ---

    def upper_value(self, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensor:
        """The upper loss f(x, y) on a batch, under a seed."""
        raise NotImplementedError

    def lower_value(self, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensor:
        """The lower loss g(x, y) on a batch, under a seed."""
        raise NotImplementedError

    def _evaluate(self, loss: str, x: Tensors, y: Tensors, batch: Any, seed: int) -> Tensor:
        try:
            seed = mix_seed(seed, self.ranks.rank) if self.ranks.rank else seed  # other batches, other random numbers
            value: Tensor = self._pair.call(self._losses[loss], (batch,), x, y, seed)
        except (TypeError, AttributeError) as error:
            if batch is not None:
                raise
            call, kind = "backward(batch)" if self.minimax else "backward(lower=..., upper=...)", type(error).__name__
            raise TypeError(f"{loss} raised {kind} on batch=None ({error}); if it needs data: {call}") from error
        return value

    def call_upper(self, function: Callable[[nn.Module], Any], x: Tensors, seed: int = 0) -> Any:
        """``function(upper)`` with x in place of the upper parameters, under a seed."""
        return self._pair.call(lambda upper, lower: function(upper), (), whole(x), self.y, seed)

    def start(self, x: Tensors, seed: int = 0) -> Tensors | None:
        """Where y starts when it is not warm: ``lower_init(upper)``, projected.

        Args:
            x: upper variables.
            seed: of the random numbers that ``lower_init`` draws from torch's global generators.

        Returns:
            The start, with its graph; ``None`` without ``lower_init``.
        """
        if self.lower_init is None:
            return None
        function = self.lower_init

        def start(upper: nn.Module) -> Tensors:
            # Within the call: an iterator over parameters must run while x is in their place.
            return fitting(function(upper), self._pair.y, self.tasks)

        return self.project_y(cut(self.call_upper(start, x, seed), self.y))

    def commit_buffers(self, x: Tensors, y: Tensors, samples: Samples | Draw) -> None:
        """Update the live buffers (running statistics, ...) as one evaluation of each loss at (x, y) does.

        Cost: one evaluation of each loss where a module has buffers and is in training mode; nothing otherwise.
        """
        tensors = self._pair.clone_buffers()
        if not tensors or not any(m.training for m in (*self.upper.modules(), *self.lower.modules())):
            return
        x, y = whole(x), whole(y)
        with torch.no_grad():
            for loss, sample in zip(self._losses.values(), (samples.upper, samples.lower), strict=False):
                for _, batch, seed in sample.parts():
                    self._pair.call(loss, (batch,), x, y, seed, tensors)
        self.ranks.broadcast(tensors.values())
        self._pair.load_buffers(tensors)

    # --- the user's side ---

    def data(self, batch: Any, lower: Any, upper: Any) -> tuple[Any, Any]:
        """What ``backward`` was given for the lower and for the upper loss; see the subclasses."""
        raise NotImplementedError

    def sample(self, batch: Any, lower: Any, upper: Any, seed: int) -> Samples:
        """One sample of each loss, of the size that sources give by themselves.

        Args:
            batch: minimax: a batch or a source.
            lower: bilevel: a batch or a source for g.
            upper: bilevel: a batch or a source for f.
            seed: from which the seeds of both samples come.

        Returns:
            The samples; those of a minimax problem are one.
        """
        return self.draws(batch, lower, upper, seed, None).pair

    def draws(self, batch: Any, lower: Any, upper: Any, seed: int, sizes: BatchSizes | None) -> Draws:
        """The samples of one iteration.

        Args:
            batch: minimax: a batch or a source.
            lower: bilevel: a batch or a source for g.
            upper: bilevel: a batch or a source for f.
            seed: from which the seeds of all samples come.
            sizes: of independent draws; ``None`` for one sample of each loss.

        Returns:
            The samples, by use.
        """
        self.ranks.require_all()
        lower, upper = self.data(batch, lower, upper)
        return Draws(lower, upper, seed, sizes, self.minimax)

    def check(self, batch: Any = None, *, lower: Any = None, upper: Any = None) -> None:
        """Try the problem on data and say what is wrong with it, if anything.

        Each loss is evaluated and differentiated at the current point. Nothing is changed, but a source is drawn from.
        A ``ValueError`` says that a loss is not scalar, not finite or not deterministic once its seed is replayed, that
        the lower loss ignores y (or a part of it that the upper loss uses), that the upper loss ignores both x and y,
        that a loss uses a captured parameter tensor instead of the module's attribute, or that ``lower_init`` does not
        fit. A ``RuntimeError`` says that the lower loss is not twice differentiable, and the remedy. A warning says
        that neither a loss nor ``lower_init`` uses an upper parameter, or that second derivatives may be wrong in
        silence.

        Args:
            batch: minimax: a batch (or source).
            lower: bilevel: a batch (or source) for the lower loss.
            upper: bilevel: a batch (or source) for the upper loss.

        Cost: a handful of evaluations and gradients, and two products.
        """
        check_problem(self, self._pair, self.sample(batch, lower, upper, seed=0))

    # --- copies ---

    def __deepcopy__(self, memo: dict[int, Any]) -> Problem:
        refuse_captured_modules(self._callables(), {"upper": self.upper, "lower": self.lower})
        copy = object.__new__(type(self))
        memo[id(self)] = copy
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        return copy

    def __getstate__(self) -> dict[str, Any]:
        refuse_unpicklable(self._callables())
        return self.__dict__

    def _callables(self) -> dict[str, Callable[..., Any]]:
        """All functions that came from the user, by the names of their arguments."""
        projections = {
            f"{argument}[{name!r}]": function
            for argument, by_name in self._projections.items()
            for name, function in by_name.items()
        }
        own = {} if self.lower_init is None else {"lower_init": self.lower_init}
        return {**self._losses, **projections, **own}

    def _project(self, argument: str, parameters: Mapping[str, Tensor], values: Tensors) -> Tensors:
        projections = self._projections[argument]
        if not projections:
            return values
        named = zip(parameters, whole(values), strict=True)
        return cut([projections[name](t) if name in projections else t for name, t in named], values)


def require_problem(problem: Any) -> None:
    """Raise a TypeError with the remedy where something else than a problem was given for one."""
    if not isinstance(problem, Problem):
        got = f"the class {problem.__name__}" if isinstance(problem, type) else type(problem).__name__
        raise TypeError(
            f"problem must be a BilevelProblem or a MinimaxProblem, got {got}; of a method it is method.problem"
        )
