"""A run whose clips start from pictures: the same ones for teacher and student, held to the end, resumed and judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from shared import made_once
from wan22_family import build

from rats_video.datasets.shapes.render import parse_prompt, render
from rats_video.distillation.method import build_rats
from rats_video.distillation.roles import build_backbone, build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.inference.sampler import SamplerSpec, picture_seed, sample_videos
from rats_video.methods.shaping import frame_distance
from rats_video.methods.student import student_rollout
from rats_video.methods.teacher import TeacherRollout
from rats_video.methods.teacher_cache import DiskRolloutCache
from rats_video.seeds import seeded
from rats_video.training.batches import draw_batch, slice_batch, with_pictures
from rats_video.training.loop import train_loop
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder
from rats_video.types import RewardScores, Trajectory

pytestmark = pytest.mark.pipeline

MakeConfig = Callable[..., DistillConfig]
PROMPTS = ("a fast red circle moving left on a gray background", "a slow green square moving up on a white background")


@pytest.fixture(scope="module")
def cfg(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> DistillConfig:
    folder = made_once(tmp_path_factory, "i2v-wan22-5b", partial(build, experts=False))
    return make_config(
        f"model={folder}", "clip={num_frames: 9, height: 32, width: 32}", "prompts={kind: shapes, first_frame: true}",
        "training.batch_size=2", "training.steps=2", "method.gate.level=clip", "teacher.reuse=2",
    )  # fmt: skip


def test_teacher_and_student_start_from_the_same_rendered_frames(
    cfg: DistillConfig, color_reward: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rats_video.distillation.method.loss_reward", lambda *_: color_reward)
    base = build_backbone(cfg, torch.device("cpu"))
    rats = build_rats(cfg, *build_roles(cfg, base))
    one, other = (
        with_pictures(draw_batch(rats.student, cfg, PROMPTS, step), rats.student, cfg.clip.spec) for step in (0, 1)
    )
    assert one.given is not None
    assert one.given.held is not None
    assert other.given is not None
    assert other.given.held is not None
    assert torch.equal(one.given.held, other.given.held)  # of one batch, which serves two updates
    pictures = torch.cat([
        render([parse_prompt(prompt)], cfg.clip.spec, seeded(seed))[:, :1]
        for prompt, seed in zip(one.prompts, one.picture_seeds, strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(one.given.held[:, :, :1], base.encode(pictures))
    student, teacher = student_rollout(rats, one), rats.teacher.rollout(one).trajectory
    for latents in (*student.latents, *teacher.latents):
        assert torch.equal(latents[:, :, 0], one.given.held[:, :, 0])
    loss, row = rats.step(one)
    loss.backward()  # type: ignore[no-untyped-call]
    # Only the frames that are sampled are compared, and the motion away from the given one.
    apart = torch.stack([
        frame_distance(ours - theirs, cfg.method.shaping.motion_weight)[:, 1:]  # type: ignore[attr-defined]
        for ours, theirs in zip(student.latents, teacher.latents, strict=True)
    ])  # fmt: skip
    assert row["shaping/0.000"] == pytest.approx(float(apart[-1].detach().mean()), rel=1e-5)
    teacher_scores, scores = (color_reward(base.decode(each.x0), one.prompts) for each in (teacher, student))  # type: ignore[operator]
    weights = 0.1 + 0.9 * torch.sigmoid((teacher_scores.clip - scores.clip) / cfg.method.gate.tau)  # type: ignore[attr-defined]
    expected = -scores.clip.mean() + cfg.method.alpha * (weights[:, None] * apart.mean(dim=0)).mean()
    assert row["loss"] == pytest.approx(float(expected), rel=1e-4)
    whole = with_pictures(draw_batch(rats.student, cfg, PROMPTS, 0), rats.student, cfg.clip.spec)
    part = with_pictures(
        slice_batch(draw_batch(rats.student, cfg, PROMPTS, 0), slice(1, 2)), rats.student, cfg.clip.spec
    )
    assert part.given is not None
    assert whole.given is not None
    assert part.given.held is not None
    assert whole.given.held is not None
    torch.testing.assert_close(part.given.held, whole.given.held[1:])


def test_a_run_trains_and_its_clips_are_judged_from_pictures(
    cfg: DistillConfig, color_reward: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("rats_video.distillation.method.loss_reward", lambda *_: color_reward)
    base = build_backbone(cfg, torch.device("cpu"))
    rats = build_rats(cfg, *build_roles(cfg, base))
    train_loop(rats, cfg, PROMPTS, RunFolder(tmp_path))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    [samples] = sample_videos(rats.student, PROMPTS, cfg.clip.spec, SamplerSpec(2, cfg.shift), seed=3)
    first = torch.cat([
        render([parse_prompt(prompt)], cfg.clip.spec, seeded(picture_seed(3, index)))[:, :1]
        for index, prompt in enumerate(PROMPTS)
    ])  # fmt: skip
    torch.testing.assert_close(samples.latents[:, :, :1], base.encode(first))


def test_stored_rollouts_are_found_again_by_their_pictures(cfg: DistillConfig, tmp_path: Path) -> None:
    base = build_backbone(cfg, torch.device("cpu"))
    cache = DiskRolloutCache(tmp_path, {}, torch.device("cpu"))
    batch = with_pictures(draw_batch(base, cfg, PROMPTS, 0), base, cfg.clip.spec)
    path = Trajectory((0.0,), (batch.noise,), 1)
    cache.save(batch, TeacherRollout(path, RewardScores(torch.zeros(2))))
    assert cache.load(batch) is not None
    other = replace(batch, picture_seeds=(1, 2))
    assert cache.load(with_pictures(other, base, cfg.clip.spec)) is None
    assert cache.load(replace(batch, given=None)) is None


def test_a_text_model_refuses_pictures(make_config: MakeConfig) -> None:
    cfg = make_config("prompts={kind: shapes, first_frame: true}")
    with pytest.raises(UserError, match=r"^prompts.first_frame: this Wan makes videos from text alone \(set it to fa"):
        build_backbone(cfg, torch.device("cpu"))
