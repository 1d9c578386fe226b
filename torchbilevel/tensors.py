"""Arithmetic on tuples of tensors: the vectors of the whole package.

A tensor may be spread over ranks (a ``DTensor``): sums over all entries are then the same numbers on all of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from torchbilevel.shards import any_sharded, cut, is_sharded, local, spread, summed, whole

# Lists are made into tuples below, since a generator would cost as much again as an operation on a small tensor.
Tensors = tuple[Tensor, ...]
Scalar = float | Tensor


_HALF = (torch.float16, torch.bfloat16)


def accumulator(t: Tensor) -> Tensor:
    """Lift half-precision tensors to float32, in which all sums are formed."""
    return t.float() if t.dtype in _HALF else t


def _row(t: Tensor) -> Tensor:
    t = t if t.dim() == 1 else t.reshape(-1)
    return t.float() if t.dtype in _HALF else t


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Inner product sum_i <a_i, b_i>; half-precision tensors are multiplied and summed in float32.

    Args:
        a: tensors.
        b: as many, of the same shapes.

    Returns:
        A 0-d tensor on the device of ``a[0]``.

    >>> dot((torch.ones(2), torch.tensor(3.0)), (torch.ones(2), torch.tensor(2.0)))
    tensor(8.)
    """
    if any_sharded(a):
        parts = [_sharded_dot(s, t) for s, t in zip(a, b, strict=True)]
    else:
        parts = [torch.dot(_row(s), _row(t)) for s, t in zip(a, b, strict=True)]
    if len(parts) == 1:
        return parts[0]
    dtype = parts[0].dtype
    for p in parts[1:]:
        dtype = torch.promote_types(dtype, p.dtype)
    total = parts[0].to(dtype)
    for p in parts[1:]:
        total = total + p.to(device=total.device, dtype=dtype)
    return total


def _sharded_dot(s: Tensor, t: Tensor) -> Tensor:
    part = torch.dot(_row(local(s)), _row(local(t)))
    return summed(part, s) if is_sharded(s) else part


