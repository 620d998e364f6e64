"""What the contract test must know of a family: how to make a tiny pipeline of it, and what the stock pipeline does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.lora import LORA_FILE
from rats_video.types import ClipSpec, TextCondition


@dataclass(frozen=True)
class NativeSample:
    """The stock pipeline's own output, in our layout.

    Args:
        sigmas: `[N + 1]` the noise levels its scheduler stepped through.
        x0: final latents `[B, C, F, H, W]`, normalised as the denoiser sees them.
        videos: pixels `[B, T, 3, height, width]` in [0, 1].
    """

    sigmas: Tensor
    x0: Tensor
    videos: Tensor


def posterior_mean(pipeline: Any, videos: Tensor) -> Tensor:
    """The VAE's own latents of pixels `[B, T, 3, height, width]` in [0, 1], prepared as the pipelines do."""
    latents: Tensor = pipeline.vae.encode(pipeline.video_processor.preprocess_video(videos)).latent_dist.mode()
    return latents


def load_lora(pipeline: Any, folder: Path) -> None:
    pipeline.load_lora_weights(folder, weight_name=LORA_FILE)


@dataclass(frozen=True)
class Family:
    """One family under test.

    Args:
        name: for the test's id.
        backbone: the adapter's class.
        build: saves a tiny randomly initialised pipeline of the family's own classes into a folder.
        clip: a small clip with at least 3 latent frames.
        text_length: L of the text the denoiser stands for (512 for Wan), or None where it is as long as the prompts.
        native_text: what the stock pipeline's `encode_prompt` returns for these prompts.
        native_velocity: `noise - x0` from the stock pipeline's own call of its transformer, at one sigma a clip.
        native_latents: the stock VAE on pixels `[B, T, 3, height, width]` in [0, 1], then the normalisation of the
            family's own video-to-video or image-to-video pipeline.
        native_sample: the stock pipeline on this noise `[B, C, F, H, W]`, guidance off, in this many steps.
        native_guided: the same with a guidance scale; None where the pipeline's guidance is not the plain formula.
        load_lora: how a user of the stock pipeline loads the folder of a LoRA student.
        decoded_from: the first latent frame whose pixels a given one changes: itself for a causal VAE.
    """

    name: str
    backbone: type[PipelineBackbone]
    build: Callable[[Path], None]
    clip: ClipSpec
    text_length: int | None
    native_text: Callable[[Any, list[str]], TextCondition]
    native_velocity: Callable[[Any, Tensor, Tensor, list[str]], Tensor]
    native_latents: Callable[[Any, Tensor], Tensor]
    native_sample: Callable[[Any, Tensor, list[str], int], NativeSample]
    native_guided: Callable[[Any, Tensor, list[str], int, float], NativeSample] | None = None
    load_lora: Callable[[Any, Path], None] = load_lora
    decoded_from: Callable[[int], int] = lambda frame: frame
