"""The processes that share the data of one problem: averages over them, with and without a graph."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchbilevel.shards import any_sharded, cut, is_sharded, whole
from torchbilevel.tensors import Tensors, detach

if dist.is_available():
    # Its functions hold the default group of the time of their import as a default argument. torch's first optimizer
    # imports them: where that came after init_process_group, the group would outlive destroy_process_group, and gloo's
    # threads abort now and then a process that ends while they hold a tensor.
    import torch.distributed.nn.functional  # noqa: F401


class Ranks:
    """The ranks of a process group, each of which evaluates the losses on batches of its own.

    Every gradient and every product with a second derivative is averaged over the ranks before it enters a solver or a
    recursion. What is computed from averages alone (steps, residuals, tests) is then the same to the last bit on all
    ranks, so that all take the same branches.

    Args:
        group: a process group; ``None`` for the default one, where ``torch.distributed`` is initialised.

    Attributes:
        size: number of ranks; 1, and nothing is exchanged, where there is no process group.
        rank: of this process.
        spread: whether parameters are spread over the ranks (``require_spread`` has met one).

    Cost: one all-reduce per dtype and device for each average, of all tensors together.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        alive = dist.is_available() and dist.is_initialized()
        if group is not None and not alive:
            raise ValueError(f"process_group got {group!r}, but torch.distributed is not initialised")
        self.size: int = dist.get_world_size(group) if alive else 1
        self.rank: int = dist.get_rank(group) if alive else 0
        self.spread = False
        if self.rank < 0:
            raise ValueError("process_group must contain this rank; make the problem on the ranks of the group only")

    def whole(self, tensors: Tensors) -> Tensors:
        """The tensors with all their entries on every rank."""
        return whole(tensors) if self.spread else tensors

    def average(self, tensors: Tensors, like: Tensors = ()) -> Tensors:
        """The mean over the ranks of every tensor, without a graph.

        Args:
            tensors: with all their entries.
            like: the last of the means are spread over the ranks as these are.

        Returns:
            The means.
        """
        if self.size > 1 and tensors:
            tensors = self._together(tensors, lambda flat: self._all_reduce(flat).div_(self.size))
        if self.spread and any_sharded(like):
            first = len(tensors) - len(like)
            tensors = (*tensors[:first], *cut(tensors[first:], like))
        return tensors

    def average_and_any(self, tensors: Tensors, holds: bool, like: Tensors) -> tuple[Tensors, bool]:
        """As ``average``, and whether something holds on any rank, in the same all-reduce."""
        if self.size == 1 or not tensors:
            return self.average(tensors, like), holds
        flag = torch.full((), float(holds), dtype=tensors[0].dtype, device=tensors[0].device)
        share, *found = self.average((flag, *tensors), like)
        return tuple(found), holds or bool(share)

    def shared(self, tensors: Tensors) -> Tensors:
        """The tensors, the same and whole on all ranks; derivatives that come back through them are averaged."""
        if self.size == 1 and not self.spread:
            return tensors
        return tuple(_Shared.apply(self, *tensors))  # type: ignore[no-untyped-call]

    def averaged(self, tensors: Tensors, shared: Tensors, like: Tensors) -> Tensors:
        """The mean over the ranks, with a graph: the derivative of a mean passes on to the summand of this rank.

        Args:
            tensors: made from ``shared`` and the batch of this rank.
            shared: what ``shared`` returned.
            like: the means are spread over the ranks as these are.

        Returns:
            The means; a path leads from them to ``shared`` on every rank, whatever its batch reaches.
        """
        if self.size == 1 and not self.spread:
            return tensors
        return tuple(_Averaged.apply(self, like, *tensors, *shared))  # type: ignore[no-untyped-call]

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copy the tensors of the first rank into those of all others."""
        if self.size > 1:
            first = 0 if self._group is None else dist.get_global_rank(self._group, 0)
            with torch.no_grad():
                for t in tensors:
                    if is_sharded(t):  # its ranks hold different parts of one tensor
                        continue
                    held = t.detach().contiguous()
                    self._checked(dist.broadcast, held, first)
                    t.copy_(held)

    def gather(self, number: float, device: torch.device) -> list[float]:
        """A number of each rank, in order, exchanged on a device: NCCL has no other than those of CUDA."""
        if self.size == 1:
            return [number]
        found = torch.zeros(self.size, dtype=torch.float64, device=device)
        found[self.rank] = number
        return self._all_reduce(found).tolist()

    def require_same(self, name: str, number: int, device: torch.device) -> None:
        """Raise a ValueError, on all ranks, where they were given different numbers."""
        if len(set(self.gather(number % (1 << 53), device))) > 1:  # which float64 holds exactly
            raise ValueError(
                f"{name} must be the same on all ranks, which part ways otherwise, got {number} on rank {self.rank}; "
                "seeds of their own are for the sources of data alone"
            )

    def require_spread(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Raise a ValueError where a parameter is spread over other processes than these, or unfinished."""
        for key, p in parameters.items():
            if not is_sharded(p):
                continue
            self.spread = True
            over = sorted(p.device_mesh.mesh.flatten().tolist())
            ranks = sorted(dist.get_process_group_ranks(self._group or dist.group.WORLD))
            if over != ranks:
                raise ValueError(
                    f"{name}.{key} is spread over the ranks {over}, and the problem averages over {ranks}: make the "
                    "device mesh of the problem's process group"
                )
            if any(placement.is_partial() for placement in p.placements):
                raise ValueError(f"{name}.{key} is a sum that was not formed (Partial); redistribute it to Shard(0)")

    def require_all(self) -> None:
        """Raise a RuntimeError if processes have come together since this was made."""
        if self.size == 1 and self._group is None and Ranks().size > 1:
            raise RuntimeError(
                "the problem was made before torch.distributed.init_process_group, so that every rank would go its own "
                "way: make it after, or give it process_group=dist.new_group([rank]) if that is what you want"
            )

    def _together(self, tensors: Tensors, function: Callable[[Tensor], Tensor]) -> Tensors:
        """Apply a function to all tensors of one dtype and device at once, laid end to end."""
        results: list[Tensor] = list(tensors)
        kinds: dict[Any, list[int]] = {}
        for i, t in enumerate(tensors):
            kinds.setdefault((t.dtype, t.device), []).append(i)
        for members in kinds.values():
            flat = function(torch.cat([tensors[i].reshape(-1) for i in members]))
            for i, piece in zip(members, torch.split(flat, [tensors[i].numel() for i in members]), strict=True):
                results[i] = piece.view(tensors[i].shape)
        return tuple(results)

    def _all_reduce(self, flat: Tensor) -> Tensor:
        self._checked(dist.all_reduce, flat)
        return flat

    def _checked(self, collective: Callable[..., Any], tensor: Tensor, *arguments: Any) -> None:
        try:
            collective(tensor, *arguments, group=self._group)
        except RuntimeError as error:
            if "No backend type" in str(error):
                raise RuntimeError(
                    f"the process group does not serve tensors on {tensor.device}: move the modules to its device "
                    "before making the problem, or call init_process_group() without a backend, for CPUs and GPUs"
                ) from error
            raise RuntimeError(
                f"rank {self.rank} of {self.size} could not average with the others: one of them has stopped, or left "
                f"the common path (its own traceback says why), or the process group timed out ({error})"
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self._group is not None:
            raise TypeError("a problem with a process_group of its own cannot be pickled; save method.state_dict()")
        return Ranks, (), {"spread": self.spread}


class _Averaged(torch.autograd.Function):
    """Forward: the mean over ranks. Backward: the identity, since every rank holds the derivative of the whole.

    Means that are spread over the ranks are cut on the way forward, and their derivatives gathered on the way back.

    What is shared takes no part in the numbers: it is an argument so that the engine comes to ``_Shared``, and to its
    all-reduce, on a rank whose batch reaches none of it, too.
    """

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, like: Tensors, *tensors: Tensor) -> Tensors:
        ctx.idle = len(tensors) - len(like)
        return tuple(ranks.average(detach(tensors[: len(like)]), like))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, None, *whole(gradients), *[None] * ctx.idle


