"""Arithmetic on tuples of tensors: the vectors of the whole package."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


def accumulator(t: Tensor) -> Tensor:
    """Lift half-precision tensors to float32, in which all sums are formed."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


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
    if len(a) == 1:
        return torch.dot(accumulator(a[0]).reshape(-1), accumulator(b[0]).reshape(-1))
    parts = [torch.dot(accumulator(s).reshape(-1), accumulator(t).reshape(-1)) for s, t in zip(a, b, strict=True)]
    dtype = parts[0].dtype
    for p in parts[1:]:
        dtype = torch.promote_types(dtype, p.dtype)
    total = parts[0].to(dtype)
    for p in parts[1:]:
        total = total + p.to(device=total.device, dtype=dtype)
    return total


def norm(a: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all entries of all tensors, as a 0-d tensor."""
    return dot(a, a).sqrt()


def add(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensors:
    """The sum a + b."""
    return tuple(s + t for s, t in zip(a, b, strict=True))


def sub(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensors:
    """The difference a - b."""
    return tuple(s - t for s, t in zip(a, b, strict=True))


def scale(alpha: float | Tensor, a: Sequence[Tensor]) -> Tensors:
    """The multiple alpha a; each tensor keeps its dtype and device."""
    return tuple(t * _like(alpha, t) for t in a)


def axpy(alpha: float | Tensor, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensors:
    """The combination alpha a + b; each tensor keeps its dtype and device."""
    if isinstance(alpha, Tensor):
        return tuple(t + s * _like(alpha, s) for s, t in zip(a, b, strict=True))
    return tuple(torch.add(t, s, alpha=alpha) for s, t in zip(a, b, strict=True))


def add_scaled_(a: Sequence[Tensor], alpha: Tensor, b: Sequence[Tensor]) -> None:
    """In place, a += alpha b with a 0-d tensor alpha: one kernel per tensor and no wait for the device."""
    for s, t in zip(a, b, strict=True):
        s.addcmul_(t, alpha.to(s.device, s.dtype))


def _like(alpha: float | Tensor, t: Tensor) -> float | Tensor:
    """A scalar for arithmetic with ``t``: on its device, and of its dtype where both are 0-d and would be promoted."""
    if not isinstance(alpha, Tensor):
        return alpha
    return alpha.to(t.device, t.dtype) if t.dim() == 0 else alpha.to(t.device)


def zeros(like: Sequence[Tensor]) -> Tensors:
    """Zeros of the same shapes."""
    return tuple(torch.zeros_like(t) for t in like)


def detach(a: Iterable[Tensor]) -> Tensors:
    """The same tensors without their graphs; storage is shared."""
    return tuple(t.detach() for t in a)


def clone(a: Iterable[Tensor]) -> Tensors:
    """Detached copies that share no storage with ``a``."""
    return tuple(t.detach().clone() for t in a)


def leaves(a: Iterable[Tensor]) -> Tensors:
    """Detached aliases that require gradients: the points at which derivatives are taken."""
    return tuple(t.detach().requires_grad_() for t in a)


def numel(a: Iterable[Tensor]) -> int:
    """Number of scalars in all tensors together."""
    return sum(t.numel() for t in a)


def is_finite(*groups: Sequence[Tensor]) -> bool:
    """Whether every entry of every tensor is finite (one synchronisation per device)."""
    # A sum is finite only if no entry is NaN or infinite; a finite tensor whose sum overflows is caught by the
    # elementwise test, which therefore runs only after the cheap one has failed.
    tensors = [t for group in groups for t in group]
    total: dict[torch.device, Tensor] = {}
    for t in tensors:
        s = accumulator(t.detach()).sum()
        total[t.device] = total[t.device] + s if t.device in total else s
    if all(bool(torch.isfinite(s)) for s in total.values()):
        return True
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def flatten(a: Sequence[Tensor]) -> Tensor:
    """One vector of all entries, on the device of the first tensor and in the widest dtype."""
    dtype = a[0].dtype
    for t in a[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return torch.cat([t.reshape(-1).to(a[0].device, dtype) for t in a])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> Tensors:
    """The inverse of ``flatten``: pieces of a vector in the shapes, dtypes and devices of ``like``."""
    pieces = vector.split_with_sizes([t.numel() for t in like])
    return tuple(v.reshape(t.shape).to(t.device, t.dtype) for v, t in zip(pieces, like, strict=True))


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
    return tuple((g * _like(factor, g)).to(t.dtype) for g, t in zip(gauss, like, strict=True))
