"""bfloat16 inside the losses, float32 everywhere else: how far from float32?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchbilevel as tb


class Decay(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.full((n,), -1.0))


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "linear":
        return nn.Linear(20, 3)
    if name == "perceptron":
        return nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3))
    return nn.Sequential(
        nn.Unflatten(1, (1, 20)), nn.Conv1d(1, 4, 5), nn.Softplus(), nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 3)
    )


def hypergradients(name: str, autocast: bool) -> dict[str, Tensor]:
    """Of three estimators, at one point on one batch."""
    g = torch.Generator().manual_seed(1)
    rows, labels = torch.randn(256, 20, generator=g), torch.randint(3, (256,), generator=g)

    def fit(lower: nn.Module, half: slice) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = lower(rows[half])
        assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
        return nn.functional.cross_entropy(out.float(), labels[half])

    def lower_loss(upper: Decay, lower: nn.Module, batch: None) -> Tensor:
        penalties = torch.stack([p.square().sum() for p in lower.parameters()])
        return fit(lower, slice(0, 128)) + (upper.log.exp() * penalties).sum()

    def upper_loss(upper: Decay, lower: nn.Module, batch: None) -> Tensor:
        return fit(lower, slice(128, 256))

    found = {}
    for label, estimator in {
        "CG": tb.Implicit(tb.GD(0.2, 30), tb.CG(10, tol=1e-2)),
        "Neumann": tb.Implicit(tb.GD(0.2, 30), tb.Neumann(10, 0.2)),
        "Unrolled": tb.Unrolled(tb.GD(0.2, 30)),
    }.items():
        lower = network(name)
        problem = tb.BilevelProblem(
            Decay(len(list(lower.parameters()))), lower, upper_loss=upper_loss, lower_loss=lower_loss
        )
        estimator.bind(problem).backward()
        (found[label],) = (p.grad for p in problem.upper_parameters)
        assert found[label].dtype == torch.float32 and all(t.dtype == torch.float32 for t in problem.y)
    return found


@pytest.mark.parametrize(("name", "bound"), [("linear", 0.01), ("perceptron", 0.05), ("convolution", 0.1)])
def test_autocast_is_close_to_float32(name: str, bound: float) -> None:
    """bfloat16 carries less than three digits, and errors of 30 steps and ten products add up."""
    exact, autocast = hypergradients(name, False), hypergradients(name, True)
    for label, v in exact.items():
        error = float((autocast[label] - v).norm() / v.norm())
        assert 1e-5 < error < bound, (label, error)  # and it is not float32 after all
