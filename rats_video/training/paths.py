"""Teach a model of the shapes to follow motion paths: flow matching on clips whose paths are known."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rats_video.backbones.wan_paths import PATH_ENCODER, PathWanBackbone
from rats_video.config.pretrain import PathTrainConfig
from rats_video.datasets.motion_paths import draw_path, measure_paths, prompts_with_paths, render_paths
from rats_video.datasets.shapes import split_combinations
from rats_video.datasets.shapes_measure import measure_shapes
from rats_video.diffusion.flow import add_noise
from rats_video.diffusion.rollout import rollout
from rats_video.diffusion.schedule import shift_sigma, sigma_grid
from rats_video.distill.ema import update_ema
from rats_video.motion_path import resample
from rats_video.seeds import seeded
from rats_video.training.optim import build_optimizer, set_learning_rate
from rats_video.training.progress import ProgressBar
from rats_video.training.resumable import resumable
from rats_video.types import TextCondition

_CHUNK = 64  # clips rendered, encoded or decoded at a time


@dataclass(frozen=True)
class GuidedClips:
    """Clips encoded once, with their paths.

    Args:
        latents: `[N, C, F, H, W]`.
        points: `[N, P, 2]`, their paths.
        caption: `[N]`, an index into `captions`.
        captions: encoded without paths; the last one is empty.
    """

    latents: Tensor
    points: Tensor
    caption: Tensor
    captions: TextCondition


def train_paths(
    cfg: PathTrainConfig, backbone: PathWanBackbone, folder: Path
) -> tuple[PathWanBackbone, dict[str, float]]:
    """Train denoiser and path encoder together; checkpoints in `folder`, from which an interrupted training goes on.

    Returns:
        The backbone with the averaged weights, and how it follows held-out paths of held-out captions.
    """
    clips = encode_guided(backbone, cfg)
    average = _copy_of(backbone)
    backbone.parts[PATH_ENCODER].requires_grad_(requires_grad=True)
    weights, averages = trained_weights(backbone), trained_weights(average)
    optimizer = build_optimizer(cfg.optimizer, weights.values())
    for step, progress in resumable(
        "train paths", cfg.steps, folder / "checkpoints", weights, optimizer,
        average=averages, every=cfg.checkpoint_every,
    ):  # fmt: skip
        set_learning_rate(optimizer, cfg.optimizer, step, cfg.steps)
        loss = guided_loss(backbone, clips, cfg, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights.values(), cfg.optimizer.max_grad_norm)
        optimizer.step()
        update_ema(averages, weights, min(cfg.ema_decay, (1 + step) / (10 + step)))
        progress.advance(loss=float(loss.detach()))
    return average, evaluate_paths(average, cfg)


def _copy_of(backbone: PathWanBackbone) -> PathWanBackbone:
    own = {name: copy.deepcopy(backbone.parts[name]) for name in (*backbone.denoiser_parts, PATH_ENCODER)}
    return PathWanBackbone(**{**backbone.parts, **own})


def trained_weights(backbone: PathWanBackbone) -> Mapping[str, nn.Parameter]:
    """The denoiser's weights and the path encoder's."""
    encoder = backbone.parts[PATH_ENCODER].named_parameters()
    return {**backbone.weights, **{f"{PATH_ENCODER}.{name}": weight for name, weight in encoder}}


def encode_guided(backbone: PathWanBackbone, cfg: PathTrainConfig) -> GuidedClips:
    """Render and encode `num_clips` clips of training combinations, each along a path of its own."""
    combinations, num_points = split_combinations()[0], backbone.parts[PATH_ENCODER].num_points
    latents, points, chosen = [], [], []
    with ProgressBar("encode clips", cfg.num_clips) as progress:
        for start in range(0, cfg.num_clips, _CHUNK):
            generator, count = seeded(cfg.seed, 1, start), min(_CHUNK, cfg.num_clips - start)
            index = torch.randint(len(combinations), (count,), generator=generator)
            attributes = [combinations[i] for i in index]
            paths = [draw_path(each, generator) for each in attributes]
            videos = render_paths(attributes, paths, cfg.clip.spec, generator, backbone.device)
            latents.append(backbone.encode(videos))
            points.append(torch.stack([resample(path, num_points) for path in paths]))
            chosen.append(index)
            progress.advance(count)
    captions = backbone.encode_text([*(a.prompt for a in combinations), ""])
    return GuidedClips(
        torch.cat(latents), torch.cat(points).to(backbone.device), torch.cat(chosen).to(backbone.device), captions
    )


def guided_loss(backbone: PathWanBackbone, clips: GuidedClips, cfg: PathTrainConfig, step: int) -> Tensor:
    """Mean square error of the velocity at random noise levels, captions and paths dropped at random."""
    generator, device, size = seeded(cfg.seed, 2, step), backbone.device, (cfg.batch_size,)
    chosen = torch.randint(len(clips.latents), size, generator=generator).to(device)
    sigma = shift_sigma(torch.rand(size, generator=generator), cfg.shift).to(device)
    no_prompt = (torch.rand(size, generator=generator) < cfg.prompt_dropout).to(device)
    no_path = (torch.rand(size, generator=generator) < cfg.path_dropout).to(device) | no_prompt
    x0 = clips.latents[chosen]
    noise = torch.randn(x0.shape, generator=generator).to(device)
    captions = torch.where(no_prompt, len(clips.captions) - 1, clips.caption[chosen])
    text = backbone.add_paths(clips.captions.map(lambda part: part[captions]), clips.points[chosen], ~no_path)
    return F.mse_loss(backbone.velocity(add_noise(x0, noise, sigma), sigma, text), noise - x0)


@torch.no_grad()
def evaluate_paths(backbone: PathWanBackbone, cfg: PathTrainConfig) -> dict[str, float]:
    """Adherence and frames on the path, on held-out captions and paths: guided at `eval_steps`, unguided at 4."""
    combinations = split_combinations()[1]
    prompts = prompts_with_paths(combinations, -(-cfg.eval_clips // len(combinations)))[: cfg.eval_clips]
    text, negative = backbone.encode_text(prompts), backbone.encode_text([""])
    noise = backbone.sample_noise(len(prompts), cfg.clip.spec, seeded(cfg.seed, 3))
    metrics: dict[str, float] = {}
    for num_steps, scale in ((cfg.eval_steps, cfg.guidance_scale), (4, 1.0)):
        sigmas = sigma_grid(num_steps, cfg.shift)
        clips = rollout(backbone.velocity, noise, sigmas, text, negative=negative, guidance_scale=scale)
        videos = torch.cat([backbone.decode(latents) for latents in clips.x0.split(_CHUNK)])
        metrics[f"adherence_{num_steps}_steps"] = float(measure_shapes(videos, prompts).adherence.mean())
        metrics[f"on_path_{num_steps}_steps"] = float(measure_paths(videos, prompts)["on_path"].mean())
    return metrics
