"""`teacher.negative_prompt`: guidance leads away from it, wherever the teacher samples, and from nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rats_video.backbones.wan import WanBackbone
from rats_video.diffusion.rollout import rollout
from rats_video.distillation.compute import encode_prompts
from rats_video.distillation.method import build_rats
from rats_video.distillation.roles import build_roles, checked_prompts
from rats_video.distillation.settings import DistillConfig
from rats_video.distillation.teacher_identity import teacher_identity
from rats_video.errors import UserError
from rats_video.inference.sampler import sample_batch
from rats_video.methods.teacher import FrozenTeacherConfig
from rats_video.types import PromptBatch

pytestmark = pytest.mark.pipeline

MakeConfig = Callable[..., DistillConfig]
NEGATIVE = "a red circle"


@pytest.fixture(scope="module")
def cfg(make_config: MakeConfig) -> DistillConfig:
    return make_config(f"teacher.negative_prompt={NEGATIVE}")


@torch.no_grad()
def test_teacher_is_guided_away_from_it(backbone: WanBackbone, cfg: DistillConfig, batch: PromptBatch) -> None:
    """In training and where it is judged alike; from text that was cached before the encoder was freed, too."""
    text = backbone.encode_text(batch.prompts)

    def x0(negative: str, spec_steps: int) -> torch.Tensor:
        return rollout(
            backbone.velocity, batch.noise, backbone.sigmas(spec_steps, cfg.shift), text,
            negative=backbone.encode_text([negative]), guidance_scale=2.0,
        ).x0  # fmt: skip

    expected = x0(NEGATIVE, cfg.teacher.num_steps)
    assert (expected - x0("", cfg.teacher.num_steps)).abs().max() > 1e-3
    backbone.cache_text(encode_prompts(cfg, backbone))  # the batch's are of its training prompts
    teacher = build_rats(cfg, *build_roles(cfg, backbone)).teacher
    torch.testing.assert_close(teacher.rollout(batch).trajectory.x0, expected, atol=1e-5, rtol=0)
    _, judged = sample_batch(backbone, batch.prompts, batch.noise, cfg.judged_teacher)
    torch.testing.assert_close(judged, x0(NEGATIVE, cfg.evaluation.teacher_steps), atol=1e-5, rtol=0)
    assert (cfg.teacher_spec.negative_prompt, cfg.judged_teacher.negative_prompt) == (NEGATIVE, NEGATIVE)


def test_without_one_stored_rollouts_stay_valid(make_config: MakeConfig, cfg: DistillConfig) -> None:
    def identity(cfg: DistillConfig) -> dict[str, object]:
        assert isinstance(cfg.teacher, FrozenTeacherConfig)
        return teacher_identity(cfg, cfg.teacher)

    assert "negative_prompt" not in identity(make_config())
    assert identity(cfg) == identity(make_config()) | {"negative_prompt": NEGATIVE}


def test_one_that_cannot_be_followed(
    backbone: WanBackbone, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"^teacher\.negative_prompt: this model does not know 'ugly'"):
        checked_prompts(make_config("teacher.negative_prompt=ugly"), backbone)
    checked_prompts(make_config("teacher.negative_prompt=a circle", "teacher.guidance_scale=1"), backbone)
    assert capsys.readouterr().err == "warning: teacher.negative_prompt: does nothing without guidance\n"
