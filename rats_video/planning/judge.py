"""The reward without its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rats_video.assets import resolve_folder
from rats_video.config.reward import (
    ClipScoreConfig,
    LatentRewardConfig,
    PickScoreConfig,
    RewardConfig,
    WordRewardConfig,
)
from rats_video.errors import UserError
from rats_video.planning.architecture import META, LongPrompts, empty_model
from rats_video.planning.ledger import Ledger
from rats_video.rewards.clip_reward import ClipReward
from rats_video.rewards.latent_reward import LatentReward
from rats_video.rewards.word_reward import WordReward
from rats_video.types import Reward, TextCondition

# While the folder is not there: PickScore is a CLIP ViT-H/14, the usual CLIP score a ViT-L/14.
VIT_H = {
    "projection_dim": 1024,
    "text_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "vision_config": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
                      "num_attention_heads": 16, "patch_size": 14},
}  # fmt: skip
VIT_L = {
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                      "num_attention_heads": 16, "patch_size": 14},
}  # fmt: skip


def reward_on_meta(cfg: RewardConfig, *, where: str) -> Reward:
    """The reward's network from its folder's config.json; a CLIP whose folder is not there is the usual one.

    Raises:
        UserError: the folder is not a reward's.
    """
    match cfg:
        case WordRewardConfig():
            folder = resolve_folder(cfg.path, where=f"{where}.path")
            try:
                with META:
                    return WordReward(**_read(folder)).requires_grad_(requires_grad=False).eval()
            except TypeError as error:
                raise UserError(f"not a word reward: {error}", where=str(folder)) from error
        case PickScoreConfig() | ClipScoreConfig():
            return _clip(cfg)
        case LatentRewardConfig():
            return _latent(resolve_folder(cfg.path, where=f"{where}.path"))


def _clip(cfg: PickScoreConfig | ClipScoreConfig) -> Reward:
    from transformers import CLIPModel

    scaled = isinstance(cfg, PickScoreConfig)
    folder = Path(cfg.path).expanduser()
    config = _read(folder) if folder.is_dir() else VIT_H if scaled else VIT_L
    model = empty_model(CLIPModel, config, where=cfg.path).to(getattr(torch, cfg.dtype))
    with Ledger():  # it asks for the value of its scale
        return ClipReward(model, LongPrompts(), cfg, scaled=scaled)


def _latent(folder: Path) -> Reward:
    def encode_text(prompts: Sequence[str]) -> TextCondition:  # once a prompt in a run: its length costs a step nothing
        return TextCondition(torch.empty(len(prompts), 1, reward.space.text_width, device=META))

    with META:
        reward = LatentReward.build(folder, encode_text)
    return reward.requires_grad_(requires_grad=False).eval()


def _read(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError("no readable config.json in it", where=str(folder)) from error
