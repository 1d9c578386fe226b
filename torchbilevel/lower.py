"""How y moves: lower solvers as pure updates on tuples of tensors, and any torch optimizer."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchbilevel.tensors import Tensors, clone, detach, norm, sub, zeros

if TYPE_CHECKING:
    from typing_extensions import Self

Gradient = Callable[[Tensors], tuple[Tensor, Tensors]]
Hyperparameter = float | Callable[[nn.Module], Any]


@dataclass(frozen=True, eq=False)
class LowerResult:
    """Where the lower solver ended.

    Attributes:
        y: the lower variables.
        state: the solver's own memory (momentum), tensors and numbers in plain containers, ``None`` if it has none.
            Nobody changes it in place.
        steps: steps taken, fewer than asked for only if ``tol`` was met.
        residual: |g_y| (with a projection P, |y - P(y - g_y)|) at the last point where it was tested against ``tol``,
            ``None`` without ``tol``.
    """

    y: Tensors
    state: Any
    steps: int
    residual: Tensor | None


class LowerSolver(ABC):
    """Moves y towards y*(x) by ``steps`` steps, or until |g_y| <= tol.

    Attributes:
        steps: steps at most.
        tol: stop before a step when |g_y| <= tol (with a projection P, when |y - P(y - g_y)| <= tol); ``None`` takes
            exactly ``steps`` steps.
    """

    def __init__(self, steps: int, tol: float | None) -> None:
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a positive integer, got {steps} (lower_solver=None leaves y where it is)")
        if tol is not None and not tol > 0:
            raise ValueError(f"tol must be positive or None, got {tol}")
        self.steps, self.tol = steps, tol

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in vars(self).items())})"

    @abstractmethod
    def run(self, gradient: Gradient, y: Tensors, state: Any, project: Callable[[Tensors], Tensors]) -> LowerResult:
        """Move y, without a graph.

        Args:
            gradient: y -> (g, g_y), detached.
            y: where to start; left as it is.
            state: the solver's memory from an earlier run, or ``None``; left as it is.
            project: projection of y.

        Returns:
            The end point. Cost: one gradient of g per step, one more if ``tol`` is met.
        """

    def bind(self, evaluate: Callable[[Callable[[nn.Module], Any]], Any]) -> Self:
        """The solver with hyperparameters that are functions of the upper module replaced by their values.

        Args:
            evaluate: gives the value of such a function at x.

        Returns:
            A copy, or the solver itself where there is nothing to replace.
        """
        return self.with_values({name: evaluate(vars(self)[name]) for name in self.learned})

    def with_values(self, values: dict[str, Any]) -> Self:
        """A copy with these attributes instead; the solver itself where there are none."""
        if not values:
            return self
        bound = copy.copy(self)
        vars(bound).update(values)
        return bound

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the hyperparameters that are functions of the upper module."""
        return tuple(name for name, value in vars(self).items() if callable(value) and not isinstance(value, type))

    def place(self, state: Any, y: Tensors) -> Any:
        """The state of a checkpoint, on the devices of y where ``run`` does not see to that itself."""
        return state


class Unrollable(LowerSolver):
    """A lower solver whose step is a pure function, so that it can also be differentiated through."""

    @abstractmethod
    def update(self, y: Tensors, g: Tensors, state: Any) -> tuple[Tensors, Any]:
        """One step from y along the gradient g; nothing is changed in place.

        Args:
            y: lower variables.
            g: g_y at y.
            state: what the last step returned; ``None`` before the first.

        Returns:
            The new y and the new state.
        """

    def place(self, state: Any, y: Tensors) -> Any:
        """Each tensor on the device of its parameter: a state holds rounds of one tensor per parameter."""
        devices = cycle(t.device for t in y)
        return map_tensors(lambda t: t.to(next(devices)), state)

    @torch.no_grad()
    def run(self, gradient: Gradient, y: Tensors, state: Any, project: Callable[[Tensors], Tensors]) -> LowerResult:
        """Take the steps; see ``LowerSolver.run``."""
        y, residual = detach(y), None
        for k in range(self.steps):
            g = gradient(y)[1]
            if self.tol is not None:
                residual = _residual(y, g, project)
                if bool(residual <= self.tol):
                    return LowerResult(y, state, k, residual)
            y, state = self.update(y, g, state)
            y = project(y)
        return LowerResult(y, state, self.steps, residual)


