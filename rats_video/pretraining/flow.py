"""Training by flow matching: what teachers and path encoders share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from rats_video.backbones.wan import WanBackbone
from rats_video.config.fields import ClipConfig
from rats_video.diffusion.rollout import rollout
from rats_video.diffusion.schedule import sigma_grid
from rats_video.optim import OptimizerConfig, build_optimizer, ema_update_, set_learning_rate
from rats_video.pretraining.resumable import resumable_steps
from rats_video.seeds import seeded


class FlowTrainConfig(Protocol):
    """The settings that training by flow matching reads."""

    @property
    def seed(self) -> int:
        """Seed of everything that is drawn."""
        ...

    @property
    def clip(self) -> ClipConfig:
        """Clip size."""
        ...

    @property
    def steps(self) -> int:
        """Updates."""
        ...

    @property
    def checkpoint_every(self) -> int:
        """Steps between checkpoints."""
        ...

    @property
    def optimizer(self) -> OptimizerConfig:
        """AdamW."""
        ...

    @property
    def shift(self) -> float:
        """Shift of the sigma grid."""
        ...

    @property
    def ema_decay(self) -> float:
        """Decay of the averages."""
        ...

    @property
    def eval_steps(self) -> int:
        """Solver steps of the guided samples that are measured."""
        ...

    @property
    def guidance_scale(self) -> float:
        """Guidance of those samples."""
        ...


def fit(
    title: str,
    cfg: FlowTrainConfig,
    checkpoints: Path,
    weights: Mapping[str, nn.Parameter],
    averages: Mapping[str, Tensor],
    loss_of: Callable[[int], Tensor],
) -> None:
    """Train weights, and their running averages, by the loss of each step; an interrupted training goes on.

    Args:
        title: for the progress bar.
        cfg: steps, optimizer and the averages' decay, which starts low.
        checkpoints: folder that they are kept in.
        weights: what trains.
        averages: of the same names; changed in place.
        loss_of: 0-d, a pure function of the step and the weights.
    """
    optimizer = build_optimizer(cfg.optimizer, weights.values())
    for step, progress in resumable_steps(
        title, cfg.steps, checkpoints, weights, optimizer, average=averages, every=cfg.checkpoint_every
    ):
        set_learning_rate(optimizer, cfg.optimizer, step, cfg.steps)
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights.values(), cfg.optimizer.max_grad_norm)
        optimizer.step()
        ema_update_(averages, weights, min(cfg.ema_decay, (1 + step) / (10 + step)))
        progress.advance(loss=float(loss.detach()))


@torch.no_grad()
def sampled_twice(backbone: WanBackbone, cfg: FlowTrainConfig, prompts: Sequence[str]) -> Iterator[tuple[int, Tensor]]:
    """Clips `[B, T, 3, height, width]` of the prompts from the same noise: in `eval_steps` with guidance, in 4 without.

    Yields:
        The step count and the clips.
    """
    text, negative = backbone.encode_text(prompts), backbone.encode_text([""])
    noise = backbone.sample_noise(len(prompts), cfg.clip.spec, seeded(cfg.seed, 3))
    for num_steps, scale in ((cfg.eval_steps, cfg.guidance_scale), (4, 1.0)):
        sigmas = sigma_grid(num_steps, cfg.shift)
        clips = rollout(
            backbone.velocity, noise, sigmas, text, negative=negative, guidance_scale=scale, guide=backbone.guidance()
        )
        yield num_steps, decoded(backbone, clips.x0)


def decoded(backbone: WanBackbone, latents: Tensor) -> Tensor:
    """Pixels `[B, T, 3, height, width]` in [0, 1] of latents `[B, C, F, H, W]`, some at a time."""
    return torch.cat([backbone.decode(part) for part in latents.split(32)])


def save_pipeline(backbone: WanBackbone, folder: Path, *, shift: float, from_first_frame: bool = False) -> None:
    """Write a folder that `diffusers.WanPipeline.from_pretrained` loads, its scheduler on our sigma grid.

    Where the model was taught `from_first_frame`, `WanImageToVideoPipeline` loads it as well (`expand_timesteps`).
    """
    from diffusers import FlowMapEulerDiscreteScheduler, WanPipeline
    from transformers.utils import logging

    logging.disable_progress_bar()
    pipeline = WanPipeline(
        tokenizer=backbone.parts["tokenizer"],
        text_encoder=backbone.parts["text_encoder"],
        vae=backbone.vae,
        scheduler=FlowMapEulerDiscreteScheduler(shift=shift),
        transformer=backbone.denoiser,
        expand_timesteps=from_first_frame,
    )
    pipeline.save_pretrained(folder)
