"""The self-test of rewards: it passes sound ones and refuses each way of being unsound, in one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rats_video.distillation.run_rewards import check_rewards
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.rewards.clip_score import PickScoreConfig
from rats_video.rewards.frames import FrameReward, WindowFramesConfig, scored_frames
from rats_video.rewards.prompted import Condition
from rats_video.rewards.self_test import SelfTest, self_test, smooth_clips, smooth_latents
from rats_video.rewards.sum import SumReward, Term
from rats_video.rewards.word import WordReward
from rats_video.types import ClipSpec, RewardScores

CLIP = ClipSpec(num_frames=49, height=16, width=24, fps=8.0)
PROMPTS = ["a dog", "a cat", "two birds"]


class Sound:
    """Brightness, frame by frame."""

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> RewardScores:
        assert tuple(prompts) in {("a dog", "two birds"), ("a dog",), ("two birds",)}
        return self.score(videos.mean(dim=(2, 3, 4)))

    def score(self, frames: Tensor) -> RewardScores:
        return RewardScores(frames.mean(dim=1), frames, {"last": frames[:, -1]})


class FirstFrame(Sound):
    def score(self, frames: Tensor) -> RewardScores:
        return RewardScores(frames[:, 0])


class HonestFirstFrame(FirstFrame):
    def looks_at(self, num_frames: int) -> Tensor:
        return torch.arange(min(1, num_frames))


class Judge(Sound):
    differentiable = False

    def score(self, frames: Tensor) -> RewardScores:
        return RewardScores(frames.mean(dim=1).detach().round(decimals=2))


class Cut(Sound):
    """Claims a gradient it has not."""

    def score(self, frames: Tensor) -> RewardScores:
        return RewardScores(frames.mean(dim=1).detach())


class EveryOther(Sound):
    def score(self, frames: Tensor) -> RewardScores:
        return RewardScores(frames[:, ::2].mean(dim=1))


class BatchMean(Sound):
    def score(self, frames: Tensor) -> RewardScores:
        return RewardScores(frames.mean(dim=1) - frames.mean())


class SlightLeak(Sound):
    def score(self, frames: Tensor) -> RewardScores:
        return RewardScores(frames.mean(dim=1) + 1e-6 * frames.mean())


class Broken(Sound):
    def __init__(self, scores: RewardScores) -> None:
        self.scores = scores

    def score(self, frames: Tensor) -> RewardScores:  # noqa: ARG002
        return self.scores


class RootAtZero(Sound):
    """Its value is fine and its slope is not."""

    def score(self, frames: Tensor) -> RewardScores:
        return RewardScores(frames.mean(dim=1) + (frames * 0).sum(dim=1).sqrt())


def run(reward: Sound, *, with_gradient: bool = True) -> SelfTest:
    return self_test(reward, CLIP, PROMPTS, where="reward", with_gradient=with_gradient)


def test_a_sound_reward_passes_with_known_scores_and_gradient() -> None:
    found = run(Sound())
    found.require_loss()
    torch.testing.assert_close(found.scores.clip.detach(), smooth_clips(CLIP).mean(dim=(1, 2, 3, 4)))
    assert found.gradient is not None
    pixels = 3 * CLIP.height * CLIP.width  # each frame's gradient is 1 / (49 * pixels) in each of them
    torch.testing.assert_close(found.gradient[0], torch.full((49,), pixels**-0.5 / 49))
    assert not found.gradient[1].any()
    assert found.seen == tuple(range(49))


def test_clips_are_smooth_differ_and_are_the_same_each_time() -> None:
    videos = smooth_clips(CLIP)
    assert videos.shape == (2, 49, 3, 16, 24)
    assert 0.1 <= videos.min() < 0.3
    assert 0.7 < videos.max() <= 0.9
    assert torch.equal(videos, smooth_clips(CLIP))
    assert (videos[0] - videos[1]).abs().mean() > 0.1
    assert videos.diff(dim=1).abs().max() < 0.1
    assert videos.diff(dim=1).abs().mean() > 1e-3
    latents = smooth_latents((16, 5, 8, 8))
    assert latents.shape == (2, 16, 5, 8, 8)
    assert abs(latents.mean()) < 0.2


@pytest.mark.parametrize(
    ("reward", "line"),
    [
        (FirstFrame(), "reward: no gradient reaches frames 1 to 48 (say so in its looks_at(num_frames), declare it"),
        (EveryOther(), "reward: no gradient reaches frames 1, 3, 5, ..., 47 ("),
        (Cut(), "reward: no gradient reaches frames 0 to 48 ("),
        (Judge(), "reward: is not differentiable and cannot be a direct loss (set method.policy of rats or"),
        (SlightLeak(), "reward: the gradient of a clip's score reaches another clip (score each clip of a batch"),
        (RootAtZero(), "reward: its gradient is not finite on smooth clips ("),
    ],
)
def test_what_cannot_be_climbed_is_refused_as_a_loss_alone(reward: Sound, line: str) -> None:
    found = run(reward)
    with pytest.raises(UserError) as caught:
        found.require_loss()
    assert str(caught.value).startswith(line)
    assert len(str(caught.value).splitlines()) == 1
    assert run(reward, with_gradient=False).gradient is None


def test_frames_it_does_not_claim_need_no_gradient() -> None:
    found = run(HonestFirstFrame())
    found.require_loss()
    assert found.seen == (0,)


TWO, NAN = torch.ones(2), torch.tensor([1.0, torch.nan])


@pytest.mark.parametrize(
    ("reward", "line"),
    [
        (BatchMean(), "reward: a clip's score depends on the batch: [0."),
        (Broken(RewardScores(torch.ones(3))), "reward: clip of two clips of 49 frames must be [2], got [3]"),
        (Broken(RewardScores(torch.ones(2, 1))), "reward: clip of two clips of 49 frames must be [2], got [2, 1]"),
        (Broken(RewardScores(TWO, torch.ones(2, 48))), "reward: frames of two clips of 49 frames must be [2, 49], got"),
        (Broken(RewardScores(TWO, None, {"a": torch.ones(())})), "reward: parts['a'] of two clips of 49 frames must"),
        (Broken(RewardScores(NAN)), "reward: clip of a smooth clip is not finite: [1.0, nan]"),
        (Broken(RewardScores(TWO, None, {"a": TWO / 0})), "reward: parts['a'] of a smooth clip is not finite: [inf,"),
    ],
)
def test_unsound_scores_are_refused_whatever_they_are_for(reward: Sound, line: str) -> None:
    with pytest.raises(UserError) as caught:
        run(reward, with_gradient=False)
    assert str(caught.value).startswith(line)


class LatentMean:
    """Of latent frames; `ignored` of them count for nothing."""

    def __init__(self, ignored: int) -> None:
        self.ignored = ignored

    def score_latents(self, latents: Tensor, prompts: Sequence[str]) -> RewardScores:
        assert len(prompts) == len(latents)
        return RewardScores(latents[:, :, self.ignored :].mean(dim=(1, 2, 3, 4)))


def test_latent_rewards_are_tested_on_latents() -> None:
    def tested(ignored: int) -> SelfTest:
        return self_test(LatentMean(ignored), CLIP, PROMPTS, where="reward", latent_shape=(4, 13, 2, 3))

    found = tested(0)
    found.require_loss()
    assert found.gradient is not None
    torch.testing.assert_close(found.gradient[0], torch.full((13,), 24**-0.5 / 13))
    with pytest.raises(UserError, match="no gradient reaches frames 0 to 1 "):
        tested(2).require_loss()


@pytest.mark.parametrize("change", ["method.reward_weight=0", "method.reward_weight=1"])
def test_a_run_checks_its_rewards_as_far_as_it_uses_them(
    make_config: Callable[..., DistillConfig], captions: tuple[str, ...], change: str
) -> None:
    class Blind:
        def __call__(self, videos: Tensor, prompts: Sequence[str]) -> RewardScores:  # noqa: ARG002
            return RewardScores(videos[:, 0].mean(dim=(1, 2, 3)))

    class Bright:
        def __call__(self, videos: Tensor, prompts: Sequence[str]) -> RewardScores:  # noqa: ARG002
            return RewardScores(videos.mean(dim=(1, 2, 3, 4)))

    cfg, cpu = make_config(change), torch.device("cpu")
    both = {"bright": Term(Bright()), "blind": Term(Blind())}
    check_rewards(cfg, SumReward(both | {"blind": Term(Blind(), weight=0.0)}), captions, cpu)
    expected = {"reward": Blind(), "reward.terms.blind.reward": SumReward(both)}
    for key, reward in expected.items():
        if cfg.method.reward_weight:
            with pytest.raises(UserError, match=rf"^{key}: no gradient reaches frames 1 to 4 "):
                check_rewards(cfg, reward, captions, cpu)
        else:
            check_rewards(cfg, reward, captions, cpu)


def test_frames_that_the_prompt_chooses() -> None:
    class Light(FrameReward):
        def score_frames(self, frames: Tensor, condition: Condition) -> Tensor:  # noqa: ARG002
            return frames.mean(dim=(1, 2, 3))

    cfg = PickScoreConfig(kind="pickscore", frames=WindowFramesConfig(kind="window", count=4))
    found = self_test(Light(cfg), CLIP, PROMPTS, where="reward")
    found.require_loss()
    assert found.seen == tuple(scored_frames(CLIP.num_frames, cfg.frames, PROMPTS[:1])[0].tolist())
    assert found.gradient is not None
    assert tuple(found.gradient[0].nonzero().flatten().tolist()) == found.seen


def test_a_run_tests_its_heldout_reward_too(
    make_config: Callable[..., DistillConfig],
    reward_folders: tuple[Path, Path],
    captions: tuple[str, ...],
    tmp_path: Path,
) -> None:
    words = WordReward.load(reward_folders[0])
    with torch.no_grad():
        words.clip_head[-1].weight.fill_(3e38)  # finite, but not what follows
    words.save(tmp_path)
    sound = WordReward.load(reward_folders[0])
    with pytest.raises(UserError, match=r"^heldout_reward: clip of a smooth clip is not finite: "):
        check_rewards(make_config(f"heldout_reward.path={tmp_path}"), sound, captions, torch.device("cpu"))
