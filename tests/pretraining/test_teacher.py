"""Training the embedded teacher: single frames and clips, given first frames, and what its samples are measured by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from wan22_family import CLIP, build

from rats_video.backbones.wan import WanBackbone
from rats_video.condition import Condition
from rats_video.pretraining.teacher import (
    LatentCache,
    TeacherTrainConfig,
    TransformerConfig,
    build_transformer,
    continued,
    flow_matching_loss,
)
from rats_video.seeds import seeded

PROMPTS = ["a fast red circle moving left on a gray background", "a slow green square"]
GRID = (4, 3, 6, 6)  # C, F, H, W


def config(**changes: Any) -> TeacherTrainConfig:
    return TeacherTrainConfig.model_validate({
        "batch_size": 8, "prompt_dropout": 0.0, "eval_steps": 3, "guidance_scale": 2.0, "optimizer": {"lr": 1e-3},
        "clip": {"num_frames": CLIP.num_frames, "height": CLIP.height, "width": CLIP.width}, **changes,
    })  # fmt: skip


class Exact:
    """A model that knows the clip of each prompt: its velocity is right wherever noise tells it apart."""

    device = torch.device("cpu")

    def __init__(self, clips: Tensor) -> None:
        self.clips = clips
        self.latents = self.levels = torch.zeros(0)

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        self.latents, self.levels = latents, sigma
        x0 = self.clips[condition.embeds[:, 0, 0].long()][:, :, : latents.shape[2]]
        return (latents - x0) / sigma.view(len(sigma), 1, -1, 1, 1)  # not finite where a frame is given


@pytest.fixture
def clips() -> LatentCache:
    latents = torch.randn(5, *GRID, generator=seeded(1))
    text = Condition(torch.arange(6.0)[:, None, None])
    return LatentCache(latents, torch.arange(5), text)


@pytest.fixture
def frames(clips: LatentCache) -> LatentCache:
    return LatentCache(clips.latents[:, :, :1], clips.prompt_index, clips.text)


def loss_of(model: Exact, clips: LatentCache, frames: LatentCache | None, cfg: TeacherTrainConfig, step: int) -> float:
    return float(flow_matching_loss(model, clips, frames, cfg, step))  # type: ignore[arg-type]


def test_a_given_frame_is_clean_and_no_velocity_is_asked_of_it(clips: LatentCache) -> None:
    model = Exact(clips.latents)
    assert loss_of(model, clips, None, config(given_first_frame=1.0), 0) == pytest.approx(0, abs=1e-9)
    assert model.levels[:, 0].eq(0).all()
    assert model.levels[:, 1:].gt(0).all()
    assert torch.equal(model.levels[:, 1], model.levels[:, 2])
    assert all(any(torch.equal(seen, clip[:, 0]) for clip in clips.latents) for seen in model.latents[:, :, 0])


def test_the_share_of_given_frames(clips: LatentCache) -> None:
    model, cfg = Exact(clips.latents), config(given_first_frame=0.3, batch_size=400)
    loss_of(model, clips, None, cfg, 0)
    assert model.levels[:, 0].eq(0).float().mean() == pytest.approx(0.3, abs=0.05)
    loss_of(model, clips, None, config(), 0)
    assert model.levels.shape == (8,)  # nothing is given: one level a clip


def test_frames_come_first_and_then_at_their_share(clips: LatentCache, frames: LatentCache) -> None:
    model = Exact(clips.latents)
    cfg = config(frames={"steps": 3, "share": 0.25, "batch_size": 6})
    seen = []
    for step in range(203):
        assert loss_of(model, clips, frames, cfg, step) == pytest.approx(0, abs=1e-6)
        seen.append(model.latents.shape)
    assert seen[:3] == [(6, 4, 1, 6, 6)] * 3
    assert set(seen) == {(6, 4, 1, 6, 6), (8, *GRID)}
    assert seen[3:].count((6, 4, 1, 6, 6)) == pytest.approx(50, abs=15)


def test_equal_levels_of_all_frames_are_one_level_of_the_clip(tiny_wan: Path) -> None:
    backbone = WanBackbone.from_pretrained(tiny_wan)
    latents = torch.randn(2, 4, 3, 4, 4, generator=seeded(2))
    sigma, text = torch.tensor([0.9, 0.3]), backbone.encode_text(PROMPTS[:1] * 2)
    with torch.no_grad():
        one, each = (
            backbone.velocity(latents, sigma, text),
            backbone.velocity(latents, sigma[:, None].repeat(1, 3), text),
        )
    torch.testing.assert_close(each, one, atol=1e-6, rtol=0)


def test_text_gain_multiplies_the_values_alone() -> None:
    torch.manual_seed(0)
    plain = build_transformer(TransformerConfig(num_heads=1, head_dim=16, num_layers=2), latent_channels=4, text_dim=8)
    torch.manual_seed(0)
    shape = TransformerConfig(num_heads=1, head_dim=16, num_layers=2, text_gain=8.0)
    loud = build_transformer(shape, latent_channels=4, text_dim=8).state_dict()
    for name, weight in plain.state_dict().items():
        assert torch.equal(loud[name], weight * (8 if name.endswith("attn2.to_v.weight") else 1)), name


@pytest.mark.pipeline
def test_a_clip_goes_on_from_a_frame_as_the_stock_pipeline_does(tmp_path: Path) -> None:
    from diffusers import FlowMapEulerDiscreteScheduler, WanImageToVideoPipeline

    build(tmp_path / "5b", experts=False)
    stock = WanImageToVideoPipeline.from_pretrained(tmp_path / "5b")
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = FlowMapEulerDiscreteScheduler(shift=3.0)
    backbone, cfg = WanBackbone.from_pretrained(tmp_path / "5b"), config()
    pixels = np.random.default_rng(0).integers(0, 256, (CLIP.height, CLIP.width, 3), dtype=np.uint8)
    theirs = stock(
        Image.fromarray(pixels), PROMPTS[0], num_inference_steps=cfg.eval_steps, guidance_scale=cfg.guidance_scale,
        height=CLIP.height, width=CLIP.width, num_frames=CLIP.num_frames, output_type="latent", negative_prompt="",
        latents=backbone.sample_noise(1, CLIP, seeded(cfg.seed, 3)),
    ).frames  # fmt: skip
    video = torch.from_numpy(pixels).permute(2, 0, 1)[None, None] / 255
    with torch.no_grad():
        ours = continued(backbone, cfg, PROMPTS[:1], backbone.encode(video))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
