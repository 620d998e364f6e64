"""The reward a configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from rats_video.assets import resolve_folder
from rats_video.backbones.base import PipelineBackbone
from rats_video.config.distill import DistillConfig
from rats_video.config.reward import (
    AestheticConfig,
    AestheticV25Config,
    ClipScoreConfig,
    ClipScorer,
    CustomRewardConfig,
    HpsConfig,
    ImageRewardConfig,
    LatentRewardConfig,
    PickScoreConfig,
    RewardConfig,
    SingleReward,
    SubjectConsistencyConfig,
    SumRewardConfig,
    TemporalScorer,
    ViClipConfig,
    WordRewardConfig,
    single_rewards,
)
from rats_video.files import weights_digest
from rats_video.rewards.aesthetic_reward import AestheticReward
from rats_video.rewards.clip_reward import ClipReward
from rats_video.rewards.custom import build_custom, source_file
from rats_video.rewards.hps_reward import load_hps
from rats_video.rewards.image_reward import ImageReward
from rats_video.rewards.latent_reward import LatentReward, LatentSpace, read_imitated
from rats_video.rewards.self_test import self_test
from rats_video.rewards.subject_reward import SubjectConsistency
from rats_video.rewards.sum_reward import SumReward, terms_of
from rats_video.rewards.temporal_reward import TemporalReward
from rats_video.rewards.viclip_reward import ViClipReward
from rats_video.rewards.word_reward import WordReward
from rats_video.types import ClipSpec, LatentScorer, PromptChecker, Reward


def build_reward(cfg: RewardConfig, device: torch.device, *, where: str) -> Reward:  # noqa: C901, PLR0911  # one a kind
    """The reward of pixels, loaded and frozen: of a latent reward the one that it imitates (see `loss_reward`).

    Raises:
        UserError: it cannot be loaded; names the key under `where`.
    """
    if isinstance(cfg, CustomRewardConfig):
        return build_custom(cfg, device, where=where)
    if isinstance(cfg, SumRewardConfig):
        return SumReward.of(cfg, where, lambda term, key: build_reward(term, device, where=key))
    if isinstance(cfg, TemporalScorer):
        return TemporalReward(cfg)
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
        case SubjectConsistencyConfig():
            return SubjectConsistency.load(folder, cfg, device)
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


def _tokenizer(cfg: ClipScorer | ImageRewardConfig | ViClipConfig, where: str) -> Path:
    return resolve_folder(cfg.tokenizer or cfg.path, where=f"{where}.{'tokenizer' if cfg.tokenizer else 'path'}")


def reward_folders(cfg: RewardConfig, *, where: str) -> list[Path]:
    """What decides a reward's scores: the folders of its weights, or the file of a custom one's code."""
    return [path for key, one in single_rewards(cfg, where).items() for path in _sources(one, key)]


def _sources(cfg: SingleReward | LatentRewardConfig, where: str) -> list[Path]:
    if isinstance(cfg, CustomRewardConfig):
        return [source_file(cfg.target, where=where)]
    return [resolve_folder(getattr(cfg, name), where=f"{where}.{name}") for name in cfg.folders]


def check_reward_prompts(reward: Reward, prompts: Sequence[str]) -> None:
    """Let a reward that can say which prompts it cannot judge do so before the run starts."""
    if isinstance(reward, PromptChecker):
        reward.check_prompts(prompts)


def check_rewards(
    cfg: DistillConfig,
    reward: Reward,
    prompts: Sequence[str],
    device: torch.device,
    latent_shape: Sequence[int] | None = None,
) -> None:
    """Try the reward and the held-out one, which is loaded for this alone, on prompts and on two clips.

    Raises:
        UserError: one of them cannot score a prompt or fails its self-test, or the loss has no gradient to climb.
    """
    check_reward_prompts(reward, prompts)
    if isinstance(reward, LatentScorer):  # what it imitates is needed for the evaluation
        check_reward_prompts(build_reward(cfg.reward, device, where="reward"), prompts)
    for key, term in terms_of(reward, "reward").items():
        in_loss = cfg.method.uses_gradient and term.weight != 0
        found = self_test(
            term.reward, cfg.clip.spec, prompts,
            where=key, device=device, latent_shape=latent_shape, with_gradient=in_loss,
        )  # fmt: skip
        if in_loss:
            found.require_loss()
    if cfg.heldout_reward is not None:
        heldout = build_reward(cfg.heldout_reward, device, where="heldout_reward")
        check_reward_prompts(heldout, prompts)
        for key, term in terms_of(heldout, "heldout_reward").items():
            self_test(term.reward, cfg.clip.spec, prompts, where=key, device=device, with_gradient=False)