class GD(Unrollable):
    """Gradient descent on g (ascent on f for minimax), with momentum as ``torch.optim.SGD`` has it.

    m = g at the first step, then m <- momentum m + g;   y <- P(y - lr m), with Nesterov
    y <- P(y - lr (g + momentum m)).

    Args:
        lr: lambda, at most 2 / L; L the largest eigenvalue of g_yy. A function of the upper module is learned by
            ``Unrolled``: ``lr=lambda upper: upper.log_lr.exp()``, one value, or one per lower parameter (a list of
            tensors that broadcast against them, or a 1-d tensor).
        steps: K (D in some papers).
        momentum: in [0, 1), or a function of the upper module as for ``lr``.
        nesterov: whether the momentum is Nesterov's.
        tol: stop when |g_y| <= tol.

    Raises:
        ValueError: if an argument is out of range, or ``nesterov`` is set without momentum.

    Cost: one gradient of g per step; with momentum one extra copy of y.

    Reference: Polyak, 1964; Nesterov, 1983; in the form of Sutskever, Martens, Dahl and Hinton, ICML 2013.

    Differs from the paper: nothing; equal to ``torch.optim.SGD`` step for step.
    """

    def __init__(
        self,
        lr: Hyperparameter,
        steps: int,
        momentum: Hyperparameter = 0.0,
        nesterov: bool = False,
        tol: float | None = None,
    ) -> None:
        super().__init__(steps, tol)
        _check_range("lr", lr, 0.0, float("inf"))
        _check_range("momentum", momentum, 0.0, 1.0)
        if nesterov and _is_zero(momentum):
            raise ValueError("nesterov=True needs momentum > 0")
        self.lr, self.momentum, self.nesterov = lr, momentum, nesterov

    def update(self, y: Tensors, g: Tensors, state: Any) -> tuple[Tensors, Any]:
        """One step; see the class."""
        if _is_zero(self.momentum):
            return _descend(y, g, self.lr), None
        mu = _each(self.momentum, y, "momentum")
        m = g if state is None else tuple(_times(u, s) + t for u, s, t in zip(mu, state, g, strict=True))
        step = tuple(t + _times(u, s) for t, u, s in zip(g, mu, m, strict=True)) if self.nesterov else m
        return _descend(y, step, self.lr), m


