"""CogVideoX from a picture, against `CogVideoXImageToVideoPipeline`: 5b, which learnt its places, and 1.5."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from cogvideox_family import CLIP, build_vae, signal_and_noise
from PIL import Image
from shared import made_once
from tiny_t5 import publish_t5, tiny_t5

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.cogvideox_i2v import CogVideoXImageBackbone
from rats_video.backbones.kinds import load_backbone
from rats_video.diffusion.rollout import rollout
from rats_video.errors import UserError
from rats_video.seeds import seeded

pytestmark = [pytest.mark.pipeline, pytest.mark.usefixtures("no_gradient")]

PROMPT = "a fast red circle"
MODULE = "diffusers.pipelines.cogvideo.pipeline_cogvideox_image2video"


def build(folder: Path, *, paired: bool) -> None:
    from diffusers import (
        CogVideoXDDIMScheduler,
        CogVideoXImageToVideoPipeline,
        CogVideoXTransformer3DModel,
    )

    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_t5(16)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=8, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=2, sample_width=6, sample_height=4, sample_frames=17,
        max_text_seq_length=226, use_rotary_positional_embeddings=True, patch_bias=not paired,
        use_learned_positional_embeddings=not paired, patch_size_t=2 if paired else None,
        ofs_embed_dim=8 if paired else None,
    )  # fmt: skip
    vae = build_vae(paired=paired)
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, snr_shift_scale=1.0
    )
    CogVideoXImageToVideoPipeline(tokenizer, text_encoder, vae, transformer, scheduler).save_pretrained(folder)
    publish_t5(folder / "tokenizer")


@dataclass(frozen=True)
class Case:
    backbone: PipelineBackbone
    stock: Any


@pytest.fixture(scope="module", params=["5b", "1.5"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    from diffusers import CogVideoXImageToVideoPipeline

    folder = made_once(
        tmp_path_factory, f"cogvideox-i2v-{request.param}", lambda path: build(path, paired=request.param == "1.5")
    )
    stock = CogVideoXImageToVideoPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    with mock.patch(f"{MODULE}.retrieve_latents", lambda found, _: found.latent_dist.mode()):  # it draws one
        yield Case(load_backbone(folder), stock)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_clips_are_the_stock_pipelines(case: Case, guidance_scale: float) -> None:
    backbone, stock = case.backbone, case.stock
    assert type(backbone) is CogVideoXImageBackbone
    pixels = np.random.default_rng(0).integers(0, 256, (CLIP.height, CLIP.width, 3), dtype=np.uint8)
    noise = backbone.sample_noise(1, CLIP, seeded(3))
    theirs = stock(
        Image.fromarray(pixels), PROMPT, "", height=CLIP.height, width=CLIP.width, num_frames=CLIP.num_frames,
        num_inference_steps=4, guidance_scale=guidance_scale, latents=noise.transpose(1, 2), output_type="latent",
    ).frames.transpose(1, 2)  # fmt: skip
    a, s = (table[stock.scheduler.timesteps] for table in signal_and_noise(stock))
    frames = backbone.given_frames(CLIP, torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
    ours = rollout(
        backbone.velocity, noise, torch.cat([s / (a + s), s.new_zeros(1)]).float(),
        backbone.encode_text([PROMPT]).with_given(frames),
        negative=backbone.encode_text([""]), guidance_scale=guidance_scale,
    ).x0  # fmt: skip
    hidden = theirs.shape[2] - CLIP.num_frames // 4 - 1
    torch.testing.assert_close(ours[:, :, hidden:], theirs[:, :, -(CLIP.num_frames // 4 + 1) :], atol=2e-4, rtol=0)


def test_what_it_cannot_do(case: Case) -> None:
    backbone = case.backbone
    picture = torch.rand(1, 3, CLIP.height, CLIP.width)
    with pytest.raises(UserError, match=r"^last_image: CogVideoX takes a first frame alone"):
        backbone.given_frames(CLIP, picture, picture)
    with pytest.raises(UserError, match="makes a video from a picture, and none is given"):
        backbone.velocity(
            backbone.sample_noise(1, CLIP, seeded(3)), torch.tensor([0.5]), backbone.encode_text([PROMPT])
        )
