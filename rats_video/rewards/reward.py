"""Any reward: its settings by `kind`, and loading it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

import torch
from pydantic import BeforeValidator, Field

from rats_video.assets import resolve_folder
from rats_video.config.explain import KIND
from rats_video.rewards.aesthetic import AestheticConfig, AestheticReward, AestheticV25Config
from rats_video.rewards.base import RewardKindConfig
from rats_video.rewards.clip_score import BaseClipConfig, ClipReward, ClipScoreConfig, PickScoreConfig
from rats_video.rewards.custom import CustomRewardConfig, build_custom
from rats_video.rewards.hpsv2 import HPSv2Config, load_hps
from rats_video.rewards.hpsv3 import HPSv3Config, HPSv3Reward
from rats_video.rewards.image_reward import ImageReward, ImageRewardConfig
from rats_video.rewards.kinds import SingleRewardConfig, word_by_default
from rats_video.rewards.latent import LatentRewardConfig, read_imitated
from rats_video.rewards.subject_consistency import SubjectConsistency, SubjectConsistencyConfig
from rats_video.rewards.sum import SumReward, SumRewardConfig
from rats_video.rewards.temporal_score import TemporalReward, TemporalRewardConfig
from rats_video.rewards.viclip import ViClipConfig, ViClipReward
from rats_video.rewards.video_align import VideoAlignConfig, VideoAlignReward, clip_fps
from rats_video.rewards.word import WordReward, WordRewardConfig
from rats_video.types import ClipSpec, PromptChecker, Reward
from rats_video.user_code import source_file

RewardConfig = Annotated[
    SingleRewardConfig | SumRewardConfig | LatentRewardConfig,
    Field(discriminator="kind"),
    BeforeValidator(word_by_default),
]
"""A reward by its `kind`; without one it is a word reward."""


OneRewardConfig = SingleRewardConfig | LatentRewardConfig
"""A reward that is no sum of others."""


def reward_kinds() -> dict[str, type[RewardKindConfig]]:
    """Every kind of reward and its configuration."""
    return {get_args(member.model_fields[KIND].annotation)[0]: member for member in get_args(get_args(RewardConfig)[0])}


def single_rewards(cfg: RewardConfig, where: str) -> dict[str, OneRewardConfig]:
    """The reward itself, or those of a sum's terms, by dotted key under `where`."""
    if isinstance(cfg, SumRewardConfig):
        return {f"{where}.terms.{name}.reward": term.reward for name, term in cfg.terms.items()}
    return {where: cfg}


def build_reward(  # noqa: C901, PLR0911, PLR0912  # one a kind
    cfg: RewardConfig, device: torch.device, *, where: str, clip: ClipSpec | None = None
) -> Reward:
    """The reward of pixels, loaded and frozen: of a latent reward the one that it imitates (see `loss_reward`).

    Args:
        cfg: which one.
        device: to load it to.
        where: its key in the configuration.
        clip: the clips that it will score, for rewards that must know their frames a second.

    Raises:
        UserError: it cannot be loaded; names the key under `where`.
    """
    if isinstance(cfg, CustomRewardConfig):
        return build_custom(cfg, device, where=where)
    if isinstance(cfg, SumRewardConfig):
        return SumReward.of(cfg, where, lambda term, key: build_reward(term, device, where=key, clip=clip))
    if isinstance(cfg, TemporalRewardConfig):
        return TemporalReward(cfg)
    folder = resolve_folder(cfg.path, where=f"{where}.path")
    match cfg:
        case WordRewardConfig():
            return WordReward.load(folder, device, cfg.blind_to)
        case PickScoreConfig() | ClipScoreConfig():
            tokenizer = _tokenizer(cfg, where)
            return ClipReward.load(folder, tokenizer, cfg, device, scaled=isinstance(cfg, PickScoreConfig))
        case HPSv2Config():
            return load_hps(folder, _tokenizer(cfg, where), cfg, device)
        case AestheticConfig() | AestheticV25Config():
            return AestheticReward.load(folder, resolve_folder(cfg.head, where=f"{where}.head"), cfg, device)
        case ImageRewardConfig():
            return ImageReward.load(folder, _tokenizer(cfg, where), cfg, device)
        case ViClipConfig():
            return ViClipReward.load(folder, _tokenizer(cfg, where), cfg, device)
        case SubjectConsistencyConfig():
            return SubjectConsistency.load(folder, cfg, device)
        case HPSv3Config():
            return HPSv3Reward.load(folder, resolve_folder(cfg.tokenizer, where=f"{where}.tokenizer"), cfg, device)
        case VideoAlignConfig():
            return VideoAlignReward.load(folder, cfg, clip_fps(cfg, clip, where=where), device)
        case LatentRewardConfig():
            return build_reward(read_imitated(folder), device, where=str(folder / "config.json"), clip=clip)


def _tokenizer(cfg: BaseClipConfig | ImageRewardConfig | ViClipConfig, where: str) -> Path:
    return resolve_folder(cfg.tokenizer or cfg.path, where=f"{where}.{'tokenizer' if cfg.tokenizer else 'path'}")


def reward_folders(cfg: RewardConfig, *, where: str) -> list[Path]:
    """What decides a reward's scores: the folders of its weights and its tokenizer, or a custom one's code.

    Of code that is the module and those beside it, which it may import; what it imports from elsewhere is not seen.
    """
    return [path for key, one in single_rewards(cfg, where).items() for path in _sources(one, key)]


def _sources(cfg: OneRewardConfig, where: str) -> list[Path]:
    if isinstance(cfg, CustomRewardConfig):
        return sorted(source_file(cfg.target, where=where).parent.glob("*.py"))
    names = (*cfg.folders, *(["tokenizer"] if getattr(cfg, "tokenizer", None) else []))
    folders = [resolve_folder(getattr(cfg, name), where=f"{where}.{name}") for name in names]
    if isinstance(cfg, LatentRewardConfig):
        folders += reward_folders(read_imitated(folders[0]), where=str(folders[0] / "config.json"))
    return folders


def check_reward_prompts(reward: Reward, prompts: Sequence[str]) -> None:
    """Let a reward that can say which prompts it cannot judge do so before the run starts."""
    if isinstance(reward, PromptChecker):
        reward.check_prompts(prompts)
