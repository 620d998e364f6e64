"""CogVideoX from a picture, against `CogVideoXImageToVideoPipeline`: 5b, which learnt its places, and 1.5."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from cogvideox_family import CLIP, signal_and_noise
from cogvideox_i2v_family import build
from PIL import Image
from shared import made_once

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.cogvideox_i2v import CogVideoXImageBackbone
from rats_video.backbones.kinds import load_backbone
from rats_video.diffusion.rollout import rollout
from rats_video.errors import UserError
from rats_video.seeds import seeded

pytestmark = [pytest.mark.pipeline, pytest.mark.usefixtures("no_gradient")]

PROMPT = "a fast red circle"
MODULE = "diffusers.pipelines.cogvideo.pipeline_cogvideox_image2video"


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
