"""``verify=``: a method's own claim is checked by a certificate, and a saddle that passed its test is left."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from torchbilevel.certificate import Certificate, certify_samples
from torchbilevel.optim.base import Rule
from torchbilevel.problem import Problem
from torchbilevel.samples import Samples
from torchbilevel.shards import cut
from torchbilevel.tensors import Tensors, axpy, mix_seed


@dataclass(frozen=True)
class Verify:
    """How a method checks its own claim.

    When the method's test says that x passed, ``certify`` is run there. An epsilon-local minimum gets the claim
    ``"verified"``; a strict saddle is left by x <- x + step_length v, v the eigenvector of the smallest eigenvalue on
    the descent side, and the run goes on; anything else withdraws the claim, and the run goes on.

    Args:
        step_length: of the step off a saddle, in units of x, positive; |lambda_min| / rho in theory.
        curvature_tol: epsilon_H, positive; default sqrt(rho * grad_tol) with an estimated rho.
        grad_tol: epsilon, positive; default that of the method.
        batch: minimax: the data of the certificate; default the samples of the last ``backward``.
        lower: bilevel: likewise for the lower loss; give both or none.
        upper: bilevel: likewise for the upper loss.

    Raises:
        ValueError: if an argument is out of range.
    """

    step_length: float
    curvature_tol: float | None = None
    grad_tol: float | None = None
    batch: Any = None
    lower: Any = None
    upper: Any = None

    def __post_init__(self) -> None:
        for name in ("step_length", "curvature_tol", "grad_tol"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")

    def require(self, problem: Problem, rule: torch.optim.Optimizer) -> None:
        """Refuse a rule that claims nothing, and a problem that ``certify`` cannot judge.

        Args:
            problem: the problem.
            rule: the rule.

        Raises:
            ValueError: if there would be nothing to verify, or no way to.
        """
        if not isinstance(rule, Rule) or not (getattr(rule, "needs_probe", False) or getattr(rule, "value_test", True)):
            raise ValueError(
                f"verify= checks the claim of a rule that tests its answer, and {type(rule).__name__} makes none: use "
                "Pullback, NEON or NegativeCurvature, or set value_test=True"
            )
        if problem.constrains_x:
            raise ValueError("verify= needs a free x, and the problem has an upper_projection")

    def check(self, problem: Problem, x: Tensors, samples: Samples, grad_tol: float, seed: int) -> Certificate:
        """The certificate at x.

        Args:
            problem: the problem, whose lower module gives the start of y.
            x: the point that passed.
            samples: of the last ``backward``, used where no data were given.
            grad_tol: of the method, used where none was given.
            seed: of the random start of Lanczos.

        Returns:
            The certificate.
        """
        if not (self.batch is None and self.lower is None and self.upper is None):
            samples = problem.sample(self.batch, self.lower, self.upper, seed=mix_seed(seed, 0))
        grad_tol = grad_tol if self.grad_tol is None else self.grad_tol
        return certify_samples(problem, samples, x, grad_tol=grad_tol, curvature_tol=self.curvature_tol, seed=seed)

    def leave(self, certificate: Certificate, x: Tensors) -> Tensors:
        """The point one step off a saddle: x + step_length v."""
        return axpy(self.step_length, cut(certificate.eigenvector, x), x)
