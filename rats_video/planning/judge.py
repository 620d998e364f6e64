"""The reward without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from rats_video.assets import resolve_folder
from rats_video.errors import UserError
from rats_video.meta import META, CountedTokens, LongPrompts, empty_model
from rats_video.planning.memory_tracker import MemoryTracker
from rats_video.planning.trace import free_reward
from rats_video.reading import DAMAGED, read_json
from rats_video.rewards.aesthetic import AestheticConfig, AestheticReward, AestheticV25Config, predictor_of
from rats_video.rewards.clip_score import ClipReward, ClipScoreConfig, PickScoreConfig
from rats_video.rewards.custom import CustomRewardConfig
from rats_video.rewards.files import load_checkpoint_tensors
from rats_video.rewards.frames import FrameRewardConfig
from rats_video.rewards.hpsv2 import HPSv2Config, hps_pixels, open_clip_config
from rats_video.rewards.hpsv3 import HPSv3Config, HPSv3Reward, hpsv3_head
from rats_video.rewards.image_reward import BlipSizes, ImageReward, ImageRewardConfig
from rats_video.rewards.latent import LatentReward, LatentRewardConfig
from rats_video.rewards.qwen import QWEN2_VL_2B, QWEN2_VL_7B, Qwen2VLConfig, qwen_config
from rats_video.rewards.reward import RewardConfig
from rats_video.rewards.subject_consistency import SubjectConsistency, SubjectConsistencyConfig, encoder_of
from rats_video.rewards.sum import SumReward, SumRewardConfig
from rats_video.rewards.temporal_score import TemporalReward, TemporalRewardConfig
from rats_video.rewards.viclip import ViClipConfig, ViClipReward, ViClipSizes
from rats_video.rewards.video_align import VideoAlignConfig, VideoAlignReward, VideoAlignSettings, clip_fps
from rats_video.rewards.word import WordReward, WordRewardConfig
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
            return free_reward
        case SumRewardConfig():
            return SumReward.of(cfg, where, lambda term, key: reward_on_meta(term, where=key, clip=clip))
        case TemporalRewardConfig():
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
            with MemoryTracker():  # it asks for the value of its scale
                return ClipReward(model, LongPrompts(), cfg, scaled=scaled)
        case HPSv2Config():
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


def _hub_config(cfg: FrameRewardConfig, usual: dict[str, Any]) -> dict[str, Any]:
    folder = Path(cfg.path).expanduser()
    return _read(folder) if folder.is_dir() else usual


def _network(kind: str, config: dict[str, Any], cfg: FrameRewardConfig) -> nn.Module:
    import transformers

    return empty_model(getattr(transformers, kind), config, where=cfg.path).to(getattr(torch, cfg.dtype))


def _qwen(cfg: Qwen2VLConfig, published: Mapping[str, Any]) -> tuple[Any, int]:
    """The network and the width of its hidden states."""
    from transformers import Qwen2VLModel

    model: Any = empty_model(Qwen2VLModel, qwen_config(Path(cfg.path).expanduser(), published), where=cfg.path)
    return model.to(getattr(torch, cfg.dtype)), int(model.config.text_config.hidden_size)


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
