"""The reward without its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from rats_video.assets import resolve_folder
from rats_video.config.published_rewards import (
    AestheticConfig,
    AestheticV25Config,
    ClipScoreConfig,
    FrameScorer,
    HpsConfig,
    HPSv3Config,
    ImageRewardConfig,
    PickScoreConfig,
    Qwen2VLScorer,
    SubjectConsistencyConfig,
    ViClipConfig,
    VideoAlignConfig,
)
from rats_video.config.reward import (
    CustomRewardConfig,
    LatentRewardConfig,
    RewardConfig,
    SumRewardConfig,
    TemporalScorer,
    WordRewardConfig,
)
from rats_video.errors import UserError
from rats_video.planning.architecture import META, LongPrompts, empty_model
from rats_video.planning.dry_run import brightness
from rats_video.planning.ledger import Ledger
from rats_video.reading import DAMAGED, read_json
from rats_video.rewards.aesthetic_reward import AestheticReward, predictor_of
from rats_video.rewards.clip_reward import ClipReward
from rats_video.rewards.files import load_checkpoint_tensors
from rats_video.rewards.hps_reward import hps_pixels, open_clip_config
from rats_video.rewards.hpsv3_reward import HPSv3Reward, hpsv3_head
from rats_video.rewards.image_reward import BlipSizes, ImageReward
from rats_video.rewards.latent_reward import LatentReward
from rats_video.rewards.qwen import QWEN2_VL_2B, QWEN2_VL_7B, qwen_config
from rats_video.rewards.subject_reward import SubjectConsistency, encoder_of
from rats_video.rewards.sum_reward import SumReward
from rats_video.rewards.temporal_reward import TemporalReward
from rats_video.rewards.viclip_reward import ViClipReward, ViClipSizes
from rats_video.rewards.video_align import VideoAlignReward, VideoAlignSettings, clip_fps
from rats_video.rewards.word_reward import WordReward
from rats_video.types import ClipSpec, Reward

Sizes = TypeVar("Sizes", BlipSizes, ViClipSizes)

# While the folder is not there: PickScore and HPSv2.1 are a CLIP ViT-H/14, the usual CLIP score a ViT-L/14.
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
SO400M = {
    "text_config": {"bos_token_id": 0, "eos_token_id": 1},  # else transformers warns of its own defaults
    "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
                      "num_attention_heads": 16, "patch_size": 14, "image_size": 384},
}  # fmt: skip


def reward_on_meta(  # noqa: C901, PLR0911, PLR0912  # one a kind
    cfg: RewardConfig, *, where: str, clip: ClipSpec | None = None
) -> Reward:
    """The reward's network from its folder's config.json; a hub model whose folder is not there is the usual one.

    Raises:
        UserError: the folder is not a reward's.
    """
    match cfg:
        case CustomRewardConfig():  # what it costs only running it would tell
            return brightness
        case SumRewardConfig():
            return SumReward.of(cfg, where, lambda term, key: reward_on_meta(term, where=key, clip=clip))
        case TemporalScorer():
            return TemporalReward(cfg)
        case WordRewardConfig():
            folder = resolve_folder(cfg.path, where=f"{where}.path")
            try:
                with META:
                    return WordReward(**_read(folder)).requires_grad_(requires_grad=False).eval()
            except (TypeError, ValueError) as error:
                raise UserError(f"not a word reward: {error}", where=str(folder)) from error
        case PickScoreConfig() | ClipScoreConfig():
            scaled = isinstance(cfg, PickScoreConfig)
            model = _network("CLIPModel", _hub_config(cfg, VIT_H if scaled else VIT_L), cfg)
            with Ledger():  # it asks for the value of its scale
                return ClipReward(model, LongPrompts(), cfg, scaled=scaled)
        case HpsConfig():
            folder = Path(cfg.path).expanduser()
            config = open_clip_config(load_checkpoint_tensors(folder), folder) if folder.is_dir() else VIT_H
            return ClipReward(_network("CLIPModel", config, cfg), LongPrompts(), cfg, scaled=False, pixels=hps_pixels)
        case AestheticConfig() | AestheticV25Config():
            usual = VIT_L if isinstance(cfg, AestheticConfig) else SO400M
            return AestheticReward(_network(predictor_of(cfg).model, _hub_config(cfg, usual), cfg), cfg)
        case ImageRewardConfig():
            return ImageReward(_sizes(cfg, BlipSizes), LongPrompts(), cfg)
        case ViClipConfig():
            return ViClipReward(_sizes(cfg, ViClipSizes), LongPrompts(), cfg)
        case SubjectConsistencyConfig():
            config = _hub_config(cfg, {"model_type": "vit"})  # transformers' own defaults are a ViT-B/16
            return SubjectConsistency(_network(encoder_of(config, where=cfg.path).model, config, cfg), cfg)
        case HPSv3Config():
            model, width = _qwen(cfg, QWEN2_VL_7B)
            with META:
                return HPSv3Reward(model, hpsv3_head(width), CountedTokens(), cfg)
        case VideoAlignConfig():
            model, width = _qwen(cfg, QWEN2_VL_2B)
            settings, fps = VideoAlignSettings(), clip_fps(cfg, clip, where=where)
            with META:
                return VideoAlignReward(model, nn.Linear(width, 1, bias=False), CountedTokens(), cfg, settings, fps)
        case LatentRewardConfig():
            return _latent(resolve_folder(cfg.path, where=f"{where}.path"), clip)


def _sizes(cfg: ImageRewardConfig | ViClipConfig, kind: type[Sizes]) -> Sizes:
    folder = Path(cfg.path).expanduser()
    return kind.read(load_checkpoint_tensors(folder), where=folder) if folder.is_dir() else kind()


def _hub_config(cfg: FrameScorer, usual: dict[str, Any]) -> dict[str, Any]:
    folder = Path(cfg.path).expanduser()
    return _read(folder) if folder.is_dir() else usual


def _network(kind: str, config: dict[str, Any], cfg: FrameScorer) -> nn.Module:
    import transformers

    return empty_model(getattr(transformers, kind), config, where=cfg.path).to(getattr(torch, cfg.dtype))


def _qwen(cfg: Qwen2VLScorer, published: Mapping[str, Any]) -> tuple[Any, int]:
    """The network and the width of its hidden states."""
    from transformers import Qwen2VLModel

    model: Any = empty_model(Qwen2VLModel, qwen_config(Path(cfg.path).expanduser(), published), where=cfg.path)
    return model.to(getattr(torch, cfg.dtype)), int(model.config.text_config.hidden_size)


class CountedTokens:
    """In place of a tokenizer that is not there: special tokens are known, other text has a token for four letters."""

    def __init__(self) -> None:
        self._special: dict[str, int] = {}

    def convert_tokens_to_ids(self, token: str) -> int:
        """The number of a special token."""
        return self._special.setdefault(token, len(self._special) + 1)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """As a tokenizer's."""
        pieces = re.split(r"(<\|\w+\|>)", text)
        tokens = (
            [self.convert_tokens_to_ids(piece)] if i % 2 else [0] * -(-len(piece) // 4)
            for i, piece in enumerate(pieces)
        )
        return {"input_ids": [number for piece in tokens for number in piece]}


def _latent(folder: Path, clip: ClipSpec | None) -> Reward:
    def judge(imitated: RewardConfig) -> Reward:
        return reward_on_meta(imitated, where=str(folder / "config.json"), clip=clip)

    with META:
        reward = LatentReward.build(folder, judge)
    return reward.requires_grad_(requires_grad=False).eval()


def _read(folder: Path) -> dict[str, Any]:
    try:
        return dict(read_json(folder / "config.json"))
    except DAMAGED as error:
        raise UserError("no readable config.json in it", where=str(folder)) from error
