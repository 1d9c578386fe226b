"""Estimators of the hypergradient: a field, a lower solver and a memory."""

from torchbilevel.estimators.base import Estimator
from torchbilevel.estimators.danskin import Danskin
from torchbilevel.estimators.evaluation import Evaluation, LinearSolveWarning
from torchbilevel.estimators.implicit import Implicit
from torchbilevel.estimators.penalty import Penalty
from torchbilevel.estimators.probe import Probe
from torchbilevel.estimators.recursion import Hybrid, Plain, Recursion, Spider, Storm
from torchbilevel.estimators.shared_inverse import SharedInverse
from torchbilevel.estimators.unrolled import Unrolled

__all__ = [
    "Danskin",
    "Estimator",
    "Evaluation",
    "Hybrid",
    "Implicit",
    "LinearSolveWarning",
    "Penalty",
    "Plain",
    "Probe",
    "Recursion",
    "SharedInverse",
    "Spider",
    "Storm",
    "Unrolled",
]
