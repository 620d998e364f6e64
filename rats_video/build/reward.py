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
    CustomRewardConfig,
    HpsConfig,
    ImageRewardConfig,
    PickScoreConfig,
    RewardConfig,
    ViClipConfig,
    WordRewardConfig,
)
from rats_video.errors import UserError
from rats_video.rewards.aesthetic_reward import AestheticReward
from rats_video.rewards.clip_reward import ClipReward
from rats_video.rewards.custom import build_custom, source_file
from rats_video.rewards.hps_reward import load_hps
from rats_video.rewards.image_reward import ImageReward
from rats_video.rewards.viclip_reward import ViClipReward
from rats_video.rewards.word_reward import WordReward
from rats_video.types import PromptChecker, Reward


def build_reward(cfg: RewardConfig, device: torch.device, *, where: str) -> Reward:  # noqa: PLR0911  # one a kind
    """The reward, loaded and frozen; raises UserError, which names the key under `where`, if it cannot be loaded."""
    if isinstance(cfg, CustomRewardConfig):
        return build_custom(cfg, device, where=where)
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
        case ImageRewardConfig():
            return ImageReward.load(folder, _tokenizer(cfg, where), cfg, device)
        case ViClipConfig():
            return ViClipReward.load(folder, _tokenizer(cfg, where), cfg, device)


def _tokenizer(cfg: ClipScorer | ImageRewardConfig | ViClipConfig, where: str) -> Path:
    return resolve_folder(cfg.tokenizer or cfg.path, where=f"{where}.{'tokenizer' if cfg.tokenizer else 'path'}")


def reward_folders(cfg: RewardConfig, *, where: str) -> list[Path]:
    """What decides a reward's scores: the folders of its weights, or the file of a custom one's code."""
    if isinstance(cfg, CustomRewardConfig):
        return [source_file(cfg.target, where=where)]
    keys = ("path", "head") if isinstance(cfg, AestheticConfig | AestheticV25Config) else ("path",)
    return [resolve_folder(getattr(cfg, key), where=f"{where}.{key}") for key in keys]


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
