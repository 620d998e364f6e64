"""Calibration's numbers against known answers, and its effect on a gate and a sum."""

from __future__ import annotations

import math

import pytest
import torch

from rats_video.evaluation.calibration import GATE_AT_START, compare, opposed_frames, significant, tau_for, unit_weights
from rats_video.methods.gate import SigmoidGateConfig, sigmoid_gate
from rats_video.seeds import seeded
from rats_video.types import RewardScores

PROMPTS = ["a", "b", "c", "d"]


def test_known_comparison() -> None:
    found = compare(torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([0.0, 1.0, 3.5, 1.5]), PROMPTS)
    assert found.mean == 2.25  # 18 / 8
    # squares of 1, 2, 3, 6, 0, 1, 3.5, 1.5 less 2.25: 1.5625, .0625, .5625, 14.0625, 5.0625, 1.5625, 1.5625, .5625
    assert found.spread == pytest.approx(math.sqrt(25 / 7))
    assert found.lead.mean == 1.5  # of 1, 1, -0.5, 4.5
    assert found.lead.ci95 == pytest.approx(3.182446 * math.sqrt(13.5 / 3 / 4), rel=1e-6)  # t of 3 degrees
    assert found.typical_lead == 1.0  # of 0.5, 1, 1, 4.5
    assert found.wins == 0.75
    assert not found.sees_teacher


def test_a_lead_beyond_doubt_is_seen_and_only_upwards() -> None:
    base = torch.rand(16, generator=seeded(1))
    noise = 0.1 * torch.rand(16, generator=seeded(2))
    prompts = [str(i) for i in range(16)]
    assert compare(base + 0.5 + noise, base, prompts).sees_teacher
    assert not compare(base - 0.5 + noise, base, prompts).sees_teacher


def test_tau_puts_the_gate_where_it_is_said_to_be() -> None:
    cfg = SigmoidGateConfig(kind="sigmoid", tau=tau_for(0.3))
    assert cfg.tau == pytest.approx(0.15)  # what `tiny` has, whose typical lead is about 0.3

    def gate(lead: float) -> float:
        teacher, student = RewardScores(torch.tensor([lead])), RewardScores(torch.tensor([0.0]))
        return float(sigmoid_gate(teacher, student, cfg, 4))

    assert gate(0.3) == pytest.approx(GATE_AT_START, abs=1e-3)
    assert gate(0.0) == 0.5
    assert gate(-0.3) == pytest.approx(1 - GATE_AT_START, abs=1e-3)


def test_weights_keep_their_proportion_and_make_the_sum_of_unit_spread() -> None:
    independent = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    scores = {name: values / values.std() for name, values in zip("ab", independent, strict=True)}
    found = unit_weights({"a": 3.0, "b": -4.0}, scores)
    assert found == {"a": pytest.approx(0.6), "b": pytest.approx(-0.8)}  # spreads add as squares: 5
    same = unit_weights({"a": 1.0, "b": 1.0, "c": 0.0}, {"a": scores["a"], "b": scores["a"], "c": scores["b"]})
    assert same == {"a": pytest.approx(0.5), "b": pytest.approx(0.5), "c": 0.0}


def test_frames_that_contradict_their_clip() -> None:
    leads = torch.tensor([[1.0, 1.0, -1.0, 3.0], [-2.0, 1.0, -2.0, 0.0]])  # of clips that lead by 1 and -0.75
    base = torch.rand(2, 4, generator=seeded(3)).round(decimals=2)
    assert opposed_frames(base + leads, base) == 2 / 8
    assert opposed_frames(base + 1, base) == 0


@pytest.mark.parametrize(
    ("value", "digits", "rounded"), [(20.1234, 3, 20.1), (-0.0123456, 3, -0.0123), (1234.5, 3, 1230.0), (0.0, 3, 0.0)]
)
def test_significant_digits(value: float, digits: int, rounded: float) -> None:
    assert significant(value, digits) == rounded
