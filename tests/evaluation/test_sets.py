"""What the clips of an arm tell together: distances, and a student that has collapsed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Generator, Tensor

from rats_video.backbones.wan import WanBackbone
from rats_video.evaluation.features import pixel_features
from rats_video.evaluation.sets import Reference, diversity, fill_sets, prompt_distances, set_notes
from rats_video.evaluation.sweep import ArmScores, EvaluatedModel, score_arm
from rats_video.inference.sampler import SamplerSpec, sample_videos
from rats_video.seeds import seeded
from rats_video.types import ClipSpec

SPEC = SamplerSpec(2, 3.0)
LOOKS = {"features": lambda videos: videos.mean(dim=(1, 3, 4)), "pixels": pixel_features}


class Collapsed(WanBackbone):
    """Draws the same noise whatever the seed: one clip a prompt."""

    def sample_noise(self, batch: int, clip: ClipSpec, generator: Generator) -> Tensor:
        del generator
        return super().sample_noise(batch, clip, seeded(0))


def arm(name: str, features: Tensor, prompts: Sequence[str], again: Sequence[str] = ()) -> ArmScores:
    scores = ArmScores(name, SPEC, list(prompts), [1.0] * len(prompts), again=list(again))
    scores.features = {"features": features}
    return scores


def scored(backbone: WanBackbone, name: str, clip: ClipSpec, prompts: Sequence[str]) -> ArmScores:
    return score_arm(
        EvaluatedModel(name, backbone, SPEC), prompts, clip, [], seed=1, batch_size=4, looks=LOOKS, again=prompts
    )


def test_a_collapsed_student_is_at_zero_and_an_independent_one_at_its_teachers(
    loaded: WanBackbone, clip: ClipSpec, captions: tuple[str, ...]
) -> None:
    collapsed = loaded.with_own_denoiser()
    collapsed.__class__ = Collapsed
    prompts = captions[:3]
    arms = [scored(loaded, "teacher", clip, prompts), scored(loaded, "same", clip, prompts),
            scored(collapsed, "student", clip, prompts)]  # fmt: skip
    fill_sets(arms, None)
    teacher, same, student = (each.sets for each in arms)
    for name in ("diversity", "pixel_diversity"):
        assert teacher[name].mean > 1e-4
        assert (teacher[f"{name}_share"].mean, teacher[f"{name}_share"].ci95) == (1, 0)
        assert same[f"{name}_share"].mean == 1
        assert student[name].mean == pytest.approx(0, abs=1e-6)
        assert student[f"{name}_share"].mean == pytest.approx(0, abs=1e-4)
    assert "fvd" in student
    assert "fvd" not in teacher  # it is the reference
    assert set_notes(arms)[0].startswith("FVD and KVD: distance to the teacher's clips, in 3 features")
    assert "3 prompts, with 3 more clips" in set_notes(arms)[-1]


def test_more_clips_are_other_clips_and_are_not_measured(
    loaded: WanBackbone, clip: ClipSpec, captions: tuple[str, ...]
) -> None:
    prompts, again = captions[:3], captions[:2]
    scores = score_arm(
        EvaluatedModel("base", loaded, SPEC), prompts, clip,
        [lambda videos, _: {"mean": videos.mean(dim=(1, 2, 3, 4))}], seed=4, batch_size=2, looks=LOOKS, again=again,
    )  # fmt: skip
    assert (scores.prompts, scores.again) == (list(prompts), list(again))
    assert [len(values) for values in (scores.metrics["mean"], scores.seconds)] == [3, 3]
    (whole,) = sample_videos(loaded, [*prompts, *again], clip, SPEC, seed=4)
    torch.testing.assert_close(scores.features["features"], LOOKS["features"](whole.videos), atol=1e-6, rtol=0)


def test_shares_of_processes_make_the_whole(loaded: WanBackbone, clip: ClipSpec, captions: tuple[str, ...]) -> None:
    prompts, again = captions[:4], captions[:1]

    def scores(share: Sequence[int] | None) -> ArmScores:
        return score_arm(
            EvaluatedModel("base", loaded, SPEC),
            prompts,
            clip,
            [],
            seed=4,
            batch_size=1,
            looks=LOOKS,
            again=again,
            share=share,
        )

    whole, parts = scores(None), ArmScores.together([scores(range(rank, 5, 3)) for rank in range(3)])
    assert (parts.prompts, parts.again) == (whole.prompts, whole.again)
    for name in LOOKS:
        torch.testing.assert_close(parts.features[name], whole.features[name], atol=1e-6, rtol=0)


def test_spreads_by_hand() -> None:
    features = torch.tensor([[0.0, 0.0], [1.0, 1.0], [3.0, 4.0], [0.0, 8.0]])
    assert prompt_distances(features, ["a", "b", "a", "a"]) == pytest.approx({"a": (5 + 8 + 5) / 3})


def test_share_is_a_ratio_of_means_with_a_paired_interval() -> None:
    theirs = {"a": 1.0, "b": 2.0, "c": 3.0}
    exact = diversity({name: value / 2 for name, value in theirs.items()}, theirs)
    assert exact is not None
    assert (exact.mean, exact.ci95) == (0.5, 0)
    found = diversity({"a": 0.0, "b": 1.0, "c": 2.0}, theirs)
    assert found is not None
    assert found.mean == 0.5
    # residuals (-0.5, 0, 0.5) / 2: deviation 0.25, t of 2 degrees 4.302653
    assert found.ci95 == pytest.approx(4.302653 * 0.25 / 3**0.5, rel=1e-6)
    assert diversity({"a": 1.0}, {"a": 0.0}) is None


def test_distances_are_held_against_the_reference_for_every_arm() -> None:
    prompts = [str(i) for i in range(12)]
    near, far = torch.randn(12, 2, generator=seeded(0)), torch.randn(12, 2, generator=seeded(1)) + 5
    arms = [arm("teacher", far, prompts), arm("student", near, prompts)]
    fill_sets(arms, Reference(near, tuple(prompts), "real clips"))
    assert arms[1].row().metrics["fvd"].mean == pytest.approx(0, abs=1e-9)
    assert arms[0].sets["fvd"].mean > 40
    assert math.isfinite(arms[0].sets["kvd"].ci95)
    assert "N = 12 clips an arm" in set_notes(arms)[0]
    assert "distance to real clips" in set_notes(arms)[0]
    few = dataclasses.replace(arms[1], prompts=prompts[:4], features={"features": near[:4]})
    assert "too few for a covariance of 2 features" in set_notes([few])[1]


def test_one_prompt_has_no_distance() -> None:
    scores = arm("student", torch.zeros(2, 2), ["a", "a"])
    fill_sets([scores], Reference(torch.ones(4, 2), ("a", "b", "c", "d"), "real clips"))
    assert set(scores.sets) == {"diversity"}


def test_sets_of_images_have_their_own_names() -> None:
    features = torch.randn(8, 2, generator=seeded(0))
    prompts = [f"prompt {i}" for i in range(8)]
    student = arm("student", features, prompts)
    fill_sets([student], Reference(features + 1, tuple(prompts), "real images"), of_images=True)
    assert student.sets["fid"].mean == pytest.approx(2, abs=1e-6)
    assert math.isfinite(student.sets["kid"].mean)
    assert set_notes([student])[0].startswith("FID and KID: distance to real images, in 2 features a clip, N = 8 clips")
    assert not {"fvd", "kvd"} & student.sets.keys()
