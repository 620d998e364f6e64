"""Scoring an arm: every clip's own score, means with intervals, honest counts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rats_video.backbones.wan import WanBackbone
from rats_video.evaluation.sweep import ArmScores, EvaluatedModel, reward_measure, score_arm, shapes_measure
from rats_video.inference.sampler import SamplerSpec, sample_videos
from rats_video.types import ClipSpec, Reward


def brightness(videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    return {"brightness": videos.mean(dim=(1, 2, 3, 4)), "length": torch.tensor([float(len(p)) for p in prompts])}


def test_row_is_means_with_intervals() -> None:
    scores = ArmScores(
        "student",
        SamplerSpec(4, 3.0),
        prompts=["a", "b", "c", "d"],
        seconds=[0.1, 0.1, 0.3, 0.3],
        metrics={"reward": [1.0, 2.0, 3.0, 6.0], "flat": [2.0, 2.0, 2.0, 2.0]},
    )
    row = scores.row()
    assert (row.arm, row.num_steps, row.nfe, row.num_clips) == ("student", 4, 4, 4)
    assert row.seconds_per_clip == pytest.approx(0.2)
    assert row.metrics["reward"].mean == 3.0
    assert row.metrics["reward"].ci95 == pytest.approx(3.182446 * (14 / 3 / 4) ** 0.5)  # Student's t, 3 degrees
    assert (row.metrics["flat"].mean, row.metrics["flat"].ci95) == (2.0, 0.0)


def test_clips_of_one_prompt_are_one_unit() -> None:
    scores = ArmScores("base", SamplerSpec(1, 3.0), ["a", "a", "b", "b"], [1.0] * 4, {"reward": [1.0, 2.0, 3.0, 6.0]})
    reward = scores.row().metrics["reward"]
    assert reward.mean == 3.0
    assert reward.ci95 == pytest.approx(12.7062 * 1.5, rel=1e-4)  # means 1.5 and 4.5, t of 1 degree


def test_metrics_are_aligned_with_the_clips(
    loaded: WanBackbone, clip: ClipSpec, captions: tuple[str, ...], color_reward: Reward
) -> None:
    prompts = captions[:5]
    spec = SamplerSpec(2, 3.0)
    done: list[tuple[int, int]] = []
    scores = score_arm(
        EvaluatedModel("base", loaded, spec), prompts, clip, [brightness, reward_measure("reward", color_reward)],
        seed=4, batch_size=2, made=lambda calls, clips, seconds: done.append((calls, clips)) if seconds > 0 else None,
    )  # fmt: skip
    assert scores.prompts == list(prompts)
    assert done == [(4, 2), (4, 2), (2, 1)]  # network evaluations and clips, batch by batch
    (whole,) = sample_videos(loaded, prompts, clip, spec, seed=4)
    assert scores.metrics["brightness"] == pytest.approx(whole.videos.mean(dim=(1, 2, 3, 4)).tolist(), abs=1e-6)
    assert len(set(scores.metrics["brightness"])) == 5
    assert scores.metrics["length"] == [len(prompt) for prompt in prompts]
    assert scores.metrics["reward"] == pytest.approx(color_reward(whole.videos, prompts).clip.tolist(), abs=1e-6)
    assert len(scores.seconds) == 5
    assert min(scores.seconds) > 0


@pytest.mark.parametrize(("scale", "nfe"), [(1.0, 3), (2.0, 6)])
def test_guidance_doubles_nfe(loaded: WanBackbone, clip: ClipSpec, scale: float, nfe: int) -> None:
    spec = SamplerSpec(3, 3.0, scale)
    rows: list[int] = []
    handle = loaded.denoiser.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    scores = score_arm(
        EvaluatedModel("teacher", loaded, spec), ["a red circle"] * 2, clip, [brightness], seed=0, batch_size=2
    )
    handle.remove()
    row = scores.row()
    assert (row.num_steps, row.nfe) == (3, nfe)
    assert sum(rows) / 2 == nfe


def test_shapes_measures_are_named(loaded: WanBackbone, clip: ClipSpec, captions: tuple[str, ...]) -> None:
    (samples,) = sample_videos(loaded, captions[:2], clip, SamplerSpec(1, 3.0), seed=0)
    measures = shapes_measure(samples.videos, samples.prompts)
    assert list(measures) == [
        "adherence", "smoothness", "constancy", "speed", "color", "shape", "direction", "background"
    ]  # fmt: skip
    words = [measures[name] for name in ("speed", "color", "shape", "direction", "background")]
    torch.testing.assert_close(measures["adherence"], torch.stack(words).mean(dim=0))
