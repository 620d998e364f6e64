"""Any reward: its settings by `kind`, and loading it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

import torch
from pydantic import BeforeValidator, Field

from rats_video.config.explain import KIND
from rats_video.meta import META
from rats_video.rewards.base import RewardContext, RewardKindConfig
from rats_video.rewards.kinds import SingleRewardConfig, word_by_default
from rats_video.rewards.latent import LatentRewardConfig
from rats_video.rewards.sum import SumRewardConfig
from rats_video.types import ClipSpec, PromptChecker, Reward

RewardConfig = Annotated[
    SingleRewardConfig | SumRewardConfig | LatentRewardConfig,
    Field(discriminator="kind"),
    BeforeValidator(word_by_default),
]
"""A reward by its `kind`; without one it is a word reward."""


OneRewardConfig = SingleRewardConfig | LatentRewardConfig
"""A reward that is no sum of others."""


def reward_kinds() -> dict[str, type[RewardKindConfig]]:
    """Every kind of reward and its settings."""
    return {get_args(member.model_fields[KIND].annotation)[0]: member for member in get_args(get_args(RewardConfig)[0])}


def single_rewards(cfg: RewardConfig, where: str) -> dict[str, OneRewardConfig]:
    """The reward itself, or those of a sum's terms, by dotted key under `where`."""
    return {**cfg.rewards(where)} if isinstance(cfg, SumRewardConfig) else {where: cfg}


def build_reward(cfg: RewardConfig, device: torch.device, *, where: str, clip: ClipSpec | None = None) -> Reward:
    """Load a reward of pixels, frozen; of a latent reward the one that it imitates (see `loss_reward`).

    Args:
        cfg: its settings.
        device: to load it to.
        where: its key in the configuration.
        clip: the clips that it will score, for rewards that must know their frames a second.

    Raises:
        UserError: it cannot be loaded; names the key under `where`.
    """
    return cfg.build(RewardContext(where, device, clip))


def reward_on_meta(cfg: RewardConfig, *, where: str, clip: ClipSpec | None = None) -> Reward:
    """The reward's network without weights, with the sizes of its folder, or the published ones if there is none.

    Raises:
        UserError: the folder is not a reward's.
    """
    return cfg.on_meta(RewardContext(where, META, clip))


def reward_folders(cfg: RewardConfig, *, where: str) -> list[Path]:
    """The folders and files that decide a reward's scores."""
    return cfg.sources(where)


def check_reward_prompts(reward: Reward, prompts: Sequence[str]) -> None:
    """Have a reward check the prompts before the run starts, if it can."""
    if isinstance(reward, PromptChecker):
        reward.check_prompts(prompts)
