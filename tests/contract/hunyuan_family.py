"""A tiny HunyuanVideo (30,000 parameters, its VAE 51,000) and what its stock pipeline does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from family import Family, NativeSample, posterior_mean
from torch import Tensor

from rats_video.backbones.hunyuan import TEXT_LENGTH, HunyuanVideoBackbone
from rats_video.pretraining.teacher import build_tokenizer
from rats_video.types import ClipSpec, TextCondition

CLIP = ClipSpec(num_frames=9, height=32, width=32, fps=8.0)
SHIFT = 3.0


def build(folder: Path, *, guidance_embeds: bool = True) -> None:
    """Save random weights of every class of `HunyuanVideoPipeline`."""
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    shape = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    HunyuanVideoPipeline(
        text_encoder=LlamaModel(LlamaConfig(**shape, num_hidden_layers=3, pad_token_id=0)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModel(
            CLIPTextConfig(**shape, num_hidden_layers=1, projection_dim=16, pad_token_id=0, eos_token_id=1)
        ),
        tokenizer_2=build_tokenizer(),
        transformer=HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=16, pooled_projection_dim=16,
            rope_axes_dim=(2, 2, 4), guidance_embeds=guidance_embeds,
        ),
        vae=AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    ).save_pretrained(folder)  # fmt: skip


def native_text(pipeline: Any, prompts: list[str]) -> TextCondition:
    """What `encode_prompt` gives."""
    embeds, pooled, mask = pipeline.encode_prompt(prompts)
    return TextCondition(embeds, mask, pooled)


def native_velocity(pipeline: Any, latents: Tensor, sigma: Tensor, prompts: list[str]) -> Tensor:
    """The transformer's call in the pipeline's loop, at its default guidance scale."""
    text = native_text(pipeline, prompts)
    return pipeline.transformer(
        hidden_states=latents, timestep=sigma * 1000, encoder_hidden_states=text.embeds,
        encoder_attention_mask=text.mask.to(latents.dtype), pooled_projections=text.pooled,
        guidance=torch.full((len(latents),), 6000.0), return_dict=False,
    )[0]  # fmt: skip


def native_latents(pipeline: Any, videos: Tensor) -> Tensor:
    """As `HunyuanVideoImageToVideoPipeline.prepare_latents`."""
    return posterior_mean(pipeline, videos) * pipeline.vae.config.scaling_factor


def native_sample(
    pipeline: Any, noise: Tensor, prompts: list[str], num_steps: int, guidance_scale: float = 1.0
) -> NativeSample:
    """The pipeline with two-call guidance, and the embedded one at its default."""
    options = {
        "num_inference_steps": num_steps, "true_cfg_scale": guidance_scale, "negative_prompt": [""] * len(prompts),
        "latents": noise, "num_frames": CLIP.num_frames, "height": CLIP.height, "width": CLIP.width,
    }  # fmt: skip
    x0 = pipeline(prompts, output_type="latent", **options).frames
    videos = pipeline(prompts, output_type="pt", **options).frames
    return NativeSample(pipeline.scheduler.sigmas, x0, videos)


HUNYUAN = Family(
    name="hunyuan-video", backbone=HunyuanVideoBackbone, build=build, clip=CLIP, text_length=TEXT_LENGTH,
    native_text=native_text, native_velocity=native_velocity, native_latents=native_latents,
    native_sample=native_sample, native_guided=native_sample, decoded_from=lambda _: 0,
)  # fmt: skip
