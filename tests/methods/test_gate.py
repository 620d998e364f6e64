"""The gate's direction, its values, and the map from pixel frames to latent frames."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rats_video.diffusion.causal import pool_to_latent_frames, with_hidden_frames
from rats_video.errors import UserError
from rats_video.methods.gate import ConstantGateConfig, SigmoidGateConfig, build_gate
from rats_video.types import RewardScores


def scores(*clip: float, frames: Tensor | None = None) -> RewardScores:
    return RewardScores(torch.tensor(clip), frames)


def gate(teacher: RewardScores, student: RewardScores, **options: object) -> Tensor:
    cfg = SigmoidGateConfig.model_validate({"kind": "sigmoid", "tau": 0.5, **options})
    return build_gate(cfg, temporal_stride=4)(teacher, student)


def test_direction_guidance_is_strong_while_the_teacher_leads() -> None:
    weight = gate(scores(1.0, 0.0, 0.5, 50.0, -50.0), scores(0.0, 1.0, 0.5, 0.0, 0.0))[:, 0]
    assert weight[0] > 0.5 > weight[1]
    assert weight[2] == 0.5
    assert weight[3] == pytest.approx(1.0)
    assert weight[4] == pytest.approx(0.0, abs=1e-6)


def test_known_values() -> None:
    expected = [[1 / (1 + math.exp(-2.0))], [1 / (1 + math.exp(1.0))]]
    assert gate(scores(1.0, 0.0), scores(0.0, 0.5)).tolist() == [pytest.approx(row) for row in expected]
    halved = gate(scores(1.0, 0.0), scores(0.0, 0.5), tau=0.25)
    assert halved.flatten().tolist() == pytest.approx([1 / (1 + math.exp(-4.0)), 1 / (1 + math.exp(2.0))])


def test_floor_always_remains() -> None:
    weight = gate(scores(-50.0, 0.0, 50.0), scores(0.0, 0.0, 0.0), floor=0.2)
    assert weight.flatten().tolist() == pytest.approx([0.2, 0.6, 1.0])


def test_frame_scores_give_a_weight_a_latent_frame() -> None:
    teacher = scores(0.0, frames=torch.tensor([[1.0, 0, 0, 0, 0, 2, 2, 2, 2]]))
    student = scores(9.0, frames=torch.tensor([[0.0, 1, 1, 1, 1, 0, 2, 4, 2]]))
    weight = gate(teacher, student)
    assert weight.shape == (1, 3)
    assert weight[0].tolist() == pytest.approx([1 / (1 + math.exp(-2.0)), 1 / (1 + math.exp(2.0)), 0.5])
    by_clip = gate(teacher, student, level="clip")
    assert by_clip.shape == (1, 1)
    assert by_clip.item() == pytest.approx(1 / (1 + math.exp(18.0)))


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_without_frame_scores_on_both_sides_there_is_one_weight_a_clip(side: str) -> None:
    whole, clip_only = scores(1.0, 2.0, frames=torch.zeros(2, 5)), scores(1.0, 2.0)
    pair = (clip_only, whole) if side == "teacher" else (whole, clip_only)
    assert gate(*pair).tolist() == [[0.5], [0.5]]


@pytest.mark.parametrize("cfg", [SigmoidGateConfig(kind="sigmoid"), ConstantGateConfig(kind="constant", weight=0.3)])
def test_carries_no_gradient(cfg: SigmoidGateConfig | ConstantGateConfig) -> None:
    student = RewardScores(torch.zeros(2, requires_grad=True), torch.zeros(2, 5, requires_grad=True))
    weight = build_gate(cfg, 4)(scores(0.0, 0.0, frames=torch.zeros(2, 5)), student)
    assert not weight.requires_grad


def test_constant() -> None:
    assert build_gate(ConstantGateConfig(kind="constant", weight=0.3), 4)(
        scores(9.0, 0.0), scores(0.0, 9.0)
    ).tolist() == [
        [pytest.approx(0.3)],
        [pytest.approx(0.3)],
    ]


def test_frame_pooling_follows_the_causal_map() -> None:
    assert pool_to_latent_frames(torch.arange(9.0)[None], 4).tolist() == [[0.0, 2.5, 6.5]]
    assert pool_to_latent_frames(torch.arange(7.0)[None], 2).tolist() == [[0.0, 1.5, 3.5, 5.5]]
    assert pool_to_latent_frames(torch.tensor([[3.0], [4.0]]), 4).tolist() == [[3.0], [4.0]]


def test_a_part_of_the_reward_may_drive_it() -> None:
    teacher = RewardScores(torch.tensor([9.0]), torch.zeros(1, 5), {"heldout": torch.tensor([1.0])})
    student = RewardScores(torch.tensor([0.0]), torch.zeros(1, 5), {"heldout": torch.tensor([0.0])})
    assert gate(teacher, student, part="heldout").tolist() == [[pytest.approx(1 / (1 + math.exp(-2.0)))]]
    with pytest.raises(UserError, match=r"method\.gate\.part: the reward has no part 'x' \(its parts: heldout\)"):
        gate(teacher, student, part="x")


def test_frames_that_no_pixel_shows_get_the_weight_of_the_first() -> None:
    weights = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    assert torch.equal(with_hidden_frames(weights, 4), weights[:, [0, 0, 1, 2]])
    assert torch.equal(with_hidden_frames(weights, 3), weights)
    assert torch.equal(with_hidden_frames(weights[:, :1], 4), weights[:, :1])
