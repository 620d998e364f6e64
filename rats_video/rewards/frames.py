"""The base of rewards for single frames: which frames are scored, and how many at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Field, Tag
from torch import Tensor, nn

from rats_video.config.explain import KIND
from rats_video.config.fields import Config, PositiveInt
from rats_video.meta import empty_model
from rats_video.rewards.base import BaseRewardConfig
from rats_video.rewards.files import read_config
from rats_video.rewards.prompted import Condition, PromptedReward, score_in_chunks
from rats_video.types import RewardScores


class WindowFramesConfig(Config):
    """Frames in a row at a place drawn from the prompt: each prompt has one window, in every batch and every run."""

    kind: Literal["window"]
    count: PositiveInt = Field(description="frames in a row; all where a clip has no more")


class EndFramesConfig(Config):
    """The first, the middle and the last frame."""

    kind: Literal["ends"]


def _frame_choice(value: Any) -> Any:
    return value.get(KIND) if isinstance(value, dict) else getattr(value, KIND, "evenly")


FrameChoice = Annotated[
    Annotated[PositiveInt | None, Tag("evenly")]
    | Annotated[WindowFramesConfig, Tag("window")]
    | Annotated[EndFramesConfig, Tag("ends")],
    Discriminator(_frame_choice),
]
"""The frames of a clip that are scored: a number of evenly spaced ones, all (null), or another choice by its `kind`."""


class FrameRewardConfig(BaseRewardConfig):
    """Settings of a reward for single frames."""

    per = "frame"

    path: str = Field(description="folder of the model, in safetensors")
    frames: FrameChoice = Field(
        None, description="score that many, evenly spaced from first to last; null = all; or {kind: window or ends}"
    )
    chunk: PositiveInt = Field(8, description="frames a forward; they are recomputed in backward, so it bounds memory")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the model's weights")

    def hub_config(self, published: dict[str, Any]) -> dict[str, Any]:
        """The config.json in the folder of the model; `published` where there is no such folder."""
        folder = Path(self.path).expanduser()
        return read_config(folder) if folder.is_dir() else published

    def empty_model(self, kind: str, config: Mapping[str, Any]) -> nn.Module:
        """The model of that class of transformers, without weights."""
        import transformers

        return empty_model(getattr(transformers, kind), config, where=self.path).to(getattr(torch, self.dtype))


class FrameReward(PromptedReward):
    """Scores some frames of each clip one by one; a clip's score is the mean of theirs.

    A frame that is not scored takes the score of the nearest scored one (the earlier of two), so a gate by latent
    frames works with few scored frames too. Gradient reaches the scored frames alone. `cfg.chunk` frames are scored at
    a time and recomputed in backward, so memory does not grow with their number.

    A subclass defines how it reads prompts (`condition`, `token_counts`) and frames (`score_frames`).
    """

    def __init__(self, cfg: FrameRewardConfig) -> None:
        super().__init__()
        self.cfg = cfg

    def score_frames(self, frames: Tensor, condition: Condition) -> Tensor:
        """Scores `[N]`, float32, of frames `[N, 3, height, width]` in [0, 1], each with its own row of condition."""
        raise NotImplementedError  # one that compares frames overrides `forward` instead

    def looks_at(self, num_frames: int) -> Tensor:
        """Indices of the frames that may be scored: all for a window, whose place depends on the prompt."""
        if isinstance(self.cfg.frames, WindowFramesConfig):
            return torch.arange(num_frames)
        return self.looks_at_for("", num_frames)

    def looks_at_for(self, prompt: str, num_frames: int) -> Tensor:
        """Indices of the frames of a clip of that prompt that are scored."""
        return scored_frames(num_frames, self.cfg.frames, [prompt])[0]

    def forward(self, videos: Tensor, prompts: Sequence[str]) -> RewardScores:
        """Score `[B, T, 3, height, width]` in [0, 1]; a prompt longer than the model reads is cut, with one warning."""
        batch, num_frames = videos.shape[:2]
        scored = scored_frames(num_frames, self.cfg.frames, prompts).to(videos.device)
        self.check_prompts(prompts)
        with torch.no_grad():
            rows = {name: row.repeat_interleave(scored.shape[1], 0) for name, row in self.condition(prompts).items()}
        frames = videos[torch.arange(batch, device=videos.device)[:, None], scored].flatten(0, 1)
        scores = score_in_chunks(self.score_frames, frames, rows, self.cfg.chunk).unflatten(0, (batch, -1))
        distance = (torch.arange(num_frames, device=videos.device)[:, None] - scored[:, None]).abs()  # [B, T, scored]
        return RewardScores(clip=scores.mean(dim=1), frames=scores.gather(1, distance.argmin(dim=2)))


def scored_frames(num_frames: int, choice: FrameChoice, prompts: Sequence[str]) -> Tensor:
    """Indices `[B, scored]`, rising, of the frames that are scored for each of B prompts."""
    match choice:
        case WindowFramesConfig():
            count = min(choice.count, num_frames)
            # The prompt alone decides, so that teacher, student, micro-batches and resumed runs see the same frames.
            digests = (hashlib.sha256(prompt.encode()).digest() for prompt in prompts)
            first = torch.tensor([int.from_bytes(digest, "big") % (num_frames - count + 1) for digest in digests])
            return first[:, None] + torch.arange(count)
        case EndFramesConfig():
            frames = evenly_spaced(num_frames, 3)
        case _:
            frames = evenly_spaced(num_frames, choice)
    return frames.expand(len(prompts), -1)


def evenly_spaced(num_frames: int, count: int | None) -> Tensor:
    """Indices of `count` frames, first and last included; of all if a clip has no more, or for None."""
    if count is None or count >= num_frames:
        return torch.arange(num_frames)
    return torch.linspace(0, num_frames - 1, count).round().long()