class Adam(Unrollable):
    """Adam on g, and AdamW with ``decoupled_weight_decay=True``.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,
    y <- P(y - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)).

    Args:
        lr: step size, positive, or a function of the upper module as in ``GD``.
        steps: steps at most.
        betas: the two decay rates, in [0, 1).
        eps: added to the denominator, non-negative.
        weight_decay: L2 penalty, non-negative, or a function of the upper module.
        decoupled_weight_decay: shrink y by lr * weight_decay instead of adding to the gradient (AdamW).
        tol: stop when |g_y| <= tol.

    Raises:
        ValueError: if an argument is out of range.

    Cost: one gradient of g per step, two extra copies of y.

    Reference: Kingma and Ba, ICLR 2015; Loshchilov and Hutter, ICLR 2019 (AdamW).

    Differs from the paper: nothing; equal to ``torch.optim.Adam`` and ``AdamW`` step for step. Unrolled, the derivative
    of the square root at an entry that never had a gradient is taken as zero.
    """

    def __init__(
        self,
        lr: Hyperparameter,
        steps: int,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Hyperparameter = 0.0,
        decoupled_weight_decay: bool = False,
        tol: float | None = None,
    ) -> None:
        super().__init__(steps, tol)
        _check_range("lr", lr, 0.0, float("inf"))
        _check_range("weight_decay", weight_decay, 0.0, float("inf"))
        for i, beta in enumerate(betas):
            _check_range(f"betas[{i}]", beta, 0.0, 1.0)
        if not eps >= 0:
            raise ValueError(f"eps must be non-negative, got {eps}")
        self.lr, self.betas, self.eps = lr, betas, eps
        self.weight_decay, self.decoupled_weight_decay = weight_decay, decoupled_weight_decay

    def update(self, y: Tensors, g: Tensors, state: Any) -> tuple[Tensors, Any]:
        """One step; see the class."""
        b1, b2 = self.betas
        t, m, v = (0, zeros(g), zeros(g)) if state is None else state
        t += 1
        if not _is_zero(self.weight_decay):
            decay = _each(self.weight_decay, y, "weight_decay")
            if self.decoupled_weight_decay:
                rates = _each(self.lr, y, "lr")
                y = tuple(_times(1 - lr * w, p) for p, lr, w in zip(y, rates, decay, strict=True))
            else:
                g = tuple(s + _times(w, p) for s, w, p in zip(g, decay, y, strict=True))
        m = tuple(p.lerp(s, 1 - b1) for p, s in zip(m, g, strict=True))
        v = tuple((b2 * q).addcmul(s, s, value=1 - b2) for q, s in zip(v, g, strict=True))
        correction = (1 - b2**t) ** 0.5
        direction = tuple(p / (_sqrt(q) / correction + self.eps) for p, q in zip(m, v, strict=True))
        return _descend(y, direction, self.lr, 1 / (1 - b1**t)), (t, m, v)


class SignGD(Unrollable):
    """Steps along the sign of the gradient, as adversarial attacks take them: y <- P(y - lr sign(g_y)).

    Args:
        lr: step length per entry, positive, or a function of the upper module as in ``GD``.
        steps: steps at most.
        tol: stop when |g_y| <= tol.

    Raises:
        ValueError: if an argument is out of range.

    Cost: one gradient of g per step. Unrolled, the sign passes no derivative: only ``lr`` and the start of y have one.

    Reference: Madry, Makelov, Schmidt, Tsipras and Vladu, ICLR 2018 (PGD attack).

    Differs from the paper: nothing; the random start is the caller's, through y.
    """

    def __init__(self, lr: Hyperparameter, steps: int, tol: float | None = None) -> None:
        super().__init__(steps, tol)
        _check_range("lr", lr, 0.0, float("inf"))
        self.lr = lr

    def update(self, y: Tensors, g: Tensors, state: Any) -> tuple[Tensors, Any]:
        """One step; see the class."""
        # torch.sign maps NaN to 0, which would hide it.
        return _descend(y, tuple(torch.where(t.isnan(), t, t.sign()) for t in g), self.lr), None


