"""A tiny Wan 2.2 of each kind, 5B and A14B, and what the stock pipeline does with them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from family import Family, NativeSample
from torch import Tensor
from wan_family import VAE_CONFIG, native_latents

from rats_video.backbones.lora import LORA_FILE
from rats_video.backbones.wan import TEXT_LENGTH, WanBackbone
from rats_video.pretraining.teacher import (
    TextEncoderConfig,
    TransformerConfig,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
)
from rats_video.pretraining.vae import build_vae
from rats_video.types import ClipSpec, TextCondition

CLIP = ClipSpec(num_frames=9, height=32, width=64, fps=8.0)
SHIFT = 3.0
BOUNDARY = 0.875
TRANSFORMER = TransformerConfig(num_heads=2, head_dim=8, ffn_dim=32, num_layers=2, patch_size=(1, 2, 2))


def build_5b_vae() -> Any:
    """The 2.2 VAE: residual blocks, patches of 2, 16 pixels a latent."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        is_residual=True, patch_size=2, in_channels=12, out_channels=12, base_dim=4, decoder_base_dim=8, z_dim=6,
        num_res_blocks=1, scale_factor_spatial=16, dim_mult=[1, 1, 1, 1], temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0, 0.2, -0.1], latents_std=[0.5, 0.8, 1.2, 1.0, 1.5, 0.7],
    )  # fmt: skip


def build(folder: Path, *, experts: bool) -> None:
    """Save random weights of every class of `WanPipeline`, as the 5B model or as the two experts of A14B."""
    from diffusers import FlowMapEulerDiscreteScheduler, WanPipeline

    torch.manual_seed(0)
    vae = build_vae(VAE_CONFIG) if experts else build_5b_vae()
    with torch.no_grad():  # a fresh VAE ignores the past: a trained one does not
        for parameter in vae.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    if experts:
        vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 0.8, 1.2, 1.0])
    channels = vae.config.z_dim
    transformers = [build_transformer(TRANSFORMER, latent_channels=channels, text_dim=16) for _ in range(1 + experts)]
    tokenizer = build_tokenizer()
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(TextEncoderConfig(d_model=16, num_layers=1, num_heads=2), len(tokenizer)),
        vae=vae,
        scheduler=FlowMapEulerDiscreteScheduler(shift=SHIFT),
        transformer=transformers[0],
        transformer_2=transformers[1] if experts else None,
        boundary_ratio=BOUNDARY if experts else None,
        expand_timesteps=not experts,
    ).save_pretrained(folder)


def native_text(pipeline: Any, prompts: list[str]) -> TextCondition:
    """What `encode_prompt` gives as `WanPipeline` calls it."""
    embeds, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)
    return TextCondition(embeds)


def native_velocity(pipeline: Any, latents: Tensor, sigma: Tensor, prompts: list[str]) -> Tensor:
    """The call of the pipeline's loop, one clip at a time: its batch is always at one noise level."""
    text, velocities = native_text(pipeline, prompts).embeds, []
    for index, t in enumerate(sigma * 1000):
        boundary = pipeline.config.boundary_ratio
        model = pipeline.transformer if boundary is None or t >= boundary * 1000 else pipeline.transformer_2
        timestep = t.expand(1)
        if pipeline.config.expand_timesteps:
            timestep = (torch.ones(latents.shape)[0][0][:, ::2, ::2] * t).flatten()[None]
        velocities.append(model(latents[[index]], timestep, text[[index]], return_dict=False)[0])
    return torch.cat(velocities)


def native_sample(
    pipeline: Any, noise: Tensor, prompts: list[str], num_steps: int, guidance_scale: float = 1.0
) -> NativeSample:
    """The pipeline; both experts take the same guidance scale."""
    options = {
        "num_inference_steps": num_steps, "guidance_scale": guidance_scale, "latents": noise,
        "num_frames": CLIP.num_frames, "height": CLIP.height, "width": CLIP.width,
    }  # fmt: skip
    x0 = pipeline(prompts, output_type="latent", **options).frames
    videos = pipeline(prompts, output_type="pt", **options).frames
    return NativeSample(pipeline.scheduler.sigmas.float(), x0, videos)


def load_lora(pipeline: Any, folder: Path) -> None:
    """`WanPipeline.load_lora_weights` passes the second expert's half of the file by."""
    pipeline.load_lora_weights(folder, weight_name=LORA_FILE)
    if pipeline.transformer_2 is not None:
        pipeline.transformer_2.load_lora_adapter(folder, prefix="transformer_2", weight_name=LORA_FILE)


WAN22_FAMILIES = tuple(
    Family(
        name=name, backbone=WanBackbone, build=partial(build, experts=experts), clip=CLIP, text_length=TEXT_LENGTH,
        native_text=native_text, native_velocity=native_velocity, native_latents=native_latents,
        native_sample=native_sample, native_guided=native_sample, load_lora=load_lora,
    )
    for name, experts in (("wan22-5b", False), ("wan22-a14b", True))
)  # fmt: skip
