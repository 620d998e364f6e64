"""The base of every reward's settings, and what a loaded reward says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from rats_video.assets import resolve_folder
from rats_video.config.fields import Config
from rats_video.types import ClipSpec, LatentScorer, Reward, RewardScores

WeightsFolder = Annotated[str, Field(description="folder of its weights, in safetensors")]


@dataclass(frozen=True)
class RewardContext:
    """The arguments of `build` and `on_meta` of a reward's settings.

    Args:
        where: the reward's key in the configuration.
        device: to load it to.
        clip: the clips that it will score, if they are known.
    """

    where: str
    device: torch.device
    clip: ClipSpec | None = None

    def at(self, where: str) -> Self:
        """The same for a reward inside this one, under its own key."""
        return replace(self, where=where)


class RewardKindConfig(Config):
    """Settings of a kind of reward. The first line of a kind's docstring says what it scores (`rewards list`).

    Each kind also has two methods, which this class leaves out so that mypy reports a kind without them:
    `build(context: RewardContext) -> Reward` loads the reward, frozen; `on_meta(context)` makes it without weights.

    Attributes:
        per: what one score is given to.
        source: where its weights come from.
        folders: the keys that name folders of weights.
        hears: whether it needs the sound.
    """

    per: ClassVar[Literal["frame", "clip"]]
    source: ClassVar[str]
    hears: ClassVar[bool] = False
    folders: ClassVar[tuple[str, ...]] = ("path",)

    def sources(self, where: str) -> list[Path]:
        """The folders that decide the scores: weights and tokenizer, or a custom reward's code."""
        keys = (*self.folders, "tokenizer") if getattr(self, "tokenizer", None) else self.folders
        return [self.folder(where, key) for key in keys]

    def folder(self, where: str, *keys: str) -> Path:
        """The folder that the first of these keys names that is set; raises UserError if it is not there."""
        key = next((key for key in keys if getattr(self, key)), keys[-1])
        return resolve_folder(getattr(self, key), where=f"{where}.{key}")


class BaseRewardConfig(RewardKindConfig):
    """A reward that ships with the package.

    Attributes:
        differentiable: gradient reaches the pixels; otherwise it cannot be a direct loss.
    """

    differentiable: ClassVar[bool] = True


def free_reward(videos: Tensor, prompts: Sequence[str]) -> RewardScores:  # noqa: ARG001
    """A reward that costs nothing: for a plan, where only running a reward would tell its cost."""
    return RewardScores(videos.mean(dim=(1, 2, 3, 4)))


def is_differentiable(reward: Reward | LatentScorer) -> bool:
    """True if gradient reaches the frames from the scores, which holds unless the reward denies it."""
    return bool(getattr(reward, "differentiable", True))


def frames_seen(reward: Reward | LatentScorer, num_frames: int) -> Tensor:
    """Indices of the frames that the reward looks at, or may look at: all, unless it says otherwise."""
    looks_at = getattr(reward, "looks_at", None)
    return torch.arange(num_frames) if looks_at is None else torch.as_tensor(looks_at(num_frames)).cpu()


def frames_seen_for(reward: Reward | LatentScorer, prompt: str, num_frames: int) -> Tensor:
    """The same for a clip of that prompt, where the reward chooses frames by the prompt."""
    looks_at_for = getattr(reward, "looks_at_for", None)
    return (
        frames_seen(reward, num_frames) if looks_at_for is None else torch.as_tensor(looks_at_for(prompt, num_frames))
    )
