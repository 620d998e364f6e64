"""Latents of two parts: each has its own shaping, and a gate by the reward that sees it or hears it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rats_video.condition import Condition
from rats_video.diffusion.guidance import PLAIN
from rats_video.diffusion.schedule import sigma_grid
from rats_video.errors import UserError
from rats_video.methods.base import StepsConfig
from rats_video.methods.gate import SigmoidGateConfig, build_gate, gate_parts
from rats_video.methods.rats import Rats, RatsConfig
from rats_video.methods.scoring import score_clips, score_pixels
from rats_video.methods.shaping import ShapingConfig, frame_distance, shaping_of_parts
from rats_video.methods.teacher import FrozenTeacherConfig, TeacherSampler
from rats_video.rewards.sum import SumReward, Term
from rats_video.seeds import seeded
from rats_video.sound import Sound
from rats_video.types import Guide, PromptBatch, RewardScores, Trajectory

PICTURES, SOUND = 2, 3  # latent frames of each part


class Toy(nn.Module):
    """Makes the same clip from any noise: `video` in two latent frames, `audio` in three behind them."""

    def __init__(self, video: float, audio: float) -> None:
        super().__init__()
        self.video, self.audio = nn.Parameter(torch.tensor(video)), nn.Parameter(torch.tensor(audio))

    def velocity(self, latents: Tensor, sigma: Tensor, _condition: Condition) -> Tensor:
        x0 = torch.cat([self.video.expand(PICTURES), self.audio.expand(SOUND)]).view(1, 1, -1, 1, 1)
        return (latents - x0) / sigma.view(-1, 1, 1, 1, 1)

    def encode_text(self, prompts: Sequence[str]) -> Condition:
        return Condition(torch.zeros(len(prompts), 1, 1))

    def sigmas(self, num_steps: int, shift: float) -> Tensor:
        return sigma_grid(num_steps, shift)

    def guidance(self, _further: object = None) -> Guide:
        return PLAIN

    def split(self, latents: Tensor) -> Mapping[str, Tensor]:
        return {"video": latents[:, :, :PICTURES], "audio": latents[:, :, PICTURES:]}

    def decode(self, latents: Tensor, _grad_frames: range | None = None) -> Tensor:
        return self.split(latents)["video"].transpose(1, 2).expand(-1, -1, 3, 1, 1)

    def decode_sound(self, latents: Tensor) -> Sound:
        return Sound(self.split(latents)["audio"].flatten(2), 3)


def seen(videos: Tensor, _prompts: Sequence[str]) -> RewardScores:
    """Best at 2, where the teacher is not."""
    return RewardScores(-(videos - 2).square().mean(dim=(1, 2, 3, 4)))


class Heard:
    """Best at 0, where the teacher is; its slope is too gentle to lead there soon."""

    hears, sees = True, False

    def __call__(self, _videos: Tensor, _prompts: Sequence[str], sound: Sound) -> RewardScores:
        clip = -0.05 * sound.waves.square().mean(dim=(1, 2))
        return RewardScores(clip, judged={"audio": clip})


def deaf(reward: SumReward) -> Any:
    """The same reward without a word on what judges which part."""

    class Deaf:
        hears = True

        def __call__(self, videos: Tensor, prompts: Sequence[str], sound: Sound) -> RewardScores:
            scores = reward(videos, prompts, sound)
            return RewardScores(scores.clip, judged={"video": scores.clip, "audio": scores.clip})

    return Deaf()


def both() -> SumReward:
    return SumReward({"picture": Term(seen), "sound": Term(Heard())})


def trained(reward: Any, steps: int = 60) -> tuple[Toy, dict[str, float]]:
    student, teacher = Toy(1.5, 3.0), Toy(0.0, 0.0)
    gate = SigmoidGateConfig(kind="sigmoid", tau=0.15)
    config = RatsConfig(gate=gate, shaping=ShapingConfig(motion_weight=0.0))
    sampler = TeacherSampler(
        teacher,
        reward,
        FrozenTeacherConfig(kind="frozen", num_steps=1, guidance_scale=1.0),
        1.0,  # type: ignore[arg-type]
    )
    rats = Rats(
        student, sampler, reward, StepsConfig(num_steps=(1,)), 1.0, gate=build_gate(gate, 1), config=config  # type: ignore[arg-type]
    )  # fmt: skip
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    for index in range(steps):
        noise = torch.randn(2, 1, PICTURES + SOUND, 1, 1, generator=seeded(index))
        loss, row = rats.step(PromptBatch(index, ("a", "b"), noise, num_steps=1, seeds=(1, 2)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student, row


def test_the_gate_holds_one_part_and_frees_the_other() -> None:
    """The student leads in what is seen, the teacher in what is heard. One gate for both would let go of the sound."""
    student, row = trained(both())
    assert row["gate/weight"] < 0.01
    assert student.video.item() == pytest.approx(2.0, abs=0.02)  # past the teacher, to the reward's best
    assert abs(student.audio.item()) < 0.6  # held by the teacher, whose lead is nearly gone
    assert row["gate/audio"] > 0.45

    other, row = trained(deaf(both()))
    assert row["gate/audio"] == row["gate/weight"] < 0.01
    assert other.video.item() == pytest.approx(2.0, abs=0.02)
    assert other.audio.item() > 2.0  # nothing but the reward's gentle slope brings it on


def test_the_step_has_each_parts_numbers() -> None:
    _, row = trained(both(), steps=1)
    assert row["shaping/0.000"] == pytest.approx(1.5**2)
    assert row["shaping/audio/0.000"] == pytest.approx(3.0**2)
    lead = 0.05 * 3.0**2
    assert row["gate/audio"] == pytest.approx(float(torch.sigmoid(torch.tensor(lead / 0.15))))
    rewards = -((1.5 - 2) ** 2) - lead
    shaping = (row["gate/weight"] * 1.5**2 + row["gate/audio"] * 3.0**2) / 2  # each part counts alike
    assert row["reward/student"] == pytest.approx(rewards)
    assert row["loss"] == pytest.approx(-rewards + shaping)
    assert row["reward/student/sound"] == pytest.approx(-lead)


def test_parts_of_a_sum_are_judged_by_their_own_terms() -> None:
    latents = torch.arange(5.0).view(1, 1, 5, 1, 1)
    reward = SumReward({"picture": Term(seen, 2.0, mean=-1.0), "sound": Term(Heard(), 3.0, spread=0.5)})
    scores = score_clips(reward, Toy(0.0, 0.0), latents, ["a"])  # type: ignore[arg-type]
    picture, sound = -(4 + 1) / 2, -0.05 * (4 + 9 + 16) / 3
    assert scores.judged["video"].tolist() == pytest.approx([2 * (picture + 1)])
    assert scores.judged["audio"].tolist() == pytest.approx([3 * sound / 0.5])
    assert scores.clip.tolist() == pytest.approx([2 * (picture + 1) + 3 * sound / 0.5])
    alone = score_clips(SumReward({"picture": Term(seen)}), Toy(0.0, 0.0), latents, ["a"])  # type: ignore[arg-type]
    assert dict(alone.judged) == {}


def test_what_nothing_judges_is_held_in_full() -> None:
    gate = build_gate(SigmoidGateConfig(kind="sigmoid", tau=0.5), 1)
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    weights = gate_parts(gate, RewardScores(one), RewardScores(other), ("video", "audio"))
    assert weights["video"].flatten().tolist() == pytest.approx([0.8808, 0.1192], abs=1e-4)
    assert weights["audio"].tolist() == [[1.0], [1.0]]
    heard = [RewardScores(each, judged={"audio": each}) for each in (one, other)]
    weights = gate_parts(gate, heard[0], heard[1], ("video", "audio"))
    assert weights["video"].tolist() == [[1.0], [1.0]]
    assert weights["audio"].flatten().tolist() == pytest.approx([0.8808, 0.1192], abs=1e-4)


def test_shaping_of_a_part_is_over_its_own_frames() -> None:
    """No motion is seen from the last picture to the first of the sound."""
    ours, theirs = torch.randn(2, 2, 3, 5, 2, 1, generator=seeded(1))
    paths = [Trajectory((0.0,), (latents,), 1) for latents in (ours, theirs)]
    found = shaping_of_parts(Toy(0.0, 0.0).split, *paths, ShapingConfig(motion_weight=0.5))
    assert {part: tuple(each.shape) for part, each in found.items()} == {"video": (1, 2, 2), "audio": (1, 2, 3)}
    residual = ours - theirs
    for part, own in (("video", residual[:, :, :2]), ("audio", residual[:, :, 2:])):
        torch.testing.assert_close(found[part][0], frame_distance(own, 0.5))


def test_a_sound_that_is_not_finite_is_no_score() -> None:
    waves = torch.ones(2, 1, 3)
    waves[1, 0, 0] = torch.nan
    scores = score_pixels(both(), torch.zeros(2, 2, 3, 1, 1), ["a", "b"], Sound(waves, 3))
    assert scores.clip.isfinite().tolist() == scores.judged["audio"].isfinite().tolist() == [True, False]


def test_a_reward_that_hears_needs_a_sound() -> None:
    line = r"^reward: hears clips, and these have no sound \(choose rewards that look at pixels, or a model whose clips"
    with pytest.raises(UserError, match=line):
        score_pixels(both(), torch.zeros(2, 2, 3, 1, 1), ["a", "b"])
