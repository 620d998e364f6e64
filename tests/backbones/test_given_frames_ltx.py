"""LTX-Video from a picture, against `LTXImageToVideoPipeline` (0.9.0) and the first step of `LTXConditionPipeline`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from family import Family
from ltx_family import CLIP, LTX_095, LTX_FAMILIES
from torch import Tensor

from rats_video.backbones.base import PipelineBackbone
from rats_video.diffusion.rollout import rollout
from rats_video.errors import UserError
from rats_video.seeds import seeded

pytestmark = [pytest.mark.pipeline, pytest.mark.usefixtures("no_gradient")]

PROMPTS = ["a fast red circle", "a slow green square"]
Opened = Callable[[Family], object]


def pictures() -> Tensor:
    return torch.rand(2, 3, CLIP.height, CLIP.width, generator=seeded(4))


def held_noise(backbone: PipelineBackbone) -> tuple[Tensor, Tensor]:
    """Noise with the given frames in it, and their latents."""
    frames = backbone.given_frames(CLIP, pictures())
    assert frames.held is not None
    noise = backbone.sample_noise(2, CLIP, seeded(5))
    return torch.cat([frames.held[:, :, :1], noise[:, :, 1:]], dim=2), frames.held[:, :, 0]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_clips_are_the_stock_pipelines(opened: Opened, guidance_scale: float) -> None:
    from diffusers import LTXImageToVideoPipeline

    case = opened(LTX_FAMILIES[0])
    backbone: PipelineBackbone = case.backbone  # type: ignore[attr-defined]
    stock = LTXImageToVideoPipeline.from_pretrained(case.folder)  # type: ignore[attr-defined]
    stock.set_progress_bar_config(disable=True)
    noise, _ = held_noise(backbone)
    theirs = stock(
        prompt=PROMPTS, negative_prompt=[""] * 2, latents=stock._pack_latents(noise), num_inference_steps=3,
        guidance_scale=guidance_scale, height=CLIP.height, width=CLIP.width, num_frames=CLIP.num_frames,
        frame_rate=int(CLIP.fps), output_type="latent",
    ).frames  # fmt: skip
    condition = backbone.encode_text(PROMPTS).with_given(backbone.given_frames(CLIP, pictures()))
    ours = rollout(
        backbone.velocity, noise, stock.scheduler.sigmas, condition,
        negative=backbone.encode_text([""]), guidance_scale=guidance_scale,
    ).x0  # fmt: skip
    theirs = stock._unpack_latents(theirs, *noise.shape[2:])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert (ours[:, :, 1:] - noise[:, :, 1:]).abs().mean() > 0.1


def test_version_095_tells_each_token_its_level(opened: Opened) -> None:
    """`LTXConditionPipeline`: timestep 0 where the frame is given, without noise on it (`image_cond_noise_scale` 0)."""
    case = opened(LTX_095)
    backbone: PipelineBackbone = case.backbone  # type: ignore[attr-defined]
    stock = case.pipeline  # type: ignore[attr-defined]
    noise, first = held_noise(backbone)
    condition = backbone.encode_text(PROMPTS).with_given(backbone.given_frames(CLIP, pictures()))
    ours = backbone.velocity(noise, torch.tensor([0.8, 0.8]), condition)
    _, mask, places, _ = stock.prepare_latents(
        [pictures()[:1, :, None] * 2 - 1], [1.0], [0], batch_size=2, num_channels_latents=8,
        num_frames=CLIP.num_frames, height=CLIP.height, width=CLIP.width, generator=seeded(1),
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    places = places.float()
    places[:, 0] = places[:, 0] / CLIP.fps
    timestep = torch.min(torch.full((2, 1), 800.0), (1 - mask) * 1000)
    theirs = stock.transformer(
        hidden_states=stock._pack_latents(noise), encoder_hidden_states=condition.embeds, timestep=timestep,
        encoder_attention_mask=condition.mask, video_coords=places, return_dict=False,
    )[0]  # fmt: skip
    theirs = stock._unpack_latents(theirs, *noise.shape[2:])
    torch.testing.assert_close(ours[:, :, 1:], theirs[:, :, 1:], atol=1e-5, rtol=0)
    assert ours[:, :, 0].eq(0).all()
    assert first.std() > 0.1


def test_a_last_frame_is_refused(opened: Opened) -> None:
    backbone: PipelineBackbone = opened(LTX_FAMILIES[0]).backbone  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"^last_image: LTX-Video takes a first frame alone"):
        backbone.given_frames(CLIP, pictures(), pictures())
