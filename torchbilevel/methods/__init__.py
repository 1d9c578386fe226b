"""Methods: one class per paper, a pair of an estimator and a rule each."""

from torchbilevel.methods.bilevel import AIDBiO, ITDBiO
from torchbilevel.methods.escaping import PerturbedAID, PerturbedGDmax
from torchbilevel.methods.minimax import GDmax

__all__ = ["AIDBiO", "GDmax", "ITDBiO", "PerturbedAID", "PerturbedGDmax"]
