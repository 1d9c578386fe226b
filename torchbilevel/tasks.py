"""``TaskBatch``: the tasks of a meta-batch side by side in one module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.parameter import is_lazy


class TaskBatch(nn.Module):
    """A copy of a network for every task of a meta-batch, all evaluated at once under ``torch.func.vmap``.

    As ``lower`` of a problem it makes y = (y_1, ..., y_m): every trainable parameter of ``net`` gets a leading
    dimension m = ``tasks``, and starts as m copies of what ``net`` has. Then

        min over x   1/m sum_i f_i(x, y_i*(x)),     y_i*(x) = argmin over y_i of g_i(x, y_i),

    so the lower loss is the *sum* of the tasks' losses: no task sees another, and a step size means the same for one
    task and for many (a mean would divide every step by m). The upper loss is, as a rule, their mean. Solvers know of
    the tasks: ``CG`` takes one step size, one residual and one stopping test per task, ``Direct`` one matrix, and lower
    solvers with a ``tol`` stop task by task, so numbers equal those of a loop over tasks. MAML is

        def loss(tasks, batch):
            return tasks.losses(F.cross_entropy, *batch)

        problem = tb.BilevelProblem(
            upper=net, lower=tb.TaskBatch(net, tasks=32), lower_init=lambda net: net.parameters(),
            lower_loss=lambda net, tasks, batch: loss(tasks, batch).sum(),
            upper_loss=lambda net, tasks, batch: loss(tasks, batch).mean())
        method = tb.ITDBiO(problem, lr=1e-3, lower_solver=tb.GD(lr=0.4, steps=5), warm_start=False)

    What ``lower_init`` returns may have the shapes of ``net``; every task then starts there.

    In a loss, the parameters of the module have the leading dimension too: iMAML's proximal term is
    ``sum((p - q).square().sum() for p, q in zip(tasks.parameters(), net.parameters()))``. A dropout draws different
    numbers for every task. Parameters frozen by ``requires_grad_(False)`` before, and buffers, are shared by the tasks;
    the network that is given is copied and stays as it is.

    Args:
        net: the network of one task; its losses must not depend on buffers that it updates.
        tasks: m, the number of tasks in every batch, at least 1.

    Attributes:
        net: the copy that holds the parameters; as such it cannot be called.
        tasks: as given.

    Raises:
        TypeError: if ``net`` is no module.
        ValueError: if ``tasks`` is not a positive integer; if ``net`` has no trainable parameter, or one without a
            shape yet, or keeps running statistics of batches.

    Cost: as the loop over tasks in arithmetic and memory, in one call. Oracle counts take a batch of tasks as one
    call on m data points.

    Reference: the setting is that of Finn, Abbeel and Levine, ICML 2017 (MAML), and of Rajeswaran, Finn, Kakade and
    Levine, NeurIPS 2019 (iMAML).

    Differs from the paper: nothing. ``Tasks``, of ``RSVRB``, is something else: data of many lower problems of which a
    call draws a few and keeps estimates for all, while here every call evaluates all of its tasks.

    >>> import torch
    >>> tasks = TaskBatch(nn.Linear(3, 2), tasks=4)
    >>> tasks(torch.zeros(4, 5, 3)).shape, [tuple(p.shape) for p in tasks.parameters()]
    (torch.Size([4, 5, 2]), [(4, 2, 3), (4, 2)])
    >>> tasks.losses(nn.functional.cross_entropy, torch.zeros(4, 5, 3), torch.zeros(4, 5, dtype=torch.long)).shape
    torch.Size([4])
    """

    def __init__(self, net: nn.Module, tasks: int) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(f"net must be an nn.Module, got {type(net).__name__}")
        if isinstance(tasks, bool) or not isinstance(tasks, int) or tasks < 1:
            raise ValueError(f"tasks must be a positive integer, got {tasks!r}")
        self._separate = _vetted(net)
        self.net, self.tasks = copy.deepcopy(net), tasks
        stacked: dict[int, nn.Parameter] = {}
        for module in self.net.modules():
            for name, p in module._parameters.items():
                if p is not None and p.requires_grad:
                    if id(p) not in stacked:  # a tied weight has several places
                        stacked[id(p)] = nn.Parameter(p.detach().expand(tasks, *p.shape).clone())
                    module._parameters[name] = stacked[id(p)]

    def extra_repr(self) -> str:
        """The number of tasks, for ``print``."""
        return f"tasks={self.tasks}"

    def forward(self, *inputs: Any) -> Any:
        """The outputs of all tasks.

        Args:
            inputs: of ``net``, with a leading dimension ``tasks``: tensors, or tuples, lists and dicts of them.

        Returns:
            What ``net`` returns, with a leading dimension ``tasks``.
        """
        return self._each(lambda own, *inputs: functional_call(self.net, own, inputs), inputs)

    def losses(self, loss: Callable[..., Tensor], inputs: Any, *targets: Any) -> Tensor:
        """The loss of every task: ``loss(net(inputs), *targets)`` with its own parameters, inputs and targets.

        Args:
            loss: as for one task, such as ``F.cross_entropy``.
            inputs: of ``net``, with a leading dimension ``tasks``; a tuple where it has several.
            targets: likewise.

        Returns:
            A tensor of shape (tasks,): take its ``sum()`` as lower loss and its ``mean()`` as upper loss.
        """
        values: Tensor = self._each(
            lambda own, inputs, *targets: loss(functional_call(self.net, own, inputs), *targets), (inputs, *targets)
        )
        return values

    def _each(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        for t in _tensors(arguments):
            if t.shape[:1] != (self.tasks,):
                raise ValueError(
                    f"every tensor needs a leading dimension of tasks={self.tasks}, one entry per task, got the shape "
                    f"{tuple(t.shape)}; t.expand({self.tasks}, ...) gives all tasks the same"
                )
        own = {name: p for name, p in self.net.named_parameters() if name in self._separate}
        return vmap(function, randomness="different")(own, *arguments)


def tasks_of(lower: nn.Module) -> int | None:
    """The number of tasks that a lower module holds side by side.

    Args:
        lower: the lower module of a problem.

    Returns:
        Their number; ``None`` if it is no ``TaskBatch``.

    Raises:
        ValueError: if a ``TaskBatch`` is only a part of it, or a parameter that the tasks share is trainable.
    """
    for name, module in lower.named_modules():
        if isinstance(module, TaskBatch) and module is not lower:
            raise ValueError(
                f"lower.{name} is a TaskBatch; make it the lower module itself, all of whose parameters are tasks' own"
            )
    if not isinstance(lower, TaskBatch):
        return None
    for name, p in lower.net.named_parameters():
        if p.requires_grad and name not in lower._separate:
            raise ValueError(
                f"lower.net.{name} was frozen when the TaskBatch was made, so the tasks share it: freeze it again, or "
                f"put what is shared and learned into the upper module"
            )
    return lower.tasks


def _vetted(net: nn.Module) -> frozenset[str]:
    """The names of the parameters that every task gets a copy of."""
    for name, module in net.named_modules():
        if getattr(module, "running_mean", None) is not None:
            where = f"net.{name}" if name else "net"
            raise ValueError(
                f"{where} ({type(module).__name__}) keeps running statistics, which tasks side by side would mix: give "
                f"it track_running_stats=False (then each task uses the statistics of its batch), or use GroupNorm or "
                f"LayerNorm; torch.func.replace_all_batch_norm_modules_(net) does the first in place"
            )
    trainable = {name: p for name, p in net.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("net has no trainable parameter, of which every task could have its own")
    for name, p in trainable.items():
        if is_lazy(p):
            raise ValueError(f"net.{name} has no shape yet; run a lazy module once before making the TaskBatch")
    return frozenset(trainable)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping | list | tuple):
        values: Iterable[Any] = tree.values() if isinstance(tree, Mapping) else tree
        for value in values:
            yield from _tensors(value)
