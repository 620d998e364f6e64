"""CogVideoX: 2b, which adds sines to its tokens, and 5b, which turns queries and keys."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from family import Family, NativeSample, posterior_mean
from tiny_t5 import tiny_t5
from torch import Tensor

from rats_video.backbones.cogvideox import CogVideoXBackbone
from rats_video.types import ClipSpec, TextCondition

CLIP = ClipSpec(num_frames=17, height=16, width=24, fps=8.0)  # five latent frames of 4 x 6


def build(folder: Path, *, rotary: bool) -> None:
    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_t5(16)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=2, sample_width=12, sample_height=8, sample_frames=9,
        use_rotary_positional_embeddings=rotary,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3, up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2, scaling_factor=0.7,
    )  # fmt: skip
    with torch.no_grad():
        vae.decoder.conv_out.conv.weight.mul_(2)  # saturates some pixels
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True,
        snr_shift_scale=1.0 if rotary else 3.0,
    )  # fmt: skip
    CogVideoXPipeline(tokenizer, text_encoder, vae, transformer, scheduler).save_pretrained(folder)


def native_text(pipeline: Any, prompts: list[str]) -> TextCondition:
    return TextCondition(pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)[0])


def signal_and_noise(pipeline: Any) -> tuple[Tensor, Tensor]:
    """a and s by timestep, in double precision."""
    signal = pipeline.scheduler.alphas_cumprod.double()
    return signal.sqrt(), (1 - signal).sqrt()


def native_velocity(pipeline: Any, latents: Tensor, sigma: Tensor, prompts: list[str]) -> Tensor:
    """The same v read as noise and data, which differ by the velocity."""
    signal, noise = signal_and_noise(pipeline)
    timesteps = ((noise / (signal + noise))[None] - sigma[:, None]).abs().argmin(dim=1)
    a, s = (table[timesteps].view(-1, 1, 1, 1, 1) for table in (signal, noise))
    x = (latents * (a + s)).transpose(1, 2)
    config, rotary = pipeline.transformer.config, None
    if config.use_rotary_positional_embeddings:
        rotary = pipeline._prepare_rotary_positional_embeddings(CLIP.height, CLIP.width, x.shape[1], x.device)
    v = pipeline.transformer(
        hidden_states=x.float(), encoder_hidden_states=native_text(pipeline, prompts).embeds, timestep=timesteps,
        image_rotary_emb=rotary, return_dict=False,
    )[0]  # fmt: skip
    return ((s * x + a * v) - (a * x - s * v)).transpose(1, 2).float()


def native_latents(pipeline: Any, videos: Tensor) -> Tensor:
    """As `CogVideoXVideoToVideoPipeline.prepare_latents`; its frames come before channels only in the transformer."""
    return pipeline.vae_scaling_factor_image * posterior_mean(pipeline, videos)


def native_sample(
    pipeline: Any, noise: Tensor, prompts: list[str], num_steps: int, guidance_scale: float = 1.0
) -> NativeSample:
    x0, videos = (
        pipeline(
            prompts, latents=noise.transpose(1, 2), num_inference_steps=num_steps, guidance_scale=guidance_scale,
            height=CLIP.height, width=CLIP.width, num_frames=CLIP.num_frames, output_type=kind,
        ).frames
        for kind in ("latent", "pt")
    )  # fmt: skip
    a, s = (table[pipeline.scheduler.timesteps] for table in signal_and_noise(pipeline))
    return NativeSample(torch.cat([s / (a + s), s.new_zeros(1)]).float(), x0.transpose(1, 2), videos)


COGVIDEOX_FAMILIES = tuple(
    Family(
        name=name, backbone=CogVideoXBackbone, build=partial(build, rotary=rotary), clip=CLIP, text_length=226,
        native_text=native_text, native_velocity=native_velocity, native_latents=native_latents,
        native_sample=native_sample, native_guided=native_sample,
        decoded_from=lambda frame: 0 if frame < 3 else frame - (frame + 1) % 2,  # 0 1 2, 3 4, 5 6, ...
    )
    for name, rotary in (("cogvideox-2b", False), ("cogvideox-5b", True))
)  # fmt: skip
