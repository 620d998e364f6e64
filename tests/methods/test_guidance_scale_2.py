"""`guidance_scale_2`: the teacher of two experts is guided by each one's own scale, which fades with the first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from shared import made_once
from wan22_family import CLIP, build

from rats_video.backbones.wan import WanBackbone
from rats_video.distillation.roles import build_backbone
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.inference.sampler import SamplerSpec, sample_batch
from rats_video.methods.teacher import EmaTeacherConfig, FrozenTeacherConfig, TeacherSampler
from rats_video.seeds import seeded
from rats_video.types import PromptBatch

pytestmark = pytest.mark.pipeline

PROMPTS = ("a fast red circle", "a slow green square")


@pytest.fixture(scope="module")
def a14b(tmp_path_factory: pytest.TempPathFactory) -> WanBackbone:
    return WanBackbone.from_pretrained(made_once(tmp_path_factory, "wan22-a14b", partial(build, experts=True)))


@torch.no_grad()
def test_the_teacher_is_sampled_so(a14b: WanBackbone, color_reward: object) -> None:
    batch = PromptBatch(0, PROMPTS, a14b.sample_noise(2, CLIP, seeded(9)), num_steps=4)
    cfg = FrozenTeacherConfig(kind="frozen", num_steps=4, guidance_scale=4.0, guidance_scale_2=2.0)
    teacher = TeacherSampler(a14b, color_reward, cfg, shift=3.0)  # type: ignore[arg-type]
    _, expected = sample_batch(a14b, PROMPTS, batch.noise, SamplerSpec(4, 3.0, 4.0, "", 2.0))
    _, one_scale = sample_batch(a14b, PROMPTS, batch.noise, SamplerSpec(4, 3.0, 4.0))
    x0 = teacher.rollout(batch).trajectory.x0
    torch.testing.assert_close(x0, expected, atol=1e-5, rtol=0)
    assert (x0 - one_scale).abs().max() > 1e-3
    sigma = torch.tensor([0.9, 0.4])  # one of each expert, as matching draws them
    text = a14b.encode_text(PROMPTS)
    both = teacher.velocity(batch.noise, sigma, text)
    for row, scale in enumerate((4.0, 2.0)):
        plain = FrozenTeacherConfig(kind="frozen", guidance_scale=scale)
        alone = TeacherSampler(a14b, color_reward, plain, shift=3.0)  # type: ignore[arg-type]
        torch.testing.assert_close(both[row], alone.velocity(batch.noise, sigma, text)[row], atol=1e-5, rtol=0)


def test_both_scales_fade(a14b: WanBackbone, color_reward: object) -> None:
    cfg = EmaTeacherConfig(
        kind="ema", guidance_scale=4.0, guidance_scale_2=2.0, guidance_end=1.0, guidance_fade_steps=10
    )
    teacher = TeacherSampler(a14b, color_reward, cfg, shift=3.0)  # type: ignore[arg-type]
    for updates, scales in ((0, [4.0, 2.0]), (5, [2.5, 1.5])):
        teacher.update_ema(a14b, updates, resumed=True)
        scale = teacher.guidance_scale
        assert callable(scale)
        assert scale(torch.tensor([0.9, 0.4])).tolist() == scales
    teacher.update_ema(a14b, 10, resumed=True)
    assert teacher.guidance_scale == 1.0


@pytest.mark.parametrize("section", ["teacher", "evaluation"])
def test_a_model_of_one_expert_has_none(make_config: Callable[..., DistillConfig], section: str) -> None:
    cfg = make_config(f"{section}.guidance_scale_2=3")
    with pytest.raises(UserError, match=rf"^{section}\.guidance_scale_2: this Wan has no second expert \(leave it out"):
        build_backbone(cfg, torch.device("cpu"))