class _Shared(torch.autograd.Function):
    """Forward: the identity. Backward: the mean over ranks of what each finds through its own batch.

    Tensors that are spread over the ranks are gathered on the way forward, and their derivatives cut on the way back.

    What no rank reaches stays without a derivative. Where some ranks reach a tensor and others do not (a part of a
    module that only some batches use), all take part in its average.
    """

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, *tensors: Tensor) -> Tensors:
        ctx.ranks, ctx.kinds = ranks, [(t.shape, t.dtype, t.device) for t in tensors]
        ctx.like = detach(tensors) if ranks.spread else ()
        ctx.set_materialize_grads(False)
        return tuple(s.view_as(s) for s in whole(tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        dense = tuple(
            torch.zeros(shape, dtype=dtype, device=device) if g is None else g
            for g, (shape, dtype, device) in zip(gradients, ctx.kinds, strict=True)
        )
        missing = [i for i, g in enumerate(gradients) if g is None]
        reached = torch.ones(len(dense), dtype=dense[0].dtype, device=dense[0].device)
        for i in missing:
            reached[i] = 0
        reached, *found = ctx.ranks.average((reached, *dense), ctx.like)
        if missing:  # otherwise nobody has to wait for the device
            found = [g if r else None for g, r in zip(found, reached.tolist(), strict=True)]
        return None, *found


def unwrapped(module: Any, name: str) -> Any:
    """The module inside a ``DistributedDataParallel``, whose hooks play no part here.

    Args:
        module: what the user gave.
        name: of the argument, for messages.

    Returns:
        The module itself where it is not wrapped.

    Raises:
        TypeError: if it, or a part of it, is sharded by FSDP or computes on shards, if it is an ``nn.DataParallel``, or
            a part is wrapped.
    """
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return module.module
    if isinstance(module, nn.DataParallel):
        raise TypeError(
            f"{name} is an nn.DataParallel; pass {name}.module and start one process per device with torchrun, which "
            "averages over the processes"
        )
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nobody has a module of it who has not imported it
    for part, inner in module.named_modules() if isinstance(module, nn.Module) else ():
        whose = f"{name}.{part}" if part else name
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            raise TypeError(
                f"{whose} is a DistributedDataParallel inside {name}, which waits for gradients that never come to it: "
                f"put {whose}.module in its place; the problem averages over the processes"
            )
        if fsdp is not None and isinstance(inner, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)):
            raise TypeError(
                f"{whose} is sharded by FSDP, which frees the gathered parameters after each pass, so that its "
                "gradients cannot be differentiated: keep the parameters whole (docs/scaling.md)"
            )
        hooks = (*inner._forward_pre_hooks.values(), *inner._forward_hooks.values())
        if any(getattr(hook, "__module__", "").startswith("torch.distributed.tensor") for hook in hooks):
            raise TypeError(
                f"{whose} computes on sharded inputs or outputs (tensor parallelism), which has no second derivatives: "
                "shard the parameters alone (docs/scaling.md)"
            )
    return module
