"""How the stock pipeline of each family samples a student at exactly the noise levels it was trained for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.cogvideox import CogVideoXBackbone
from rats_video.backbones.hunyuan import HunyuanVideoBackbone
from rats_video.backbones.ltx import DECODE_NOISE, DECODE_TIMESTEP, LTXBackbone
from rats_video.inference.student import StudentCard


@dataclass(frozen=True)
class StockCall:
    """A scheduler whose saved configuration carries the noise levels, and a call.

    Args:
        scheduler: of diffusers; in the family's own pipeline it makes Euler steps along our grid.
        call: what the pipeline's call needs beside prompt and size; plain values.
        size: `num_frames`, `height` and `width` of the training clips.
        latents: our noise `[B, C, F, H, W]` as the pipeline takes it.
        note: what no folder can carry, hence the caller must pass; or nothing.
    """

    scheduler: Any
    call: Mapping[str, Any]
    size: Mapping[str, int]
    latents: Callable[[Tensor], Tensor] = lambda noise: noise
    note: str = ""


def stock_call(student: PipelineBackbone, card: StudentCard, nfe: int) -> StockCall:
    """The recipe of a student at `nfe` steps.

    - Wan: `FlowMapEulerDiscreteScheduler` shifts equal steps of [1, 0] once and keeps fractional timesteps.
      `FlowMatchEulerDiscreteScheduler` would shift twice there, as `WanPipeline` passes no sigmas.
    - LTX-Video, HunyuanVideo: their pipelines pass sigmas 1 ... 1/N, which `FlowMatchEulerDiscreteScheduler` shifts
      once; without dynamic shifting LTX's `mu` is ignored.
    - CogVideoX: `TCDScheduler` at eta 0 is DDIM, and unlike CogVideoX's own takes a list of timesteps.
    """
    from diffusers import FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    size = {name: int(card.clip[name]) for name in ("num_frames", "height", "width")}
    steps = {"num_inference_steps": nfe, "guidance_scale": 1.0}
    match student:
        case LTXBackbone():
            fps = card.clip["fps"]
            call = steps | {"frame_rate": int(fps) if fps == int(fps) else fps}
            if student.vae.config.timestep_conditioning:
                call |= {"decode_timestep": DECODE_TIMESTEP, "decode_noise_scale": DECODE_NOISE}
            return StockCall(
                FlowMatchEulerDiscreteScheduler(shift=card.shift), call, size,
                latents=lambda noise: rearrange(noise, "b c f h w -> b (f h w) c"),
                note=f"LTXPipeline must be told frame_rate={call['frame_rate']}, the rate it was trained at",
            )  # fmt: skip
        case HunyuanVideoBackbone():
            told = card.embedded_guidance if student.parts["transformer"].config.guidance_embeds else 1.0
            return StockCall(
                FlowMatchEulerDiscreteScheduler(shift=card.shift), steps | {"guidance_scale": told}, size,
                note=f"guidance_scale={told} is an input of the network, told as in training: one call a step",
            )  # fmt: skip
        case CogVideoXBackbone():
            timesteps = _timesteps(student, nfe, card.shift)
            return StockCall(
                _any_timesteps(student.parts["scheduler"]), {"timesteps": timesteps, "guidance_scale": 1.0}, size,
                latents=lambda noise: noise.transpose(1, 2),
                note=f"CogVideoXPipeline must be given timesteps={timesteps}: no scheduler configuration holds them",
            )  # fmt: skip
        case _:
            return StockCall(FlowMapEulerDiscreteScheduler(shift=card.shift), steps, size)


def _timesteps(student: PipelineBackbone, nfe: int, shift: float) -> list[int]:
    """CogVideoX's whole timesteps at our noise levels."""
    signal: Tensor = student.parts["scheduler"].alphas_cumprod.double()
    levels = (1 - signal).sqrt() / (signal.sqrt() + (1 - signal).sqrt())
    grid = student.sigmas(nfe, shift)[:-1].double()
    nearest: list[int] = (levels - grid[:, None]).abs().argmin(dim=1).tolist()
    return nearest


def _any_timesteps(native: Any) -> Any:
    """CogVideoX's noise schedule in a scheduler that takes timesteps; its timestep 0 is the clean clip, as the end is.

    `TCDScheduler` knows no `snr_shift_scale`, so the schedule is given by its betas.
    """
    from diffusers import TCDScheduler

    signal = native.alphas_cumprod.double().clone()
    signal[0] = 1
    betas = torch.cat([signal.new_zeros(1), 1 - signal[1:] / signal[:-1]])
    return TCDScheduler(
        trained_betas=betas.tolist(), prediction_type="v_prediction", clip_sample=False,
        original_inference_steps=len(betas),
    )  # fmt: skip
