"""Outer rules: optimisers for any PyTorch loss which do not stop at saddle points."""

from torchbilevel.optim.base import Event, Result, Rule
from torchbilevel.optim.perturbed import Perturbed
from torchbilevel.optim.perturbed_gd import PerturbedGD

__all__ = ["Event", "Perturbed", "PerturbedGD", "Result", "Rule"]
