"""Fine-tune a text-to-video model of any family on prepared clips: flow matching, all weights or an adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.compute import DenoiserConfig, FullWeightsConfig, WeightsConfig
from rats_video.condition import Condition
from rats_video.config.fields import Config, NonNegativeInt, NumClips, PositiveFloat, PositiveInt, Seed, SolverSteps
from rats_video.datasets.prepared.cache import ClipCache, ClipRecord
from rats_video.datasets.prepared.loader import ClipBatch, ClipLoader
from rats_video.diffusion.flow import add_noise
from rats_video.diffusion.rollout import rollout
from rats_video.diffusion.schedule import shift_sigma
from rats_video.errors import UserError, warn
from rats_video.inference.video import slugify, write_mp4
from rats_video.optim import OptimizerConfig, TrainStepsConfig, build_optimizer, ema_update_, set_learning_rate
from rats_video.pretraining.resumable import resumable_steps
from rats_video.runtime import ALONE, Runtime
from rats_video.seeds import seeded
from rats_video.training.metrics import MetricsFile
from rats_video.types import Backbone

Level = Annotated[float, Field(gt=0, le=1)]


class HeldoutConfig(Config):
    """Measurements on held-out clips, always with the same noise."""

    every: PositiveInt = Field(200, description="steps; also before the first and after the last")
    num_clips: NumClips = Field(32, description="held-out clips at most whose loss is taken")
    sigmas: tuple[Level, ...] = Field((0.1, 0.3, 0.5, 0.7, 0.9), min_length=1, description="noise levels of that loss")
    num_videos: NonNegativeInt = Field(2, description="held-out captions that clips are sampled for")
    num_steps: SolverSteps = Field(50, description="solver steps of those clips")
    guidance_scale: PositiveFloat = Field(3.0, description="of those clips; 1 is off")


class FinetuneConfig(TrainStepsConfig):
    """Root of `train teacher --data`: flow matching on prepared clips, from an existing model of any family."""

    seed: Seed = 0
    model: str = Field(description="pipeline folder or embedded name to start from")
    data: str | None = Field(None, description="folder of a `rats-video prepare`; the command's --data")
    weights: WeightsConfig = Field(FullWeightsConfig(), description="what of the denoiser is trained")
    compute: DenoiserConfig = DenoiserConfig()
    embedded_guidance: PositiveFloat = Field(6.0, description="scale told to models that take it as an input")
    batch_size: NumClips = Field(16, description="clips a step, over all processes")
    micro_batch_size: NumClips | None = Field(
        None, description="clips a process works on at a time: the memory of these, the same gradient; null = all"
    )
    steps: PositiveInt = Field(1000, description="updates of the weights")
    checkpoint_every: PositiveInt = Field(100, description="steps")
    optimizer: OptimizerConfig
    noise: Literal["uniform", "logit_normal"] = Field(
        "uniform", description="how levels are drawn before the shift: evenly, or mostly in the middle (as SD3)"
    )
    shift: PositiveFloat = Field(3.0, description="of the noise levels, in training and of the sampled clips")
    prompt_dropout: float = Field(0.1, ge=0, lt=1, description="share of clips trained on the empty prompt")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="of the averaged weights, which are the result; 0 is off")
    validation: HeldoutConfig = HeldoutConfig()

    @model_validator(mode="after")
    def _frozen_base_alone_is_offloaded_or_quantised(self) -> Self:
        if self.compute.offload != "none" and isinstance(self.weights, FullWeightsConfig):
            raise ValueError("compute.offload keeps a frozen base in host memory, but all weights train: use lora")
        if self.compute.quantization != "none" and isinstance(self.weights, FullWeightsConfig):
            raise ValueError("compute.quantization keeps a frozen base in few bits, but all weights train: use lora")
        return self


METRICS, SAMPLES, CHECKPOINTS = "metrics.jsonl", "samples", "checkpoints"
LEVELS, NOISE, HELDOUT_NOISE, SAMPLE_NOISE = 41, 42, 43, 44
"""Streams of random numbers."""


def draw_levels(cfg: FinetuneConfig, count: int, generator: torch.Generator) -> Tensor:
    """`[count]` noise levels in (0, 1), shifted as the sampling grid is."""
    if cfg.noise == "uniform":
        return shift_sigma(torch.rand(count, generator=generator), cfg.shift)
    return shift_sigma(torch.randn(count, generator=generator).sigmoid(), cfg.shift)


def flow_matching_losses(
    backbone: Backbone, x0: Tensor, noise: Tensor, sigma: Tensor, condition: Condition
) -> Tensor:  # fmt: skip
    """`[B]`: each clip's mean square error of the velocity at its level `sigma` `[B]` (Lipman et al., 2023)."""
    velocity = backbone.velocity(add_noise(x0, noise, sigma), sigma, condition)
    return (velocity - (noise - x0)).square().flatten(1).mean(dim=1)


