"""The learned reward: its score by hand, gradient to every frame, files that load back or are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rats_video.errors import UserError
from rats_video.rewards.word import Encoder, WordReward
from rats_video.seeds import seeded

WORDS = ["red", "blue", "circle", "left"]
PROMPTS = ["a RED circle", "a blue thing moving left", "red blue circle left"]
ENCODERS: list[Encoder] = ["frames", "volume"]


@pytest.fixture(params=ENCODERS)
def reward(request: pytest.FixtureRequest) -> WordReward:
    torch.manual_seed(0)
    return WordReward(WORDS, request.param, width=16)


@pytest.fixture
def videos() -> Tensor:
    return torch.rand(3, 9, 3, 32, 32, generator=seeded(1))


def log_probability(logit: float) -> float:
    return -math.log1p(math.exp(-logit))


def alignment(logits: Sequence[float], words: Sequence[int]) -> float:
    return sum(log_probability(logits[w]) for w in words) / len(words)


def test_score_is_the_formula(reward: WordReward, videos: Tensor) -> None:
    with torch.no_grad():
        clip, frames = reward.logits(videos)
        scores = reward(videos, PROMPTS)
    assert (clip.shape, frames.shape) == ((3, 5), (3, 9, 5))
    assert scores.frames is not None
    for row, words in enumerate(([0, 2], [1, 3], [0, 1, 2, 3])):
        by_frame = [alignment(frames[row, frame].tolist(), words) for frame in range(9)]
        by_clip = (alignment(clip[row].tolist(), words) + sum(by_frame) / 9) / 2
        assert scores.clip[row].item() == pytest.approx(by_clip + 0.1 * log_probability(clip[row, -1].item()), rel=1e-5)
        for frame in range(9):
            expected = by_frame[frame] + 0.1 * log_probability(frames[row, frame, -1].item())
            assert scores.frames[row, frame].item() == pytest.approx(expected, rel=1e-5)
    total = scores.parts["alignment"] + 0.1 * scores.parts["quality"]
    torch.testing.assert_close(scores.clip, total)
    assert (scores.clip < 0).all()


def test_clips_do_not_touch_each_other(reward: WordReward, videos: Tensor) -> None:
    with torch.no_grad():
        together = reward(videos, PROMPTS)
        alone = reward(videos[1:2], PROMPTS[1:2])
    torch.testing.assert_close(together.clip[1:2], alone.clip, atol=1e-6, rtol=1e-5)
    assert together.frames is not None
    assert alone.frames is not None
    torch.testing.assert_close(together.frames[1:2], alone.frames, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("num_frames", [1, 5, 17])
def test_gradient_reaches_every_frame_and_every_row_of_pixels(reward: WordReward, num_frames: int) -> None:
    videos = torch.rand(2, num_frames, 3, 32, 32, generator=seeded(2)).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(videos, PROMPTS[:2]).clip.sum(), videos)
    assert (gradient.abs().amax(dim=(2, 3, 4)) > 1e-9).all()
    assert (gradient.abs().amax(dim=(1, 2, 4)) > 1e-9).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("prompt", ["", "a zebra", "a reddish circles"])
def test_prompt_without_a_known_word(reward: WordReward, videos: Tensor, prompt: str) -> None:
    with pytest.raises(UserError, match=r"knows no word of .*use red, blue, circle, left"):
        reward(videos[:2], ["red", prompt])


def test_mentioned_words(reward: WordReward) -> None:
    assert reward.mentioned_words(PROMPTS).int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 1, 1]]


def test_saved_and_loaded_is_the_same_and_frozen(reward: WordReward, videos: Tensor, tmp_path: Path) -> None:
    reward.save(tmp_path / "reward")
    again = WordReward.load(tmp_path / "reward")
    weights = again.state_dict()
    assert weights.keys() == reward.state_dict().keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in reward.state_dict().items())
    reward.requires_grad_(requires_grad=False)  # oneDNN convolves otherwise with weights that need gradient
    ours, theirs = reward(videos, PROMPTS), again(videos, PROMPTS)
    assert torch.equal(ours.clip, theirs.clip)
    assert again.words == tuple(WORDS)
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize(
    "damage",
    [
        "no folder", "no config.json", "no model.safetensors", "config is no JSON", "config is a list",
        "config of other keys", "config of other width", "truncated weights", "weights are text",
    ],
)  # fmt: skip
def test_damaged_folder_is_one_line(reward: WordReward, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "reward"
    reward.save(folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    match damage:
        case "no folder":
            folder = tmp_path / "nowhere"
        case "no config.json":
            config.unlink()
        case "no model.safetensors":
            weights.unlink()
        case "config is no JSON":
            config.write_text("{")
        case "config is a list":
            config.write_text("[1]")
        case "config of other keys":
            config.write_text(json.dumps(reward.config | {"depth": 3}))
        case "config of other width":
            config.write_text(json.dumps(reward.config | {"width": 24}))
        case "truncated weights":
            weights.write_bytes(weights.read_bytes()[:-8])
        case "weights are text":
            weights.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="not a word reward") as caught:
        WordReward.load(folder)
    assert str(caught.value).startswith(f"{folder}: ")
    assert len(str(caught.value).splitlines()) == 1
