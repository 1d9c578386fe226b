"""What Lightning does with a module that optimizes manually, where it is not installed: the same calls and order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class LightningModule(nn.Module):
    """The part of ``lightning.pytorch.LightningModule`` that manual optimization uses."""

    trainer: Trainer
    automatic_optimization = True

    def optimizers(self) -> Any:
        return self.trainer.optimizer

    def lr_schedulers(self) -> Any:
        return self.trainer.scheduler

    def manual_backward(self, loss: Tensor) -> None:
        loss.backward()


class LightningOptimizer:
    """Stands before the optimizer as Lightning's does: of its class, but with a ``__dict__`` of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.__class__ = type(f"Lightning{type(optimizer).__name__}", (type(self), type(optimizer)), {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self.optimizer.step(closure=closure or (lambda: None))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


class Trainer:
    """Calls ``configure_optimizers`` once and ``training_step`` for every batch."""

    def __init__(self, max_epochs: int, accelerator: str, **_: Any) -> None:
        self.max_epochs, self.device = max_epochs, {"gpu": "cuda"}.get(accelerator, accelerator)

    def fit(self, module: Any, train_dataloaders: dict[str, Any]) -> None:
        module.trainer = self
        module.to(self.device).train()
        chosen = module.configure_optimizers()
        self.optimizer, self.scheduler = LightningOptimizer(chosen["optimizer"]), chosen["lr_scheduler"]
        for _ in range(self.max_epochs):
            for i, batch in enumerate(zip(*train_dataloaders.values(), strict=False)):
                with torch.enable_grad():
                    module.training_step(dict(zip(train_dataloaders, batch, strict=True)), i)
