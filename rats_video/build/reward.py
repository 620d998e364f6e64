"""The reward a configuration names."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rats_video.assets import resolve_folder
from rats_video.config.reward import ClipScoreConfig, PickScoreConfig, RewardConfig, WordRewardConfig
from rats_video.rewards.clip_reward import ClipReward
from rats_video.rewards.word_reward import WordReward
from rats_video.types import PromptChecker, Reward


def build_reward(cfg: RewardConfig, device: torch.device, *, where: str) -> Reward:
    """The reward, loaded and frozen; raises UserError, which names the key under `where`, if it cannot be loaded."""
    folder = resolve_folder(cfg.path, where=f"{where}.path")
    match cfg:
        case WordRewardConfig():
            return WordReward.load(folder, device)
        case PickScoreConfig() | ClipScoreConfig():
            tokenizer = resolve_folder(cfg.tokenizer, where=f"{where}.tokenizer") if cfg.tokenizer else folder
            return ClipReward.load(folder, tokenizer, cfg, device, scaled=isinstance(cfg, PickScoreConfig))


def check_reward_prompts(reward: Reward, prompts: Sequence[str]) -> None:
    """Let a reward that can say which prompts it cannot judge do so before the run starts."""
    if isinstance(reward, PromptChecker):
        reward.check_prompts(prompts)