class TorchOptim(LowerSolver):
    """Any torch optimizer as lower solver. It cannot be unrolled; ``GD`` and ``Adam`` can.

    Args:
        optimizer_class: such as ``torch.optim.LBFGS``.
        steps: calls of its ``step`` at most.
        tol: stop when |g_y| <= tol.
        options: its other arguments, ``lr=`` first of all.

    Raises:
        TypeError: if ``optimizer_class`` is no torch optimizer class.

    Cost: what the optimizer needs, as a rule one gradient of g per step, and one optimizer made per run.
    """

    def __init__(
        self,
        optimizer_class: type[torch.optim.Optimizer],
        steps: int,
        tol: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(steps, tol)
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
            raise TypeError(f"optimizer_class must be a torch.optim class, got {optimizer_class}")
        optimizer_class([nn.Parameter(torch.zeros(1, 1))], **options)  # bad options are found now, in its own words
        self.optimizer_class, self.options = optimizer_class, options

    def __repr__(self) -> str:
        options = {"steps": self.steps, "tol": self.tol, **self.options}
        return f"TorchOptim({self.optimizer_class.__name__}, {', '.join(f'{k}={v}' for k, v in options.items())})"

    def run(self, gradient: Gradient, y: Tensors, state: Any, project: Callable[[Tensors], Tensors]) -> LowerResult:
        """Let the optimizer step; see ``LowerSolver.run``."""
        parameters = [nn.Parameter(t) for t in clone(y)]
        optimizer = self.optimizer_class(parameters, **self.options)
        if state is not None:
            optimizer.load_state_dict(copy.deepcopy(state))
        residual: Tensor | None = None
        here: list[tuple[Tensor, Tensors]] = []  # what the test of tol evaluated, for the optimizer's first evaluation

        def closure() -> Any:
            value, g = here.pop() if here else gradient(detach(parameters))
            for p, t in zip(parameters, g, strict=True):
                p.grad = t
            return value

        for k in range(self.steps):
            if self.tol is not None:
                here = [gradient(detach(parameters))]
                residual = _residual(detach(parameters), here[0][1], project)
                if bool(residual <= self.tol):
                    return LowerResult(detach(parameters), optimizer.state_dict(), k, residual)
            optimizer.step(closure)
            with torch.no_grad():
                for p, t in zip(parameters, project(detach(parameters)), strict=True):
                    p.copy_(t)
        return LowerResult(detach(parameters), optimizer.state_dict(), self.steps, residual)


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to every tensor of nested tuples, lists and dicts.

    Args:
        function: what to apply.
        tree: may hold anything besides, which stays as it is.

    Returns:
        The same nesting, with tuples in place of lists.

    >>> map_tensors(torch.neg, (1, [torch.ones(1)]))
    (1, (tensor([-1.]),))
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return tuple(map_tensors(function, value) for value in tree)
    return tree


def _residual(y: Tensors, g: Tensors, project: Callable[[Tensors], Tensors]) -> Tensor:
    """|y - P(y - g)|, and |g| where P is the identity, without the cancellation."""
    moved = sub(y, g)
    return norm(tuple(s if q is t else p - q for p, s, t, q in zip(y, g, moved, project(moved), strict=True)))


def _descend(y: Tensors, direction: Tensors, lr: Any, factor: float = 1.0) -> Tensors:
    if isinstance(lr, int | float):
        return tuple(torch.add(p, d, alpha=-lr * factor) for p, d in zip(y, direction, strict=True))
    rates = _each(lr, y, "lr")
    return tuple(p - _times(r, d) * factor for p, r, d in zip(y, rates, direction, strict=True))


def _sqrt(q: Tensor) -> Tensor:
    """The square root, with derivative zero at zero."""
    if not q.requires_grad:
        return q.sqrt()
    positive = q > 0
    return torch.where(positive, torch.where(positive, q, 1.0).sqrt(), 0.0)


def _times(rate: Any, t: Tensor) -> Tensor:
    return t * (rate.to(t.device, t.dtype) if isinstance(rate, Tensor) else rate)


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


def _each(value: Any, y: Tensors, name: str) -> Sequence[Any]:
    """One hyperparameter value per lower tensor."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.reshape(())
    if isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0):
        return [value] * len(y)
    if not isinstance(value, Sequence) and not (isinstance(value, Tensor) and value.dim() == 1):
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(
            f"{name} returned {got}; return one value, or a list (or 1-d tensor) with one value per lower parameter"
        )
    if len(value) != len(y):
        raise ValueError(
            f"{name} returned {len(value)} values for {len(y)} lower parameters; return one value, or a list with one "
            f"number or tensor per parameter"
        )
    return list(value)


def _check_range(name: str, value: Any, low: float, high: float) -> None:
    """A number must lie in [low, high), strictly inside for step sizes; functions of the upper module pass."""
    if callable(value):
        return
    if not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number or a function of the upper module, got {type(value).__name__}")
    if not (low <= value < high) or (name == "lr" and value == 0):
        raise ValueError(
            f"{name} must be {'positive and finite' if name == 'lr' else f'in [{low:g}, {high:g})'}, got {value}"
        )
