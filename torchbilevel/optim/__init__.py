"""Outer rules: optimisers for any PyTorch loss which do not stop at saddle points."""

from torchbilevel.optim.base import Event, Result, Rule
from torchbilevel.optim.negative_curvature import NegativeCurvature
from torchbilevel.optim.neon import NEON, NEON2
from torchbilevel.optim.perturbed import Perturbed
from torchbilevel.optim.perturbed_gd import PerturbedGD
from torchbilevel.optim.pullback import Pullback

__all__ = ["NEON", "NEON2", "Event", "NegativeCurvature", "Perturbed", "PerturbedGD", "Pullback", "Result", "Rule"]
