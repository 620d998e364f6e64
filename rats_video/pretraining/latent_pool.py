"""The training data of a latent reward: latents of many kinds, their decoded clips and pixel scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor
from torch.nn import functional as F

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.wan import WanBackbone
from rats_video.config.fields import (
    ClipConfig,
    NonNegativeFloat,
    NonNegativeInt,
    NumClips,
    PositiveFloat,
    PositiveInt,
    Seed,
    SolverSteps,
)
from rats_video.datasets.prompts.settings import PromptsConfig, ShapesPromptsConfig
from rats_video.datasets.shapes.corruptions import corrupt
from rats_video.datasets.shapes.render import parse_prompt, render
from rats_video.diffusion.causal import pool_to_latent_frames
from rats_video.diffusion.rollout import rollout
from rats_video.files import replacing
from rats_video.methods.scoring import score_pixels
from rats_video.optim import OptimizerConfig, TrainStepsConfig
from rats_video.progress import ProgressBar
from rats_video.rewards.sum import PixelRewardConfig
from rats_video.seeds import seeded
from rats_video.types import Reward


class LatentRewardTrainConfig(TrainStepsConfig):
    """Root of `train reward --latent`: a pixel reward that needs no VAE, as it judges a sketch drawn from latents.

    The sketch learns from samples of the model, from damaged ones, from rendered clips where the prompts are shapes,
    and from samples that it was itself made to like better than it should: a student will go there too.
    """

    seed: Seed = 0
    clip: ClipConfig = ClipConfig()
    model: str = Field("tiny-wan", description="pipeline whose latents are scored")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of that model's weights")
    prompts: PromptsConfig = Field(ShapesPromptsConfig(), description="of the samples")
    reward: PixelRewardConfig = Field(description="the pixel reward that is imitated")
    student: str | None = Field(
        None, description="folder of a trained student; what it makes is never learned from, only judged at the end"
    )
    init: str | None = Field(None, description="folder of a latent reward to go on from; null starts at random")
    width: PositiveInt = Field(64, description="feature channels of the sketch")
    blocks: PositiveInt = Field(4, description="residual blocks of the sketch")
    coarse: PositiveInt = Field(2, description="pixels of the clip that are one of the sketch, each way")
    shift: PositiveFloat = Field(3.0, description="sigma grid shift of the samples")
    sample_steps: tuple[SolverSteps, ...] = Field((2, 3, 4, 6, 10, 20), description="step counts of the samples")
    guidance_scales: tuple[PositiveFloat, ...] = Field((1.0, 3.0), description="of the samples, in turns")
    num_samples: NumClips = Field(3000, description="clips sampled from the model")
    num_damaged: NonNegativeInt = Field(2000, description="samples with noise, other gains, or parts of another one")
    num_rendered: NonNegativeInt = Field(0, description="rendered shapes, half of them damaged, through the VAE")
    rounds: NonNegativeInt = Field(4, description="how often, on the way, samples are climbed on what was learned")
    num_climbed: NonNegativeInt = Field(400, description="clips of each round")
    climb: PositiveFloat = Field(0.6, description="how far they go at most, root mean square in latents")
    other_prompts: NonNegativeInt = Field(2, description="prompts beside its own that a clip is scored against")
    sample_batch: NumClips = Field(40, description="clips sampled, decoded and scored at a time")
    batch_size: NumClips = Field(32, description="clips a step")
    steps: PositiveInt = Field(3000, description="updates of the sketch")
    sketch_steps: NonNegativeInt = Field(
        1500, description="first steps, on pixels alone; what the reward says of a bad sketch only confuses"
    )
    score_weight: NonNegativeFloat = Field(0.02, description="of the scores, beside the pixels")
    contrast_weight: NonNegativeFloat = Field(
        10.0, description="extra weight of pixels that stand off their frame's mean"
    )
    optimizer: OptimizerConfig
    eval_clips: NumClips = Field(256, description="held-out clips that it is measured on")


Change = Callable[[Tensor, list[str], Generator], Tensor]
"""`(latents [B, C, F, H, W], their prompts, generator) -> latents`."""


@dataclass(frozen=True)
class ScoredLatents:
    """N clean latents, their decoded clips made small, and what the pixel reward says of the clips.

    Each is judged against P prompts, its own one first.

    Args:
        latents: `[N, C, F, H, W]`, on the CPU like all of it.
        small: `[N, T, 3, height / coarse, width / coarse]`, bytes.
        prompts: `[N, P]`, places in the list of prompts.
        clip: `[N, P, 1 + parts]` scores of the clip and its parts.
        frames: `[N, P, F]` scores of latent frames, or None.
        parts: names.
    """

    latents: Tensor
    small: Tensor
    prompts: Tensor
    clip: Tensor
    frames: Tensor | None
    parts: tuple[str, ...]

    def save(self, path: Path, identity: str) -> None:
        """Write it as one safetensors file, with what it was made from."""
        tensors = {"latents": self.latents, "small": self.small, "prompts": self.prompts, "clip": self.clip}
        tensors |= {} if self.frames is None else {"frames": self.frames}
        with replacing(path, "scored latents") as aside:
            save_file(tensors, aside, {"identity": identity, "parts": json.dumps(self.parts)})

    @classmethod
    def find(cls, path: Path, identity: str) -> ScoredLatents | None:
        """The pool that `save` wrote, if it is readable and was made from the same settings."""
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata()
                tensors: dict[str, Any] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError:
            return None
        if header["identity"] != identity:
            return None
        return cls(**{"frames": None, **tensors}, parts=tuple(json.loads(header["parts"])))

    def __len__(self) -> int:
        return len(self.latents)

    @staticmethod
    def cat(several: Sequence[ScoredLatents]) -> ScoredLatents:
        """All of them."""
        frames = [part.frames for part in several if part.frames is not None]
        return ScoredLatents(
            torch.cat([part.latents for part in several]),
            torch.cat([part.small for part in several]),
            torch.cat([part.prompts for part in several]),
            torch.cat([part.clip for part in several]),
            torch.cat(frames) if frames else None,
            several[0].parts,
        )


@dataclass(frozen=True)
class LatentSampler:
    """Makes latents and has their clips judged.

    Args:
        cfg: of the training.
        backbone: the model.
        reward: the pixel reward.
        prompts: those that clips are made for and scored against.
    """

    cfg: LatentRewardTrainConfig
    backbone: PipelineBackbone
    reward: Reward
    prompts: Sequence[str]

    def sampled(
        self, role: PipelineBackbone, count: int, stream: int, settings: Sequence[tuple[int, float]]
    ) -> ScoredLatents:
        """Samples of `role` at these step counts and guidance scales in turn."""
        negative = self.backbone.encode_text([""])

        def make(turn: int, places: Tensor, generator: Generator) -> Tensor:
            steps, scale = settings[turn % len(settings)]
            noise = role.sample_noise(len(places), self.cfg.clip.spec, generator)
            grid, text = role.sigmas(steps, self.cfg.shift), role.encode_text(self.own_prompts(places))
            return rollout(
                role.velocity, noise, grid, text, negative=negative, guidance_scale=scale, guide=role.guidance()
            ).x0

        return self._scored("sample clips", count, stream, make)

    def rendered(self, count: int, stream: int) -> ScoredLatents:
        """Rendered shapes that went through the VAE, half of them damaged before."""

        def make(turn: int, places: Tensor, generator: Generator) -> Tensor:
            assert isinstance(self.backbone, WanBackbone), "no other family's VAE encodes here"
            shapes = [parse_prompt(prompt) for prompt in self.own_prompts(places)]
            videos = render(shapes, self.cfg.clip.spec, generator)
            videos = corrupt(videos, generator)[0] if turn % 2 else videos
            return self.backbone.encode(videos.to(self.backbone.device))

        return self._scored("rendered clips", count, stream, make)

    def changed(self, title: str, count: int, stream: int, pool: ScoredLatents, change: Change) -> ScoredLatents:
        """Clips of a pool, with their own prompts, whose latents are changed by `change`."""

        def make(_: int, places: Tensor, generator: Generator) -> Tensor:
            index = torch.randint(len(pool), (len(places),), generator=generator)
            places[:, 0] = pool.prompts[index, 0]
            return change(pool.latents[index].to(self.backbone.device), self.own_prompts(places), generator)

        return self._scored(title, count, stream, make)

    def own_prompts(self, places: Tensor) -> list[str]:
        """The prompt that each clip is made for."""
        return [self.prompts[i] for i in places[:, 0].tolist()]

    @torch.no_grad()
    def _scored(
        self, title: str, count: int, stream: int, make: Callable[[int, Tensor, Generator], Tensor]
    ) -> ScoredLatents:
        made: list[ScoredLatents] = []
        with ProgressBar(title, count) as progress:
            for turn, start in enumerate(range(0, count, self.cfg.sample_batch)):
                batch = min(self.cfg.sample_batch, count - start)
                generator = seeded(self.cfg.seed, stream, turn)
                places = torch.randint(len(self.prompts), (batch, 1 + self.cfg.other_prompts), generator=generator)
                made.append(self._judged(make(turn, places, generator), places))
                progress.advance(batch)
        return ScoredLatents.cat(made)

    def _judged(self, latents: Tensor, places: Tensor) -> ScoredLatents:
        videos = self.backbone.decode(latents)
        said = [
            score_pixels(self.reward, videos, [self.prompts[i] for i in column.tolist()])
            for column in places.unbind(dim=1)
        ]
        clip = [torch.stack([each.clip, *each.parts.values()], dim=-1) for each in said]
        stride = self.backbone.temporal_stride
        frames = [pool_to_latent_frames(each.frames, stride) for each in said if each.frames is not None]
        small = F.avg_pool2d(videos.flatten(0, 1), self.cfg.coarse).unflatten(0, videos.shape[:2])
        return ScoredLatents(
            latents.float().cpu(), (255 * small).round().byte().cpu(), places, torch.stack(clip, dim=1).float().cpu(),
            torch.stack(frames, dim=1).float().cpu() if frames else None, tuple(said[0].parts),
        )  # fmt: skip


def corrupt_latents(latents: Tensor, _: list[str], generator: Generator) -> Tensor:
    """Each clip gets one of four: noise, other gains of its channels, a blend with another clip, its later frames.

    How much is drawn for each clip.
    """
    count, device = len(latents), latents.device
    others = latents.roll(1, dims=0)
    amount = torch.rand(count, generator=generator).view(-1, 1, 1, 1, 1).to(device)
    noise = torch.randn(latents.shape, generator=generator).to(device)
    gains = torch.randn(count, latents.shape[1], generator=generator).to(device)[..., None, None, None]
    first = 1 + torch.floor(amount * (latents.shape[2] - 1))
    is_later = torch.arange(latents.shape[2], device=device).view(1, 1, -1, 1, 1) >= first
    ways = torch.stack([
        latents + 0.6 * amount * noise,
        latents * (1 + 0.5 * amount * gains),
        latents.lerp(others, 0.5 * amount),
        torch.where(is_later, others, latents),
    ])  # fmt: skip
    way = torch.randint(len(ways), (count,), generator=generator)
    return ways[way, torch.arange(count)]
