"""The reward a configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from rats_video.assets import resolve_folder
from rats_video.config.distill import DistillConfig
from rats_video.config.reward import (
    AestheticConfig,
    AestheticV25Config,
    ClipScoreConfig,
    ClipScorer,
    HpsConfig,
    HPSv3Config,
    PickScoreConfig,
    RewardConfig,
    VideoAlignConfig,
    WordRewardConfig,
)
from rats_video.rewards.aesthetic_reward import AestheticReward
from rats_video.rewards.clip_reward import ClipReward
from rats_video.rewards.hps_reward import load_hps
from rats_video.rewards.hpsv3_reward import HPSv3Reward
from rats_video.rewards.video_align import VideoAlignReward, clip_fps
from rats_video.rewards.word_reward import WordReward
from rats_video.types import ClipSpec, PromptChecker, Reward


def build_reward(cfg: RewardConfig, device: torch.device, *, where: str, clip: ClipSpec | None = None) -> Reward:
    """The reward, loaded and frozen; raises UserError, which names the key under `where`, if it cannot be loaded.

    Args:
        cfg: which one.
        device: to load it to.
        where: its key in the configuration.
        clip: the clips that it will score, for rewards that must know their frames a second.
    """
    folder = resolve_folder(cfg.path, where=f"{where}.path")
    match cfg:
        case WordRewardConfig():
            return WordReward.load(folder, device, cfg.blind_to)
        case PickScoreConfig() | ClipScoreConfig():
            tokenizer = _tokenizer(cfg, where)
            return ClipReward.load(folder, tokenizer, cfg, device, scaled=isinstance(cfg, PickScoreConfig))
        case HpsConfig():
            return load_hps(folder, _tokenizer(cfg, where), cfg, device)
        case AestheticConfig() | AestheticV25Config():
            return AestheticReward.load(folder, resolve_folder(cfg.head, where=f"{where}.head"), cfg, device)
        case HPSv3Config():
            return HPSv3Reward.load(folder, resolve_folder(cfg.tokenizer, where=f"{where}.tokenizer"), cfg, device)
        case VideoAlignConfig():
            return VideoAlignReward.load(folder, cfg, clip_fps(cfg, clip, where=where), device)


def _tokenizer(cfg: ClipScorer, where: str) -> Path:
    return resolve_folder(cfg.tokenizer or cfg.path, where=f"{where}.{'tokenizer' if cfg.tokenizer else 'path'}")


def reward_folders(cfg: RewardConfig, *, where: str) -> list[Path]:
    """The folders whose weights decide what a reward's scores are."""
    keys = ("path", "head") if isinstance(cfg, AestheticConfig | AestheticV25Config) else ("path",)
    return [resolve_folder(getattr(cfg, key), where=f"{where}.{key}") for key in keys]


def check_reward_prompts(reward: Reward, prompts: Sequence[str]) -> None:
    """Let a reward that can say which prompts it cannot judge do so before the run starts."""
    if isinstance(reward, PromptChecker):
        reward.check_prompts(prompts)


def check_rewards(cfg: DistillConfig, reward: Reward, prompts: Sequence[str], device: torch.device) -> None:
    """Raise UserError if the reward or the held-out one, loaded for this alone, cannot score a prompt."""
    check_reward_prompts(reward, prompts)
    if cfg.heldout_reward is not None:
        heldout = build_reward(cfg.heldout_reward, device, where="heldout_reward", clip=cfg.clip.spec)
        check_reward_prompts(heldout, prompts)
