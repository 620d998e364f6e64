"""Which frames a reward scores: known answers, one window a prompt, and gradient to exactly those frames."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rats_video.config.load import load_config
from rats_video.distillation.resume import changed_keys
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.rewards.clip_score import ClipScoreConfig
from rats_video.rewards.frames import (
    EndFramesConfig,
    FrameChoice,
    FrameReward,
    WindowFramesConfig,
    evenly_spaced,
    scored_frames,
)
from rats_video.rewards.prompted import Condition

PROMPTS = ["a red dog runs", "two blue birds", "snow"]


class Brightness(FrameReward):
    """The mean of a frame's pixels."""

    def score_frames(self, frames: Tensor, condition: Condition) -> Tensor:  # noqa: ARG002
        return frames.mean(dim=(1, 2, 3))


def brightness(frames: FrameChoice, chunk: int = 8) -> Brightness:
    return Brightness(ClipScoreConfig(kind="clip_score", frames=frames, chunk=chunk))


def window(count: int) -> WindowFramesConfig:
    return WindowFramesConfig(kind="window", count=count)


@pytest.mark.parametrize(
    ("num_frames", "count", "frames"),
    [
        (5, None, [0, 1, 2, 3, 4]),
        (5, 9, [0, 1, 2, 3, 4]),
        (9, 3, [0, 4, 8]),
        (49, 13, list(range(0, 49, 4))),
        (7, 1, [0]),
    ],
)
def test_evenly_spaced(num_frames: int, count: int | None, frames: list[int]) -> None:
    assert evenly_spaced(num_frames, count).tolist() == frames
    assert scored_frames(num_frames, count, PROMPTS).tolist() == [frames] * 3
    assert brightness(count).looks_at(num_frames).tolist() == frames


@pytest.mark.parametrize(("num_frames", "frames"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (49, [0, 24, 48])])
def test_ends_are_first_middle_and_last(num_frames: int, frames: list[int]) -> None:
    ends = EndFramesConfig(kind="ends")
    assert scored_frames(num_frames, ends, PROMPTS).tolist() == [frames] * 3
    assert brightness(ends).looks_at(num_frames).tolist() == frames


@given(num_frames=st.integers(1, 60), count=st.integers(1, 60), prompts=st.lists(st.text(), min_size=1, max_size=4))
def test_a_window_is_in_a_row_and_the_prompts_own(num_frames: int, count: int, prompts: Sequence[str]) -> None:
    scored = scored_frames(num_frames, window(count), prompts)
    assert scored.shape == (len(prompts), min(count, num_frames))
    assert (scored.diff(dim=1) == 1).all()
    assert scored.min() >= 0
    assert scored.max() < num_frames
    for row, prompt in zip(scored, prompts, strict=True):
        assert torch.equal(row, scored_frames(num_frames, window(count), [prompt])[0])


def test_windows_start_everywhere_about_as_often() -> None:
    starts = scored_frames(9, window(5), [f"prompt {number}" for number in range(2000)])[:, 0]
    assert starts[:4].tolist() == [3, 3, 1, 4]  # remainders of sha256sum by 5
    assert torch.bincount(starts, minlength=5).tolist() == pytest.approx([400] * 5, abs=80)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_a_window_is_scored_and_has_the_gradient(chunk: int) -> None:
    videos = torch.rand(3, 9, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores = brightness(window(4), chunk)(videos, PROMPTS)
    assert scores.frames is not None
    (gradient,) = torch.autograd.grad(scores.clip.sum(), videos)
    assert brightness(window(4)).looks_at(9).tolist() == list(range(9))
    starts = set()
    for row, frames in enumerate(scored_frames(9, window(4), PROMPTS).tolist()):
        starts.add(frames[0])
        levels = videos[row].mean(dim=(1, 2, 3))
        nearest = [min(max(frame, frames[0]), frames[-1]) for frame in range(9)]
        torch.testing.assert_close(scores.frames[row], levels[nearest])
        torch.testing.assert_close(scores.clip[row], levels[frames].mean())
        reached = gradient[row].abs().amax(dim=(1, 2, 3)) > 0
        assert reached.tolist() == [frame in frames for frame in range(9)]
    assert len(starts) > 1  # else a window that is the same for all would pass


def read(*overrides: str) -> DistillConfig:
    return load_config(DistillConfig, "wan21_1b", group="distill", overrides=overrides)


def test_choices_in_a_configuration() -> None:
    chosen = {
        "5": 5,
        "null": None,
        "{kind: window, count: 4}": window(4),
        "{kind: ends}": EndFramesConfig(kind="ends"),
    }
    for text, choice in chosen.items():
        cfg = read(f"reward.frames={text}")
        assert cfg.reward.frames == choice  # type: ignore[union-attr]
        assert DistillConfig.model_validate(cfg.model_dump()) == cfg
    assert changed_keys(read(), read("reward.frames=5")) == ["reward.frames"]
    assert changed_keys(read(), read("reward.frames={kind: ends}")) == ["reward.frames"]
    one, other = (read(f"reward.frames={{kind: window, count: {count}}}") for count in (4, 5))
    assert changed_keys(one, other) == ["reward.frames.count"]


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("0", "--set reward.frames: must be at least 1, got 0"),
        ("many", "--set reward.frames: must be a whole number, got 'many'"),
        ("{kind: windw, count: 3}", "reward.frames.kind: unknown kind 'windw' (did you mean 'window'?)"),
        ("{count: 3}", "reward.frames.kind: required, but missing (choose from window, ends)"),
        ("{kind: window, count: 0}", "reward.frames.count: must be at least 1, got 0"),
        ("{kind: window}", "reward.frames.count: required, but missing"),
        ("{kind: ends, count: 3}", "reward.frames.count: unknown key (valid keys: kind)"),
    ],
)
def test_bad_choice_is_one_line(value: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        read(f"reward.frames={value}")
    assert line in str(caught.value)
