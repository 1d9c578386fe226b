"""A torch optimizer whose groups and state are those of the rule behind it: what a method owes to torch."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from torchbilevel.shards import cut, gathered


class Facade(torch.optim.Optimizer):
    """Forwards groups, state and defaults to a rule as live properties, and has one checkpoint for both.

    Args:
        rule: the optimizer behind.
    """

    def __init__(self, rule: torch.optim.Optimizer) -> None:
        self.rule = rule
        super().__setstate__({})  # the hooks of torch.optim.Optimizer, without groups and state of our own

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The rule's parameter groups, live."""
        return self.rule.param_groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """The rule's state, live."""
        return self.rule.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The rule's defaults."""
        return self.rule.defaults

    # --- one checkpoint for both ---

    @abstractmethod
    def _kind(self) -> str:
        """Whose state fits."""

    @abstractmethod
    def _memory(self) -> dict[str, Any]:
        """What to save besides the rule's state: plain containers of tensors, numbers and strings."""

    @abstractmethod
    def _restore(self, memory: Mapping[str, Any]) -> None:
        """Take over what ``_memory`` returned."""

    def state_dict(self) -> dict[str, Any]:
        """The rule's state, the estimator's memory and y.

        x is not in it, as in torch, nor are buffers: save ``problem.upper.state_dict()`` beside it, and
        ``problem.lower.state_dict()`` where the lower module has buffers.

        Returns:
            The dict of the rule with one more entry, "method": plain containers of tensors, numbers and strings.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        outer = self.rule.state_dict()
        # Once more in a tuple, which torch.distributed.checkpoint loads whole: of a dict it loads the entries that are
        # there already, and the state of a new optimizer is empty.
        # A tensor that is spread over ranks is saved whole, so that any number of ranks may go on with it.
        state = {**outer, "method": {"kind": self._kind(), "state": (outer["state"],), **self._memory()}}
        state = gathered(state)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from where ``state_dict`` was taken; y is written into the lower module.

        Args:
            state_dict: what ``state_dict`` returned; it is not changed.

        Raises:
            ValueError: if it does not come from a method of the same parts and shapes; nothing has changed then.
        """
        state = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state)
            state = state if changed is None else dict(changed)
        if "method" not in state:
            raise ValueError(
                f"state_dict must have the entry 'method', got {sorted(state)}: plain torch optimizers and "
                "torch.distributed.checkpoint do not keep it; save method.state_dict() as it is"
            )
        own = state.pop("method")
        if own["kind"] != self._kind():
            raise ValueError(f"state_dict must come from a method with {self._kind()}, got one with {own['kind']}")
        (whole,) = own["state"]
        if not _alike(state["state"], whole):
            state["state"] = whole
        self.rule.load_state_dict(deepcopy(state))  # torch would go on using its tensors
        for p, entries in self.rule.state.items():
            for key, t in entries.items():
                if isinstance(t, Tensor) and t.shape == p.shape:
                    (entries[key],) = cut((t,), (p,))
        self._restore(own)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    # --- copies ---

    def __getstate__(self) -> dict[str, Any]:
        # For deepcopy and pickle. Hooks stay behind, as in torch, and so does the ``step`` that a scheduler patches in:
        # both are bound to the original. Attributes of the rule that torch leaves behind (LBFGS has some) come along.
        def own(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
            return {k: v for k, v in vars(optimizer).items() if k != "step" and not k.startswith("_optimizer_")}

        return {**own(self), "rule_attributes": own(self.rule)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        attributes = state.pop("rule_attributes")
        super().__setstate__(state)
        vars(self.rule).update(attributes)

    # --- the rest of torch's contract ---

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler asks for this before it steps, which makes it the place to refuse.
        raise TypeError(
            "GradScaler scales the loss before backward, and a method's backward starts from its own losses, unscaled: "
            "use bfloat16 autocast inside the losses, without GradScaler"
        )


def _alike(a: Any, b: Any) -> bool:
    """Whether nested dicts, lists and tuples have the same entries."""
    if isinstance(b, dict):
        return isinstance(a, dict) and a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in b)
    if isinstance(b, list | tuple):
        return isinstance(a, list | tuple) and len(a) == len(b) and all(map(_alike, a, b))
    return True
