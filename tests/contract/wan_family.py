"""Wan 2.1, as this package's own embedded model is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from family import Family, NativeSample, posterior_mean
from torch import Tensor

from rats_video.backbones.wan import TEXT_LENGTH, WanBackbone
from rats_video.pretraining.flow import save_pipeline
from rats_video.pretraining.teacher import (
    TextEncoderConfig,
    TransformerConfig,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
)
from rats_video.pretraining.vae import VaeConfig, build_vae
from rats_video.types import ClipSpec, TextCondition

CLIP = ClipSpec(num_frames=9, height=32, width=32, fps=8.0)  # three latent frames of 4 x 4
SHIFT = 3.0
VAE_CONFIG = VaeConfig.model_validate({
    "clip": {"num_frames": 5, "height": 32, "width": 32},
    "model": {"base_dim": 8, "dim_mult": (1, 1, 1), "latent_channels": 4, "patch_size": 2},
    "stages": [
        {"num_frames": 1, "batch_size": 2, "steps": 2, "lr": 1e-2},
        {"num_frames": 5, "batch_size": 1, "steps": 2, "lr": 1e-2, "trains": "decoder"},
    ],
    "stats_clips": 32,
    "eval_clips": 16,
})  # fmt: skip


def build(folder: Path) -> None:
    """A pipeline folder of random weights that `diffusers.WanPipeline` loads (14,000 + 57,000 parameters)."""
    torch.manual_seed(0)
    vae = build_vae(VAE_CONFIG)
    with torch.no_grad():  # a fresh VAE ignores the past: a trained one does not
        for parameter in vae.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 0.8, 1.2, 1.0])
    tokenizer = build_tokenizer()
    text_encoder = build_text_encoder(TextEncoderConfig(d_model=16, num_layers=1, num_heads=2), len(tokenizer))
    shape = TransformerConfig(num_heads=2, head_dim=8, ffn_dim=32, num_layers=2, patch_size=(1, 2, 2))
    transformer = build_transformer(shape, latent_channels=4, text_dim=16)
    save_pipeline(
        WanBackbone(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer),
        folder,
        shift=SHIFT,
    )


def native_text(pipeline: Any, prompts: list[str]) -> TextCondition:
    options = {"do_classifier_free_guidance": False, "max_sequence_length": TEXT_LENGTH}
    return TextCondition(pipeline.encode_prompt(prompts, **options)[0])


def native_velocity(pipeline: Any, latents: Tensor, sigma: Tensor, prompts: list[str]) -> Tensor:
    return pipeline.transformer(latents, sigma * 1000, native_text(pipeline, prompts).embeds, return_dict=False)[0]


def native_latents(pipeline: Any, videos: Tensor) -> Tensor:
    """As `WanVideoToVideoPipeline.prepare_latents`."""
    config = pipeline.vae.config
    mean, std = (torch.tensor(stat).view(1, -1, 1, 1, 1) for stat in (config.latents_mean, config.latents_std))
    return (posterior_mean(pipeline, videos) - mean) * (1.0 / std)


def native_sample(
    pipeline: Any, noise: Tensor, prompts: list[str], num_steps: int, guidance_scale: float = 1.0
) -> NativeSample:
    x0, videos = (
        pipeline(
            prompts, latents=noise, num_inference_steps=num_steps, guidance_scale=guidance_scale,
            height=CLIP.height, width=CLIP.width, num_frames=CLIP.num_frames, output_type=kind,
        ).frames
        for kind in ("latent", "pt")
    )  # fmt: skip
    return NativeSample(pipeline.scheduler.sigmas.float(), x0, videos)


WAN = Family(
    name="wan", backbone=WanBackbone, build=build, clip=CLIP, text_length=TEXT_LENGTH, native_text=native_text,
    native_velocity=native_velocity, native_latents=native_latents,
    native_sample=native_sample, native_guided=native_sample,
)  # fmt: skip
