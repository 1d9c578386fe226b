"""Decays against the papers' formulas, and what a step makes of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from torchbilevel.decay import Decay, decayed


def test_the_papers_schedules() -> None:
    c, m, eta = 1.5, 20.0, 0.1
    for t in range(5):
        # eta eta_t = eta c / (m + t)^(1/3), with lr = eta c / m^(1/3)
        assert math.isclose(eta * c / m ** (1 / 3) * Decay(offset=m).upper(t), eta * c / (m + t) ** (1 / 3))
        two = Decay(power=0.6, lower_power=0.4)
        assert math.isclose(two.upper(t), (1 + t) ** -0.6) and math.isclose(two.lower(t), (1 + t) ** -0.4)
    assert Decay(power=0.5).lower(3) == Decay(power=0.5).upper(3) == 0.5 and Decay(power=0.0).upper(9) == 1.0


def test_a_block_scales_what_the_rule_names_and_puts_it_back() -> None:
    rule = torch.optim.SGD(
        [{"params": [torch.zeros(1)], "lr": 0.5}, {"params": [torch.zeros(1)], "escape_lr": 2.0}], 0.25
    )
    with pytest.raises(KeyError), decayed(rule, Decay(power=1.0), 1):
        assert [g["lr"] for g in rule.param_groups] == [0.25, 0.125] and rule.param_groups[1]["escape_lr"] == 1.0
        raise KeyError
    assert [g["lr"] for g in rule.param_groups] == [0.5, 0.25] and rule.param_groups[1]["escape_lr"] == 2.0
    rule.decayed = ("momentum",)
    with decayed(rule, Decay(power=1.0), 1):
        assert [g["lr"] for g in rule.param_groups] == [0.5, 0.25]
    with decayed(rule, None, 1):
        assert rule.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"power": -1.0}, "power must be non-negative and finite, got -1.0"),
        ({"lower_power": math.inf}, "lower_power must be non-negative and finite, got inf"),
        ({"offset": 0.0}, "offset must be positive and finite, got 0.0"),
        ({"power": None}, "power must be a number, got None"),
        ({"offset": "5"}, "offset must be a number, got '5'"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        Decay(**options)
