"""A weighted sum of rewards: its value, its gradient, what it passes on, and the configuration of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.planning.judge import reward_on_meta
from rats_video.rewards.base import frames_seen, is_differentiable
from rats_video.rewards.reward import build_reward, reward_folders
from rats_video.rewards.sum import SumReward, SumRewardConfig, Term
from rats_video.seeds import seeded
from rats_video.types import RewardScores

VIDEOS = torch.rand(2, 5, 3, 6, 6, generator=seeded(1))
PROMPTS = ("a", "bb")
MakeConfig = Callable[..., DistillConfig]


class Brightness:
    """Frame by frame, of two frames alone."""

    def looks_at(self, num_frames: int) -> Tensor:
        return torch.tensor([0, num_frames - 1])

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> RewardScores:  # noqa: ARG002
        frames = videos.mean(dim=(2, 3, 4))
        return RewardScores(frames.mean(dim=1), frames, {"red": videos[:, :, 0].mean(dim=(1, 2, 3))})


class Length:
    """Of the prompt: a clip score that no gradient reaches."""

    differentiable = False

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> RewardScores:  # noqa: ARG002
        return RewardScores(torch.tensor([float(len(prompt)) for prompt in prompts]))

    def check_prompts(self, prompts: Sequence[str]) -> None:
        if "" in prompts:
            raise UserError("nothing to judge")


class Contrast:
    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> RewardScores:  # noqa: ARG002
        return RewardScores(videos.flatten(1).std(dim=1))

    def looks_at(self, num_frames: int) -> Tensor:  # noqa: ARG002
        return torch.tensor([1])


def test_known_sum_of_clips_and_frames() -> None:
    reward = SumReward({
        "bright": Term(Brightness(), weight=2.0, mean=0.4, spread=0.1),
        "length": Term(Length(), weight=-0.5, mean=1.0, spread=4.0),
    })  # fmt: skip
    scores = reward(VIDEOS, PROMPTS)
    light = VIDEOS.mean(dim=(2, 3, 4))
    lengths = torch.tensor([0.0, -0.125])  # -0.5 * (1 - 1) / 4 and -0.5 * (2 - 1) / 4
    assert scores.frames is not None
    torch.testing.assert_close(scores.clip, 20 * (light.mean(dim=1) - 0.4) + lengths)
    torch.testing.assert_close(scores.frames, 20 * (light - 0.4) + lengths[:, None])
    torch.testing.assert_close(scores.frames.mean(dim=1), scores.clip)
    assert list(scores.parts) == ["bright", "bright/red", "length"]
    torch.testing.assert_close(scores.parts["bright"], light.mean(dim=1))
    torch.testing.assert_close(scores.parts["bright/red"], VIDEOS[:, :, 0].mean(dim=(1, 2, 3)))
    assert scores.parts["length"].tolist() == [1.0, 2.0]


def test_frames_only_where_a_term_has_them() -> None:
    clips = {"length": Term(Length()), "contrast": Term(Contrast())}
    assert SumReward(clips)(VIDEOS, PROMPTS).frames is None
    frames = SumReward(clips | {"bright": Term(Brightness())})(VIDEOS, PROMPTS).frames
    assert frames is not None
    assert frames.shape == (2, 5)


def test_gradient_is_the_weighted_sum_of_theirs() -> None:
    videos = VIDEOS.clone().requires_grad_()
    reward = SumReward({"a": Term(Brightness(), 3.0, 9.0, 2.0), "b": Term(Contrast(), -2.0, 9.0, 4.0)})
    (gradient,) = torch.autograd.grad(reward(videos, PROMPTS).clip.sum(), videos)
    (bright,) = torch.autograd.grad(Brightness()(videos, PROMPTS).clip.sum(), videos)
    (contrast,) = torch.autograd.grad(Contrast()(videos, PROMPTS).clip.sum(), videos)
    torch.testing.assert_close(gradient, 1.5 * bright - 0.5 * contrast)


def test_a_term_of_weight_0_is_logged_and_nothing_else() -> None:
    videos = VIDEOS.clone().requires_grad_()
    ignored = SumReward({"bright": Term(Brightness()), "length": Term(Length(), weight=0.0)})
    scores, alone = ignored(videos, PROMPTS), SumReward({"bright": Term(Brightness())})(videos, PROMPTS)
    torch.testing.assert_close(scores.clip, alone.clip, rtol=0, atol=0)
    assert scores.parts["length"].tolist() == [1.0, 2.0]
    assert ignored.differentiable
    unseen = SumReward({"length": Term(Length()), "bright": Term(Brightness(), weight=0.0)})(videos, PROMPTS)
    assert not unseen.parts["bright"].requires_grad
    assert unseen.frames is None


def test_it_claims_what_its_terms_claim() -> None:
    both = SumReward({"a": Term(Brightness()), "b": Term(Contrast())})
    assert is_differentiable(both)
    assert frames_seen(both, 5).tolist() == [0, 1, 4]
    with_judge = SumReward({"a": Term(Brightness()), "judge": Term(Length())})
    assert not is_differentiable(with_judge)
    assert frames_seen(with_judge, 5).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="nothing to judge"):
        with_judge.check_prompts(["a", ""])
    both.check_prompts([""])


def sum_config(make_config: MakeConfig, folders: tuple[Path, Path], *changes: str) -> SumRewardConfig:
    terms = (f"reward.terms.words.reward.path={folders[0]}", f"reward.terms.volume.reward.path={folders[1]}")
    cfg = make_config("reward.kind=sum", *terms, *changes).reward
    assert isinstance(cfg, SumRewardConfig)
    return cfg


def test_configured_sum_is_that_of_its_rewards(
    make_config: MakeConfig, folders: tuple[Path, Path], captions: tuple[str, ...]
) -> None:
    changes = ("reward.terms.words.weight=2", "reward.terms.words.mean=-0.5", "reward.terms.volume.spread=0.25")
    cfg = sum_config(make_config, folders, *changes)
    assert reward_folders(cfg, where="reward") == list(folders)
    cpu = torch.device("cpu")
    reward = build_reward(cfg, cpu, where="reward")
    videos = torch.rand(2, 5, 3, 32, 32, generator=seeded(2))
    with torch.no_grad():
        scores = reward(videos, captions[:2])
        words, volume = (
            build_reward(term.reward, cpu, where="reward")(videos, captions[:2]) for term in cfg.terms.values()
        )
    torch.testing.assert_close(scores.clip, 2 * (words.clip + 0.5) + 4 * volume.clip)
    assert scores.frames is not None
    assert words.frames is not None
    assert volume.frames is not None
    torch.testing.assert_close(scores.frames, 2 * (words.frames + 0.5) + 4 * volume.frames)
    torch.testing.assert_close(scores.parts["words/quality"], words.parts["quality"])

    planned = reward_on_meta(cfg, where="reward")
    assert isinstance(reward, SumReward)
    assert isinstance(planned, SumReward)
    assert {p.device.type for p in planned.parameters()} == {"meta"}
    assert [p.shape for p in planned.parameters()] == [p.shape for p in reward.parameters()]


@pytest.fixture(name="folders")
def _folders(reward_folders: tuple[Path, Path]) -> tuple[Path, Path]:
    return reward_folders


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (("reward.terms.words.reward.kind=hue",), "--set reward.terms.words.reward.kind: unknown kind 'hue'"),
        (("reward.terms.words.spread=0",), "--set reward.terms.words.spread: "),
        (("reward.terms.words.wieght=2",), "--set reward.terms.words.wieght: unknown key (did you mean 'weight'?)"),
        (("reward.terms.words.weight=0", "reward.terms.volume.weight=0"), ": reward: every term has weight 0"),
        (("reward.terms.words.reward.kind=sum",), "--set reward.terms.words.reward.kind: unknown kind 'sum'"),
    ],
)
def test_bad_sums_are_one_line(
    make_config: MakeConfig, folders: tuple[Path, Path], changes: tuple[str, ...], line: str
) -> None:
    with pytest.raises(UserError) as caught:
        sum_config(make_config, folders, *changes)
    assert line in str(caught.value)


def test_a_sum_has_terms(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"reward\.terms: .* at least 1"):
        make_config("reward.kind=sum", "reward.terms={}")


def test_missing_folder_names_its_term(make_config: MakeConfig, folders: tuple[Path, Path]) -> None:
    cfg = sum_config(make_config, folders, "reward.terms.volume.reward.path=nowhere")
    for look in (
        lambda: build_reward(cfg, torch.device("cpu"), where="reward"),
        lambda: reward_on_meta(cfg, where="reward"),
        lambda: reward_folders(cfg, where="reward"),
    ):
        with pytest.raises(UserError, match=r"^reward\.terms\.volume\.reward\.path: no such folder: nowhere"):
            look()


def test_a_latent_reward_is_no_term(make_config: MakeConfig, folders: tuple[Path, Path]) -> None:
    class Latent:
        def score_latents(self, latents: Tensor, prompts: Sequence[str]) -> RewardScores: ...

    def build(*_: Any) -> Any:
        return Latent()

    with pytest.raises(UserError, match=r"^heldout\.terms\.words\.reward: scores latents"):
        SumReward.of(sum_config(make_config, folders), "heldout", build)


def test_weights_are_finite(make_config: MakeConfig, folders: tuple[Path, Path]) -> None:
    for value in (math.inf, math.nan):
        with pytest.raises(UserError, match=r"reward\.terms\.words\.weight"):
            sum_config(make_config, folders, f"reward.terms.words.weight=.{str(value)[:3]}")