def check_splits(cache: ClipCache) -> None:
    """Raise UserError unless there are clips to train on and clips held out; warn if none are held out on purpose."""
    where = str(cache.folder)
    if not cache.of_split("train"):
        fix = "prepare more videos, or with a smaller heldout share: --set heldout=0 trains on all of them"
        raise UserError("it has no clips to train on", where=where, fix=fix)
    if cache.of_split("heldout"):
        return
    if not cache.trains_on_all:
        fix = "prepare more videos, or with another heldout share or seed: --set heldout=0 trains on all, unvalidated"
        raise UserError("it has no clips held out for validation", where=where, fix=fix)
    warn("no clips are held out, so nothing can tell whether training helps or only repeats them", where=where)


def fine_tune(
    cfg: FinetuneConfig, role: PipelineBackbone, cache: ClipCache, folder: Path, runtime: Runtime = ALONE
) -> tuple[list[float], list[float]]:
    """Train `role` in place on the cache's training clips; its weights are the averaged ones at the end.

    Checkpoints, metrics and sampled clips are kept in `folder`, where an interrupted training goes on exactly. All
    processes of `runtime` call it together and work on their rows of the same batches.

    Returns:
        The losses of the held-out clips before and after; none where none are held out.

    Raises:
        UserError: the cache lacks training clips, a loss is not finite, or a file cannot be written.
        Interrupted: somebody asked to stop; the step was finished and saved.
    """
    loader = ClipLoader(
        cache, batch_size=cfg.batch_size, seed=cfg.seed, rows=runtime.rows(cfg.batch_size),
        prompt_dropout=cfg.prompt_dropout,
    )  # fmt: skip
    heldout, weights = Heldout(cfg, role, cache, folder / SAMPLES, runtime), role.weights
    before = heldout.losses()
    heldout.sample(0)
    average = {name: weight.detach().clone() for name, weight in weights.items()} if cfg.ema_decay else {}
    _fit(cfg, role, average, loader, heldout, folder, runtime)
    swap(average, weights)
    after = heldout.losses()
    heldout.sample(cfg.steps)
    return before, after


def _fit(
    cfg: FinetuneConfig, role: PipelineBackbone, average: dict[str, Tensor], loader: ClipLoader, heldout: Heldout,
    folder: Path, runtime: Runtime,
) -> None:  # fmt: skip
    weights = role.weights
    optimizer = build_optimizer(cfg.optimizer, weights.values())
    steps = resumable_steps(
        "fine-tune", cfg.steps, folder / CHECKPOINTS, weights, optimizer,
        average=average or None, every=cfg.checkpoint_every, runtime=runtime,
    )  # fmt: skip
    batches, metrics = None, None
    for step, progress in steps:
        if batches is None:  # the first step of this session
            batches = loader.batches(step)
            metrics = MetricsFile(folder / METRICS, step) if runtime.is_main else None
        lr = set_learning_rate(optimizer, cfg.optimizer, step, cfg.steps)
        optimizer.zero_grad(set_to_none=True)
        row = runtime.all_reduce_mean({"loss": accumulate_loss(cfg, role, next(batches), step, runtime)})
        if not math.isfinite(row["loss"]):
            raise UserError(
                f"the loss of step {step + 1} is {row['loss']}", where="optimizer.lr",
                fix="lower it, and start anew with --overwrite",
            )  # fmt: skip
        runtime.average_gradients(weights.values())
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), cfg.optimizer.max_grad_norm)
        optimizer.step()
        if average:
            ema_update_(average, weights, min(cfg.ema_decay, (1 + step) / (10 + step)))
        row |= {"grad_norm": float(norm), "lr": lr}
        if (step + 1) % cfg.validation.every == 0 and step + 1 < cfg.steps:
            swap(average, weights)
            losses = heldout.losses()
            heldout.sample(step + 1)
            swap(average, weights)
            if losses:
                row["heldout_loss"] = sum(losses) / len(losses)
        if metrics is not None:
            metrics.append({"step": step + 1, **row})
        progress.advance(**{name: row[name] for name in ("loss", "heldout_loss") if name in row})


