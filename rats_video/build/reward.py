"""The reward a configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from rats_video.assets import resolve_folder
from rats_video.backbones.base import PipelineBackbone
from rats_video.config.distill import DistillConfig
from rats_video.config.reward import (
    ClipScoreConfig,
    LatentRewardConfig,
    PickScoreConfig,
    RewardConfig,
    WordRewardConfig,
)
from rats_video.files import weights_digest
from rats_video.rewards.clip_reward import ClipReward
from rats_video.rewards.latent_reward import LatentReward, LatentSpace, read_imitated
from rats_video.rewards.word_reward import WordReward
from rats_video.types import ClipSpec, LatentScorer, PromptChecker, Reward


def build_reward(cfg: RewardConfig, device: torch.device, *, where: str) -> Reward:
    """The reward of pixels, loaded and frozen: of a latent reward the one that it imitates (see `loss_reward`).

    Raises:
        UserError: it cannot be loaded; names the key under `where`.
    """
    folder = resolve_folder(cfg.path, where=f"{where}.path")
    match cfg:
        case WordRewardConfig():
            return WordReward.load(folder, device, cfg.blind_to)
        case PickScoreConfig() | ClipScoreConfig():
            tokenizer = resolve_folder(cfg.tokenizer, where=f"{where}.tokenizer") if cfg.tokenizer else folder
            return ClipReward.load(folder, tokenizer, cfg, device, scaled=isinstance(cfg, PickScoreConfig))
        case LatentRewardConfig():
            return build_reward(read_imitated(folder), device, where=str(folder / "config.json"))


def loss_reward(cfg: DistillConfig, backbone: PipelineBackbone) -> Reward:
    """What a run trains on: the reward of pixels, or a latent reward, which reads prompts with the run's own model.

    Raises:
        UserError: it cannot be loaded, or was trained for other latents than this run's.
    """
    if not isinstance(cfg.reward, LatentRewardConfig):
        return build_reward(cfg.reward, backbone.device, where="reward")
    here = latent_space(resolve_folder(cfg.model, where="model"), backbone, cfg.clip.spec)
    folder = resolve_folder(cfg.reward.path, where="reward.path")
    return LatentReward.load(folder, backbone.device, backbone.encode_text, here)


def latent_space(model: Path, backbone: PipelineBackbone, clip: ClipSpec) -> LatentSpace:
    """Whose latents a run has: those of this model's folder and this clip size."""
    return LatentSpace(
        family=backbone.family,
        vae=weights_digest([model / "vae"]),
        channels=backbone.latent_channels,
        spatial_stride=backbone.spatial_stride,
        temporal_stride=backbone.temporal_stride,
        text_width=backbone.encode_text([""]).embeds.shape[-1],
        num_frames=clip.num_frames,
        height=clip.height,
        width=clip.width,
    )


def reward_folders(cfg: RewardConfig, *, where: str) -> list[Path]:
    """The folders whose weights decide what a reward's scores are."""
    return [resolve_folder(cfg.path, where=f"{where}.path")]


def check_reward_prompts(reward: Reward, prompts: Sequence[str]) -> None:
    """Let a reward that can say which prompts it cannot judge do so before the run starts."""
    if isinstance(reward, PromptChecker):
        reward.check_prompts(prompts)


def check_rewards(cfg: DistillConfig, reward: Reward, prompts: Sequence[str], device: torch.device) -> None:
    """Raise UserError if one of the rewards that the run needs, loaded for this alone, cannot score a prompt."""
    check_reward_prompts(reward, prompts)
    if isinstance(reward, LatentScorer):  # what it imitates is needed for the evaluation
        check_reward_prompts(build_reward(cfg.reward, device, where="reward"), prompts)
    if cfg.heldout_reward is not None:
        check_reward_prompts(build_reward(cfg.heldout_reward, device, where="heldout_reward"), prompts)