def norm(a: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all entries of all tensors, as a 0-d tensor."""
    return dot(a, a).sqrt()


def add(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensors:
    """The sum a + b."""
    return tuple([s + t for s, t in zip(a, b, strict=True)])


def sub(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensors:
    """The difference a - b."""
    return tuple([s - t for s, t in zip(a, b, strict=True)])


def scale(alpha: float | Tensor, a: Sequence[Tensor]) -> Tensors:
    """The multiple alpha a; each tensor keeps its dtype and device."""
    return tuple([t * _like(alpha, t) for t in a])


def axpy(alpha: float | Tensor, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensors:
    """The combination alpha a + b; each tensor keeps its dtype and device."""
    if isinstance(alpha, Tensor):
        return tuple([t + s * _like(alpha, s) for s, t in zip(a, b, strict=True)])
    return tuple([torch.add(t, s, alpha=alpha) for s, t in zip(a, b, strict=True)])


def add_scaled_(a: Sequence[Tensor], alpha: Scalar, b: Sequence[Tensor], sign: int = 1) -> None:
    """In place, a += sign alpha b: one kernel per tensor and no wait for the device."""
    for s, t in zip(a, b, strict=True):
        if isinstance(alpha, Tensor):
            s.addcmul_(t, alpha.to(s.device, s.dtype), value=sign)
        else:
            s.add_(t, alpha=sign * alpha)


def scale_add_(a: Sequence[Tensor], alpha: Scalar, b: Sequence[Tensor]) -> None:
    """In place, a = alpha a + b: one kernel per tensor and no wait for the device."""
    for s, t in zip(a, b, strict=True):
        if isinstance(alpha, Tensor):
            torch.addcmul(t, s, alpha.to(s.device, s.dtype), out=s)
        else:
            torch.add(t, s, alpha=alpha, out=s)


class Layout:
    """Tuples of tensors as flat vectors, one per device and dtype: arithmetic then costs a few kernels for any number.

    Inner products are Python numbers where all tensors are on the CPU, since there an operation on a 0-d tensor costs
    as much as one on a short vector; elsewhere they are 0-d tensors, since a number would have to wait for the device.

    Args:
        like: a tuple of the shapes, dtypes and devices to come. Of tensors that are spread over ranks the vectors hold
            the part of this one.

    >>> layout = Layout((torch.zeros(2), torch.zeros(())))
    >>> vectors = layout.pack((torch.ones(2), torch.tensor(3.0)))
    >>> layout.unpack(vectors), layout.dot(vectors, vectors)
    ((tensor([1., 1.]), tensor(3.)), 11.0)
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        self._like = tuple(like) if any_sharded(like) else None
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, t in enumerate(like):
            # A tensor that is spread is alone in its vector: torch cannot copy one that is a part of another's memory.
            groups.setdefault((t.device, t.dtype, i if is_sharded(t) else -1), []).append(i)
        self._groups = list(groups.values())
        like = [local(t) for t in like]
        self._shapes = [t.shape for t in like]
        # Kernels are fastest on addresses that are multiples of 64 bytes or so, hence the gaps between tensors.
        self._gaps = {i: like[i].new_zeros(-like[i].numel() % 16) for g in groups.values() if len(g) > 1 for i in g}
        self._on_cpu = all(device.type == "cpu" for device, *_ in groups)

    def pack(self, a: Sequence[Tensor]) -> Tensors:
        """The flat vectors; a tensor alone in its vector is viewed where possible, others are copied."""
        a = [local(t) for t in a] if self._like else a
        return tuple(
            [
                torch.cat([piece for i in group for piece in (a[i].reshape(-1), self._gaps[i])])
                if len(group) > 1
                else a[group[0]].reshape(-1)
                for group in self._groups
            ]
        )

    def unpack(self, vectors: Sequence[Tensor]) -> Tensors:
        """Views of the flat vectors in the shapes of the tuple."""
        views: dict[int, Tensor] = {}
        for vector, group in zip(vectors, self._groups, strict=True):
            if len(group) == 1:
                views[group[0]] = vector.view(self._shapes[group[0]])
                continue
            start = 0
            for i in group:
                size = self._shapes[i].numel()
                views[i] = vector[start : start + size].view(self._shapes[i])
                start += size + -size % 16
        if self._like:
            return tuple([spread(views[i], t) for i, t in enumerate(self._like)])
        return tuple([views[i] for i in range(len(views))])

    def dot(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Scalar:
        """Inner product of flat vectors."""
        if self._like is None:
            product = dot(a, b)
        else:
            leaders = [self._like[group[0]] for group in self._groups]
            parts = [dot((s,), (t,)) for s, t in zip(a, b, strict=True)]
            parts = [summed(p, t) if is_sharded(t) else p for p, t in zip(parts, leaders, strict=True)]
            product = sum(parts[1:], parts[0])
        return product.item() if self._on_cpu else product


def _like(alpha: float | Tensor, t: Tensor) -> float | Tensor:
    """A scalar for arithmetic with ``t``: on its device, and of its dtype where both are 0-d and would be promoted."""
    if not isinstance(alpha, Tensor):
        return alpha
    return alpha.to(t.device, t.dtype) if t.dim() == 0 else alpha.to(t.device)


def zeros(like: Sequence[Tensor]) -> Tensors:
    """Zeros of the same shapes."""
    return tuple([torch.zeros_like(t) for t in like])


def detach(a: Iterable[Tensor]) -> Tensors:
    """The same tensors without their graphs; storage is shared."""
    return tuple([t.detach() for t in a])


def clone(a: Iterable[Tensor]) -> Tensors:
    """Detached copies that share no storage with ``a``."""
    return tuple([t.detach().clone() for t in a])


def leaves(a: Iterable[Tensor]) -> Tensors:
    """Detached aliases that require gradients: the points at which derivatives are taken."""
    return tuple([t.detach().requires_grad_() for t in a])


def numel(a: Iterable[Tensor]) -> int:
    """Number of scalars in all tensors together."""
    return sum(t.numel() for t in a)


def is_finite(*groups: Sequence[Tensor]) -> bool:
    """Whether every entry of every tensor is finite (one synchronisation per device)."""
    # A sum is finite only if no entry is NaN or infinite; a finite tensor whose sum overflows is caught by the
    # elementwise test, which therefore runs only after the cheap one has failed.
    tensors = [t for group in groups for t in group]
    sums: dict[torch.device, Tensor] = {}
    for t in tensors:
        s = _sum(accumulator(local(t)), t)
        sums[t.device] = sums[t.device] + s if t.device in sums else s
    if all(math.isfinite(s.item()) for s in sums.values()):
        return True
    return not any(bool(_sum((~torch.isfinite(local(t))).float(), t)) for t in tensors)


def _sum(part: Tensor, like: Tensor) -> Tensor:
    """The sum over all entries of a tensor that is spread as ``like``."""
    return summed(part.sum(), like) if is_sharded(like) else part.sum()


def flatten(a: Sequence[Tensor]) -> Tensor:
    """One vector of all entries, on the device of the first tensor and in the widest dtype; shards are gathered."""
    a = whole(a)
    dtype = a[0].dtype
    for t in a[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return torch.cat([t.reshape(-1).to(a[0].device, dtype) for t in a])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> Tensors:
    """The inverse of ``flatten``: pieces of a vector in the shapes, dtypes and devices of ``like``."""
    pieces = vector.split_with_sizes([t.numel() for t in like])
    shaped = tuple([v.reshape(t.shape).to(t.device, t.dtype) for v, t in zip(pieces, like, strict=True)])
    return cut(shaped, like)


def as_seed(seed: Any) -> int:
    """A seed as Python's int; numpy's integers pass, and what is no integer raises a ValueError."""
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise ValueError(f"seed must be an integer, got {seed!r}")
    return int(seed)


def mix_seed(*parts: int) -> int:
    """Hash integers to one seed.

    Args:
        parts: such as a seed, a step and the number of a draw.

    Returns:
        A 63-bit integer, the same on every machine.

    >>> mix_seed(0, 1, 2) == mix_seed(0, 1, 2), mix_seed(0, 1, 2) == mix_seed(0, 2, 1)
    (True, False)
    """
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def ball(like: Sequence[Tensor], radius: float, seed: int) -> Tensors:
    """Draw uniformly from the ball of the given radius in the space of all tensors together.

    xi = r U^(1/n) N / |N| with N standard normal in R^n, U uniform on [0, 1], n the number of scalars. The global
    random state is neither read nor changed.

    Args:
        like: gives shapes, dtypes and devices; entries are drawn in float32 at least.
        radius: r, at least 0.
        seed: of the draw.

    Returns:
        xi.

    >>> draw = ball((torch.zeros(3), torch.zeros(())), radius=0.5, seed=0)
    >>> bool(norm(draw) <= 0.5), [tuple(t.shape) for t in draw]
    (True, [(3,), ()])
    """
    generators: dict[torch.device, torch.Generator] = {}
    for t in like:
        if t.device not in generators:
            generators[t.device] = torch.Generator(t.device).manual_seed(mix_seed(seed, len(generators)))
    gauss = tuple(
        torch.randn(t.shape, generator=generators[t.device], device=t.device, dtype=accumulator(t).dtype) for t in like
    )
    uniform = torch.rand((), generator=torch.Generator().manual_seed(mix_seed(seed, -1)), dtype=torch.float64)
    length = radius * float(uniform) ** (1.0 / numel(like))
    factor = length / norm(gauss)
    return cut([(g * _like(factor, g)).to(t.dtype) for g, t in zip(gauss, like, strict=True)], like)