def accumulate_loss(
    cfg: FinetuneConfig, role: PipelineBackbone, batch: ClipBatch, step: int, runtime: Runtime
) -> float:
    """Add the gradient of the mean loss of this process's rows to the weights', part by part; returns that loss.

    Levels and noise are drawn for the whole batch, whoever works on it and in how many parts.
    """
    rows = runtime.rows(cfg.batch_size)
    sigma = role.nearest_levels(draw_levels(cfg, cfg.batch_size, seeded(cfg.seed, LEVELS, step)))[rows]
    shape = (cfg.batch_size, *batch.latents.shape[1:])
    noise = torch.randn(shape, generator=seeded(cfg.seed, NOISE, step))[rows]
    count, total = len(sigma), 0.0
    for part in torch.arange(count).split(cfg.micro_batch_size or count):
        x0, eps, levels = (each[part].to(role.device) for each in (batch.latents, noise, sigma))
        text = batch.text.map(lambda rows, part=part: rows[part].to(role.device))  # type: ignore[misc]
        loss = flow_matching_losses(role, x0, eps, levels, text).sum() / count
        loss.backward()
        total += float(loss.detach())
    return total


@torch.no_grad()
def swap(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Exchange the values of all tensors of `one` with those of the same names in `other`."""
    for name, tensor in one.items():
        kept = tensor.clone()
        tensor.copy_(other[name])
        other[name].copy_(kept)


@dataclass
class Heldout:
    """Looks at clips that are never trained on, always with the same noise.

    Args:
        cfg: of the training.
        role: what is looked at.
        cache: where the clips are.
        folder: of the sampled clips.
        runtime: the processes that share the work.
    """

    cfg: FinetuneConfig
    role: PipelineBackbone
    cache: ClipCache
    folder: Path
    runtime: Runtime = ALONE

    def __post_init__(self) -> None:
        self.records = evenly(self.cache.of_split("heldout"), self.cfg.validation.num_clips)

    @torch.no_grad()
    def losses(self) -> list[float]:
        """Each clip's loss, the mean over `validation.sigmas`."""
        return self.runtime.gather_shards([self._loss(index) for index in self.runtime.shard(len(self.records))])

    def _loss(self, index: int) -> float:
        levels = self.role.nearest_levels(torch.tensor(self.cfg.validation.sigmas))
        latents, text = self.cache.read([self.records[index]])
        noise = torch.randn(latents.shape, generator=seeded(self.cfg.seed, HELDOUT_NOISE, index))
        x0, noise, text = (latents.to(self.role.device), noise.to(self.role.device), self._on_device(text))
        losses = [flow_matching_losses(self.role, x0, noise, level[None].to(x0), text) for level in levels]
        return float(torch.cat(losses).mean())

    @torch.no_grad()
    def sample(self, step: int) -> None:
        """Write `step-NNNNNN/I-CAPTION.mp4` for a few captions, unless a session before this one did."""
        look = self.cfg.validation
        chosen = evenly(self.records, look.num_videos)
        for index in self.runtime.shard(len(chosen)):
            record = chosen[index]
            path = self.folder / f"step-{step:06d}" / f"{index}-{slugify(record.caption)}.mp4"
            if path.is_file():
                continue
            spec = self.cache.spec(record)
            noise = self.role.sample_noise(1, spec, seeded(self.cfg.seed, SAMPLE_NOISE, index))
            made = rollout(
                self.role.velocity, noise, self.role.sigmas(look.num_steps, self.cfg.shift),
                self._on_device(self.cache.read([record])[1]), negative=self._on_device(self.cache.empty_prompt),
                guidance_scale=look.guidance_scale, guide=self.role.guidance(),
            )  # fmt: skip
            write_mp4(self.role.decode(made.x0)[0].cpu(), path, fps=spec.fps)

    def _on_device(self, condition: Condition) -> Condition:
        return condition.map(lambda part: part.to(self.role.device))


def evenly(records: Sequence[ClipRecord], most: int) -> list[ClipRecord]:
    """At most so many of them, spread over all."""
    count = min(most, len(records))
    return [records[index * len(records) // count] for index in range(count)]
