"""Teach a model of the shapes to follow motion paths: flow matching on clips whose paths are known."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from rats_video.backbones.wan_paths import PATH_ENCODER, PathWanBackbone
from rats_video.condition import Condition
from rats_video.config.fields import ClipConfig, NumClips, PositiveFloat, PositiveInt, Seed, SolverSteps
from rats_video.datasets.shapes.measure import measure_shapes
from rats_video.datasets.shapes.paths import draw_path, measure_paths, prompts_with_paths, render_paths
from rats_video.datasets.shapes.render import split_combinations
from rats_video.diffusion.flow import add_noise
from rats_video.diffusion.schedule import shift_sigma
from rats_video.motion_path import resample
from rats_video.optim import OptimizerConfig, TrainStepsConfig
from rats_video.pretraining.flow import fit, sampled_twice
from rats_video.progress import ProgressBar
from rats_video.seeds import seeded


class PathTrainConfig(TrainStepsConfig):
    """Root of `train paths`: flow matching on rendered shapes that move along given paths."""

    seed: Seed = 0
    clip: ClipConfig = ClipConfig()
    model: str = Field("tiny-wan", description="pipeline folder or embedded name that learns to follow paths")
    num_clips: NumClips = Field(4096, description="clips rendered and encoded once")
    batch_size: NumClips = Field(32, description="clips a step")
    steps: PositiveInt = Field(3000, description="updates of the weights")
    checkpoint_every: PositiveInt = Field(300, description="steps")
    optimizer: OptimizerConfig
    shift: PositiveFloat = Field(3.0, description="sigma grid shift, in training and in the saved scheduler")
    prompt_dropout: float = Field(0.1, ge=0, lt=1, description="share of clips trained on the empty prompt, no path")
    path_dropout: float = Field(0.1, ge=0, lt=1, description="share of the others trained on their caption alone")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="of the averaged weights, which are the result; 0 is off")
    eval_clips: NumClips = Field(64, description="held-out clips that it is measured on")
    eval_steps: SolverSteps = Field(50, description="solver steps of those clips")
    guidance_scale: PositiveFloat = Field(2.0, description="of those clips; 1 is off")


_CHUNK = 64  # clips rendered and encoded at a time


@dataclass(frozen=True)
class PathClips:
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
    captions: Condition


def train_paths(
    cfg: PathTrainConfig, backbone: PathWanBackbone, folder: Path
) -> tuple[PathWanBackbone, dict[str, float]]:
    """Train denoiser and path encoder together; checkpoints in `folder`, from which an interrupted training goes on.

    Returns:
        The backbone with the averaged weights, and how it follows held-out paths of held-out captions.
    """
    clips = encode_path_clips(backbone, cfg)
    average = _copy_of(backbone)
    backbone.parts[PATH_ENCODER].requires_grad_(requires_grad=True)
    weights, averages = trained_weights(backbone), trained_weights(average)
    fit(
        "train paths", cfg, folder / "checkpoints", weights, averages,
        lambda step: path_flow_loss(backbone, clips, cfg, step),
    )  # fmt: skip
    return average, evaluate_paths(average, cfg)


def _copy_of(backbone: PathWanBackbone) -> PathWanBackbone:
    own = {name: copy.deepcopy(backbone.parts[name]) for name in (*backbone.denoiser_parts, PATH_ENCODER)}
    return PathWanBackbone(**{**backbone.parts, **own})


def trained_weights(backbone: PathWanBackbone) -> Mapping[str, nn.Parameter]:
    """The denoiser's weights and the path encoder's."""
    encoder = backbone.parts[PATH_ENCODER].named_parameters()
    return {**backbone.weights, **{f"{PATH_ENCODER}.{name}": weight for name, weight in encoder}}


def encode_path_clips(backbone: PathWanBackbone, cfg: PathTrainConfig) -> PathClips:
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
    return PathClips(
        torch.cat(latents), torch.cat(points).to(backbone.device), torch.cat(chosen).to(backbone.device), captions
    )


def path_flow_loss(backbone: PathWanBackbone, clips: PathClips, cfg: PathTrainConfig, step: int) -> Tensor:
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
    metrics: dict[str, float] = {}
    for num_steps, videos in sampled_twice(backbone, cfg, prompts):
        metrics[f"adherence_{num_steps}_steps"] = float(measure_shapes(videos, prompts).adherence.mean())
        metrics[f"on_path_{num_steps}_steps"] = float(measure_paths(videos, prompts)["on_path"].mean())
    return metrics
