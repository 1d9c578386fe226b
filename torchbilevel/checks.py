"""Finding out what is wrong with a problem before a run goes wrong in silence."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from torchbilevel.derivatives import differentiable_gradient, reached, scalar, vjp
from torchbilevel.modules import ModulePair
from torchbilevel.oracle import Oracle
from torchbilevel.samples import Sample, Samples
from torchbilevel.shards import whole
from torchbilevel.tensors import Tensors, detach, is_finite, leaves, norm, numel, scale, sub


def check_problem(problem: Any, pair: ModulePair, samples: Samples) -> None:
    """Evaluate and differentiate both losses at the current point; raise on the first thing that is wrong.

    Args:
        problem: a ``Problem``.
        pair: its modules.
        samples: where to evaluate; of ``Batches`` the first part.

    Raises:
        ValueError: says what is wrong; see ``Problem.check``.
    """
    for side, now, then in zip(("upper", "lower"), pair.trainable(), (pair.x, pair.y), strict=True):
        if list(now) != list(then) or any(now[name] is not then[name] for name in now):
            raise ValueError(
                f"{side} had the trainable parameters {list(then)} when the problem was made and has {list(now)} now, "
                f"or others in their place; "
                f"freeze or replace parameters first, then make the problem"
            )
    x, y = leaves(whole(problem.x)), leaves(whole(problem.y))
    with torch.enable_grad():
        start = problem.start(x)
    if start is not None and not is_finite(start):
        raise ValueError("lower_init returned entries that are not finite")
    names = ("loss", "loss") if problem.minimax else ("upper_loss", "lower_loss")
    live = {f"upper.{name}": p for name, p in pair.x.items()} | {f"lower.{name}": p for name, p in pair.y.items()}
    in_upper = _check_loss(problem.upper_value, names[0], live, x, y, samples.upper)
    in_lower = _check_loss(problem.lower_value, names[1], live, x, y, samples.lower)
    n = len(x)
    if not any(in_lower[n:]):
        raise ValueError(
            f"{names[1]} ignores the lower parameters y; use the attributes or the output of its second argument"
        )
    if not any(in_upper):
        raise ValueError(f"{names[0]} ignores both the upper parameters x and the lower parameters y")
    used = (in_upper, in_lower, *(reached(t.sum(), x) for t in start or ()))
    idle = [f"upper.{name}" for i, name in enumerate(pair.x) if not any(by[i] for by in used)]
    if idle:
        warnings.warn(
            f"no loss uses {', '.join(idle)}: the hypergradient there is zero for ever, and a random perturbation "
            f"would still move it; freeze it with requires_grad_(False) before making the problem (unless it is a "
            f"hyperparameter of the lower solver, which Unrolled alone sees)",
            stacklevel=3,
        )
    for name, upper, lower in zip(pair.y, in_upper[n:], in_lower[n:], strict=True):
        if upper and not lower and start is None:
            raise ValueError(
                f"the lower parameter {name!r} is used by the upper loss and ignored by the lower loss, which "
                f"therefore has no unique minimiser; add a term such as a small L2 penalty, or freeze it"
            )
    _warn_of_cut(problem.upper_value, names[0], (*x, *y), n, samples.upper)
    if problem.tasks is not None and problem.tasks > 1:
        _check_tasks(problem, names[1], x, y, samples.lower)
    if not problem.minimax:
        _check_second_derivatives(problem, x, y, samples.lower)
    if problem.ranks.size > 1:
        _warn_of_ranks(problem, pair, names, samples)


def _check_loss(
    value_of: Callable[..., Tensor], name: str, live: Mapping[str, Tensor], x: Tensors, y: Tensors, sample: Sample
) -> list[bool]:
    """Check one loss on the first part of a sample, and return which of (*x, *y) its graph reaches."""
    _, batch, seed = next(sample.parts())
    with torch.enable_grad(), _refusing_checkpoints(name):
        value = scalar(value_of(x, y, batch, seed), name)
    with torch.enable_grad():
        again = scalar(value_of(x, y, batch, seed), name)
    if not bool(torch.isfinite(value)):
        raise ValueError(f"{name} is {value.item()} at the current point; it must be finite")
    # Sums that a device adds in no fixed order differ in the last digits; a random number left alone, in more.
    eps = torch.finfo(value.dtype).eps
    if not torch.isclose(value, again, rtol=max(eps, min(1e3 * eps, 1e-3)), atol=0.0):
        raise ValueError(
            f"{name} is not deterministic: two evaluations of one sample under one torch seed gave {value.item()} and "
            f"{again.item()}; draw random numbers from torch's global generators, not from numpy, random or your own "
            f"generator"
        )
    for parameter, captured in zip(live, reached(value, tuple(live.values())), strict=True):
        if captured:
            raise ValueError(
                f"{name} uses a captured parameter tensor, {parameter}; inside the loss, read it from the module "
                f"(such as lower.weight) so that it can be evaluated at other values"
            )
    return reached(value, (*x, *y))


@contextmanager
def _refusing_checkpoints(name: str) -> Iterator[None]:
    """Raise if torch.utils.checkpoint is called: it runs a module again later, with other tensors in it."""
    called = False

    def notice(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal called
        called = called or (event == "call" and frame.f_code.co_filename == torch.utils.checkpoint.__file__)

    before = sys.getprofile()
    sys.setprofile(notice)
    try:
        yield
    finally:
        sys.setprofile(before)
    if called:
        raise ValueError(
            f"{name} uses torch.utils.checkpoint, which runs a part of the module once more when it is differentiated: "
            f"by then the module holds its own parameters again, not those that the loss was evaluated at, and the "
            f"derivatives would be wrong; save memory with micro_batches(data, size) or Batches instead"
        )


def _warn_of_cut(value_of: Callable[..., Tensor], name: str, point: Tensors, n: int, sample: Sample) -> None:
    """Warn where second derivatives of the upper loss would be wrong in silence; first-order methods take none."""
    _, batch, seed = next(sample.parts())
    with torch.enable_grad():
        cut = _is_cut(differentiable_gradient(value_of(point[:n], point[n:], batch, seed), point))
    if cut:
        warnings.warn(
            f"{name} is not twice differentiable (an autograd.Function in it is marked once_differentiable): gradients "
            f"are right, but certify, and rules that use products with the Hessian of Phi, would pass over its second "
            f"derivative",
            stacklevel=4,
        )


def _warn_of_ranks(problem: Any, pair: ModulePair, names: tuple[str, str], samples: Samples) -> None:
    """Warn where several ranks do not equal one process on the joined batch; raise where they are at several points."""
    gather, device = problem.ranks.gather, problem.x[0].device
    for side, point in (("upper", whole(problem.x)), ("lower", whole(problem.y))):
        found = gather(float(norm(point) + 0.5 * sum(t.sum() for t in point)), device)
        if len(set(found)) > 1:
            raise ValueError(
                f"the parameters of {side} differ between the ranks: something changed them on some ranks alone after "
                f"the problem was made; load checkpoints on every rank, and make the problem when all is in place"
            )
    evaluated = [(names[0], problem.upper_value, samples.upper), (names[1], problem.lower_value, samples.lower)]
    for name, value_of, sample in evaluated[:1] if problem.minimax else evaluated:
        sizes = [int(size) for size in gather(sample.size, device)]
        if len(set(sizes)) > 1:
            warnings.warn(
                f"the batches of {name} have {sizes} data points on the ranks: each rank weighs the same in an "
                f"average, so this is not the mean over the joined batch; bring equal shards",
                stacklevel=4,
            )
        _, batch, seed = next(sample.parts())
        with torch.no_grad():
            values = gather(float(value_of(whole(problem.x), whole(problem.y), batch, seed)), device)
        if batch is not None and len(set(values)) == 1:
            warnings.warn(
                f"{name} is {values[0]:g} on every rank, as if all had brought the same batch; give each rank rows of "
                f"its own (a DistributedSampler, or sample(own_rows, seed=rank))",
                stacklevel=4,
            )
    modules = (*pair.upper.modules(), *pair.lower.modules())
    if any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.training for m in modules):
        warnings.warn(
            "a batch normalisation in training mode sees the batch of its own rank only: the ranks together differ "
            "from one process on the joined batch; use group or layer normalisation, or eval()",
            stacklevel=4,
        )


def _check_second_derivatives(problem: Any, x: Tensors, y: Tensors, sample: Sample) -> None:
    _, batch, seed = next(sample.parts())
    ones = tuple(torch.ones_like(t) for t in y)
    gradient = Oracle(problem).gradient_graph(x, y, y, batch, seed)
    products = vjp(gradient, (*y, *x), ones, keep=True, loss="lower_loss")[0]
    if not is_finite(gradient, products):
        raise ValueError(
            "lower_loss has first or second derivatives that are not finite at the current point (a square root or "
            "norm at zero?)"
        )
    if _is_cut(gradient):
        raise RuntimeError(
            "lower_loss is not twice differentiable (an autograd.Function in it is marked once_differentiable, and "
            "autograd would pass over its second derivative in silence); replace that operation by one that has a "
            "second derivative"
        )
    _compare_with_differences(problem, x, y, products[: len(y)], batch, seed)


def _check_tasks(problem: Any, name: str, x: Tensors, y: Tensors, sample: Sample) -> None:
    """Raise where moving y of one half of the tasks changes the gradient of the other half."""
    _, batch, seed = next(sample.parts())
    half = problem.tasks // 2
    moved = tuple(torch.cat((torch.ones_like(t[:half]), torch.zeros_like(t[half:]))) for t in y)
    product = vjp(Oracle(problem).gradient_graph(x, y, y, batch, seed), y, moved, loss=name)[0]
    across, eps = float(norm(tuple(t[half:] for t in product))), max(torch.finfo(t.dtype).eps for t in y)
    if across > 1e3 * eps * float(norm(product)):
        raise ValueError(
            f"{name} couples the tasks of the TaskBatch: moving y of tasks 0 to {half - 1} changes the gradient in y "
            f"of the others (by {across:.1e}); make it the sum of losses that each depend on one task, such as "
            f"lower.losses(...).sum()"
        )


def _compare_with_differences(problem: Any, x: Tensors, y: Tensors, product: Tensors, batch: Any, seed: int) -> None:
    """Warn where g_yy times ones is far from a difference of gradients: autograd can be wrong in silence."""
    eps, oracle = max(torch.finfo(t.dtype).eps for t in y), Oracle(problem)
    step = eps ** (1 / 3) * max(1.0, float(norm(detach(y)))) / numel(y) ** 0.5
    ends = []
    for h in (step, -step):
        moved = leaves(tuple(t + h for t in y))
        ends.append(detach(oracle.gradient_graph(x, moved, moved, batch, seed)))
    difference = scale(1 / (2 * step), sub(*ends))
    error, noise = float(norm(sub(product, difference))), 100 * eps * float(norm(ends[0])) / step
    if error > 0.05 * float(norm(difference)) + 10 * eps ** (1 / 3) * float(norm(product)) + noise:
        warnings.warn(
            "a product with the second derivative of lower_loss is far from a difference of its gradients: either it "
            "is not smooth at the current point (ReLU), or some operation has wrong second derivatives in torch "
            "(parametrizations.weight_norm has in some releases): write it out in elementary operations",
            stacklevel=4,
        )


def _is_cut(tensors: Tensors) -> bool:
    """Whether a graph holds one of the nodes that raise when they are reached; products go around them."""
    stack, seen = [t.grad_fn for t in tensors], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            if node.name() == "torch::autograd::Error":
                return True
            seen.add(node)
            stack += [previous for previous, _ in node.next_functions]
    return False


def check_projections(
    argument: str, projections: Mapping[str, Callable[[Tensor], Tensor]], by_name: Mapping[str, Tensor]
) -> None:
    """Try each projection on a copy of its parameter.

    Args:
        argument: ``"projection"`` or ``"upper_projection"``, for messages.
        projections: by parameter name.
        by_name: the parameters.

    Raises:
        TypeError: if a projection returns no tensor.
        ValueError: if it fails, changes its argument in place, or returns a tensor of another shape, dtype or device,
            or one that is not finite.
    """
    for name, projection in projections.items():
        t = by_name[name].detach().clone()
        at = f"{argument} of the parameter {name!r} ({_kind(t)})"
        version, before = t._version, t.clone()
        try:
            with torch.no_grad():
                result = projection(t)
        except Exception as error:
            raise ValueError(f"{at} failed: {error}") from error
        if not isinstance(result, Tensor):
            raise TypeError(f"{at} must return a tensor of the same kind, got {type(result).__name__}")
        if t._version != version or not torch.equal(t.nan_to_num(), before.nan_to_num()):
            raise ValueError(f"{at} changes its argument in place; return a new tensor (t.clamp, not t.clamp_)")
        if _kind(result) != _kind(t):
            raise ValueError(f"{at} must return a tensor of the same kind, got {_kind(result)}")
        if is_finite((t,)) and not is_finite((result,)):
            raise ValueError(f"{at} returned entries that are not finite, where the parameter's are")


def _kind(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} of shape {tuple(t.shape)} on {t.device}"
