"""LTX-Video: the first release, and VAEs since 0.9.1, which are shown a little noise and told how much."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from family import Family, NativeSample, posterior_mean
from tiny_t5 import tiny_t5
from torch import Tensor

from rats_video.backbones.ltx import DECODE_NOISE, DECODE_SEED, DECODE_TIMESTEP, LTXBackbone
from rats_video.seeds import seeded
from rats_video.types import ClipSpec, TextCondition

CLIP = ClipSpec(num_frames=17, height=64, width=64, fps=25.0)  # three latent frames of 2 x 2


def build(folder: Path, *, timestep_conditioning: bool) -> None:
    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_t5(16)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=16,
    )  # fmt: skip
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        timestep_conditioning=timestep_conditioning, decoder_inject_noise=(timestep_conditioning,) * 5,
        scaling_factor=0.8,
    )  # fmt: skip
    with torch.no_grad():
        vae.latents_mean.normal_()
        vae.latents_std.uniform_(0.5, 2)
        vae.decoder.conv_out.conv.weight.mul_(3)  # saturates some pixels
        for name, parameter in vae.named_parameters():
            if "per_channel_scale" in name:  # zero in a fresh VAE
                parameter.normal_()
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096
    )
    LTXPipeline(scheduler, vae, text_encoder, tokenizer, transformer).save_pretrained(folder)


def native_text(pipeline: Any, prompts: list[str]) -> TextCondition:
    return TextCondition(*pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)[:2])


def native_velocity(pipeline: Any, latents: Tensor, sigma: Tensor, prompts: list[str]) -> Tensor:
    text, (frames, height, width) = native_text(pipeline, prompts), latents.shape[2:]
    velocity = pipeline.transformer(
        hidden_states=pipeline._pack_latents(latents), encoder_hidden_states=text.embeds, timestep=sigma * 1000,
        encoder_attention_mask=text.mask, num_frames=frames, height=height, width=width,
        rope_interpolation_scale=(8 / CLIP.fps, 32, 32), return_dict=False,
    )[0]  # fmt: skip
    return pipeline._unpack_latents(velocity, frames, height, width)


def native_latents(pipeline: Any, videos: Tensor) -> Tensor:
    vae = pipeline.vae
    return LTXImageToVideoPipeline._normalize_latents(
        posterior_mean(pipeline, videos), vae.latents_mean, vae.latents_std, vae.config.scaling_factor
    )


def native_sample(
    pipeline: Any, noise: Tensor, prompts: list[str], num_steps: int, guidance_scale: float = 1.0
) -> NativeSample:
    torch.manual_seed(DECODE_SEED)  # for the VAE's layers
    x0, videos = (
        pipeline(
            prompts, latents=pipeline._pack_latents(noise), num_inference_steps=num_steps,
            guidance_scale=guidance_scale, height=CLIP.height, width=CLIP.width, num_frames=CLIP.num_frames,
            frame_rate=int(CLIP.fps), generator=[seeded(DECODE_SEED) for _ in prompts],
            decode_timestep=DECODE_TIMESTEP, decode_noise_scale=DECODE_NOISE, output_type=kind,
        ).frames
        for kind in ("latent", "pt")
    )  # fmt: skip
    return NativeSample(pipeline.scheduler.sigmas, pipeline._unpack_latents(x0, *noise.shape[2:]), videos)


LTX_FAMILIES = tuple(
    Family(
        name=name, backbone=LTXBackbone, build=partial(build, timestep_conditioning=conditioned), clip=CLIP,
        text_length=128, native_text=native_text, native_velocity=native_velocity, native_latents=native_latents,
        native_sample=native_sample, native_guided=native_sample, decoded_from=lambda _: 0,
    )
    for name, conditioned in (("ltx", False), ("ltx-0.9.1", True))
)  # fmt: skip
