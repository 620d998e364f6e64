"""The reward a configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from rats_video.assets import resolve_folder
from rats_video.config.distill import DistillConfig
from rats_video.config.reward import (
    ClipScoreConfig,
    CustomRewardConfig,
    PickScoreConfig,
    RewardConfig,
    WordRewardConfig,
)
from rats_video.errors import UserError
from rats_video.rewards.clip_reward import ClipReward
from rats_video.rewards.custom import build_custom, source_file
from rats_video.rewards.word_reward import WordReward
from rats_video.types import PromptChecker, Reward


def build_reward(cfg: RewardConfig, device: torch.device, *, where: str) -> Reward:
    """The reward, loaded and frozen; raises UserError, which names the key under `where`, if it cannot be loaded."""
    if isinstance(cfg, CustomRewardConfig):
        return build_custom(cfg, device, where=where)
    folder = resolve_folder(cfg.path, where=f"{where}.path")
    match cfg:
        case WordRewardConfig():
            return WordReward.load(folder, device, cfg.blind_to)
        case PickScoreConfig() | ClipScoreConfig():
            tokenizer = resolve_folder(cfg.tokenizer, where=f"{where}.tokenizer") if cfg.tokenizer else folder
            return ClipReward.load(folder, tokenizer, cfg, device, scaled=isinstance(cfg, PickScoreConfig))


def reward_folders(cfg: RewardConfig, *, where: str) -> list[Path]:
    """What decides a reward's scores: the folders of its weights, or the file of a custom one's code."""
    if isinstance(cfg, CustomRewardConfig):
        return [source_file(cfg.target, where=where)]
    return [resolve_folder(cfg.path, where=f"{where}.path")]


def check_reward_prompts(reward: Reward, prompts: Sequence[str]) -> None:
    """Let a reward that can say which prompts it cannot judge do so before the run starts."""
    if isinstance(reward, PromptChecker):
        reward.check_prompts(prompts)


def check_rewards(cfg: DistillConfig, reward: Reward, prompts: Sequence[str], device: torch.device) -> None:
    """Raise UserError if the reward cannot be in the loss, or it or the held-out one cannot score a prompt."""
    if cfg.method.uses_gradient and not getattr(reward, "differentiable", True):
        raise UserError(
            "the reward is not differentiable, so the loss cannot follow its gradient",
            where="method.policy", fix="set method.policy={samples: 4}, or method.reward_weight=0",
        )  # fmt: skip
    check_reward_prompts(reward, prompts)
    if cfg.heldout_reward is not None:
        check_reward_prompts(build_reward(cfg.heldout_reward, device, where="heldout_reward"), prompts)
