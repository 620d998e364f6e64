"""The reward a configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rats_video.assets import resolve_folder
from rats_video.backbones.base import PipelineBackbone
from rats_video.config.distill import DistillConfig
from rats_video.config.published_rewards import (
    AestheticConfig,
    AestheticV25Config,
    ClipScoreConfig,
    ClipScorer,
    HpsConfig,
    HPSv3Config,
    ImageRewardConfig,
    PickScoreConfig,
    SubjectConsistencyConfig,
    ViClipConfig,
    VideoAlignConfig,
)
from rats_video.config.reward import (
    CustomRewardConfig,
    LatentRewardConfig,
    OneReward,
    RewardConfig,
    SumRewardConfig,
    TemporalScorer,
    WordRewardConfig,
    single_rewards,
)
from rats_video.config.rivals import T2VTurboMethod
from rats_video.errors import UserError
from rats_video.files import weights_digest
from rats_video.rewards.aesthetic_reward import AestheticReward
from rats_video.rewards.clip_reward import ClipReward
from rats_video.rewards.custom import build_custom, source_file
from rats_video.rewards.hps_reward import load_hps
from rats_video.rewards.hpsv3_reward import HPSv3Reward
from rats_video.rewards.image_reward import ImageReward
from rats_video.rewards.latent_reward import LatentReward, LatentSpace, read_imitated
from rats_video.rewards.self_test import self_test
from rats_video.rewards.subject_reward import SubjectConsistency
from rats_video.rewards.sum_reward import SumReward, Term, terms_of
from rats_video.rewards.temporal_reward import TemporalReward
from rats_video.rewards.viclip_reward import ViClipReward
from rats_video.rewards.video_align import VideoAlignReward, clip_fps
from rats_video.rewards.word_reward import WordReward
from rats_video.types import ClipSpec, LatentScorer, PromptChecker, Reward

VIDEO_REWARD = "method.video_reward"


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
        case HPSv3Config():
            return HPSv3Reward.load(folder, resolve_folder(cfg.tokenizer, where=f"{where}.tokenizer"), cfg, device)
        case VideoAlignConfig():
            return VideoAlignReward.load(folder, cfg, clip_fps(cfg, clip, where=where), device)
        case LatentRewardConfig():
            return build_reward(read_imitated(folder), device, where=str(folder / "config.json"), clip=clip)


def _tokenizer(cfg: ClipScorer | ImageRewardConfig | ViClipConfig, where: str) -> Path:
    return resolve_folder(cfg.tokenizer or cfg.path, where=f"{where}.{'tokenizer' if cfg.tokenizer else 'path'}")


def loss_reward(cfg: DistillConfig, backbone: PipelineBackbone) -> Reward:
    """What a run trains on: the reward of pixels, alone or with T2V-Turbo's of the video, or a latent reward.

    Raises:
        UserError: it cannot be loaded, or was trained for other latents than this run's.
    """
    if not isinstance(cfg.reward, LatentRewardConfig):
        reward = build_reward(cfg.reward, backbone.device, where="reward", clip=cfg.clip.spec)
        if not isinstance(cfg.method, T2VTurboMethod) or cfg.method.video_reward is None:
            return reward
        video = build_reward(cfg.method.video_reward, backbone.device, where=VIDEO_REWARD, clip=cfg.clip.spec)
        return SumReward({"image": Term(reward), "video": Term(video, cfg.method.video_weight)})
    if isinstance(cfg.method, T2VTurboMethod) and cfg.method.video_reward is not None:
        raise UserError(
            "judges pixels, which a latent reward does not see", where=VIDEO_REWARD,
            fix="set it to null, or choose a reward of pixels",
        )  # fmt: skip
    here = latent_space(resolve_folder(cfg.model, where="model"), backbone, cfg.clip.spec)
    folder = resolve_folder(cfg.reward.path, where="reward.path")

    def judge(imitated: RewardConfig) -> Reward:
        return build_reward(imitated, backbone.device, where=str(folder / "config.json"), clip=cfg.clip.spec)

    return LatentReward.load(folder, backbone.device, judge, here)


def latent_space(model: Path, backbone: PipelineBackbone, clip: ClipSpec) -> LatentSpace:
    """Whose latents a run has: those of this model's folder and this clip size."""
    return LatentSpace(
        family=backbone.family,
        vae=weights_digest([model / "vae"]),
        channels=backbone.latent_channels,
        spatial_stride=backbone.spatial_stride,
        temporal_stride=backbone.temporal_stride,
        num_frames=clip.num_frames,
        height=clip.height,
        width=clip.width,
    )


def reward_folders(cfg: RewardConfig, *, where: str) -> list[Path]:
    """What decides a reward's scores: the folders of its weights and its tokenizer, or a custom one's code.

    Of code that is the module and those beside it, which it may import; what it imports from elsewhere is not seen.
    """
    return [path for key, one in single_rewards(cfg, where).items() for path in _sources(one, key)]


def _sources(cfg: OneReward, where: str) -> list[Path]:
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


@dataclass(frozen=True)
class Judges:
    """Who judges a run's pixels: what trains, or what it imitates if it scores latents, and what is held out.

    `latent` is what trains, if it scores latents.
    """

    trained: Reward
    heldout: Reward | None
    latent: LatentScorer | None = None


def build_judges(cfg: DistillConfig, reward: Reward, device: torch.device) -> Judges:
    """The judges of a run that trains on `reward`; raises UserError if one cannot be loaded."""

    def build(which: RewardConfig, where: str) -> Reward:
        return build_reward(which, device, where=where, clip=cfg.clip.spec)

    latent = reward if isinstance(reward, LatentScorer) else None
    return Judges(
        trained=reward if latent is None else build(cfg.reward, "reward"),
        heldout=None if cfg.heldout_reward is None else build(cfg.heldout_reward, "heldout_reward"),
        latent=latent,
    )


def check_rewards(
    cfg: DistillConfig,
    reward: Reward,
    prompts: Sequence[str],
    device: torch.device,
    latent_shape: Sequence[int] | None = None,
) -> Judges:
    """Load the judges of a run that trains on `reward`, and try all of them on prompts and on two clips.

    Raises:
        UserError: one of them cannot score a prompt or fails its self-test, or the loss has no gradient to climb.
    """
    judges = build_judges(cfg, reward, device)
    check_reward_prompts(reward, prompts)
    if judges.trained is not reward:
        check_reward_prompts(judges.trained, prompts)
    for key, term in _loss_terms(cfg, reward).items():
        in_loss = cfg.method.uses_gradient and term.weight != 0
        found = self_test(
            term.reward, cfg.clip.spec, prompts,
            where=key, device=device, latent_shape=latent_shape, with_gradient=in_loss,
        )  # fmt: skip
        if in_loss:
            found.require_loss()
    if judges.heldout is not None:
        check_reward_prompts(judges.heldout, prompts)
        for key, term in terms_of(judges.heldout, "heldout_reward").items():
            self_test(term.reward, cfg.clip.spec, prompts, where=key, device=device, with_gradient=False)
    return judges


def _loss_terms(cfg: DistillConfig, reward: Reward) -> dict[str, Term]:
    """The terms of what a run trains on by their keys in its configuration."""
    if isinstance(cfg.method, T2VTurboMethod) and cfg.method.video_reward is not None:
        assert isinstance(reward, SumReward)
        image, video = reward.terms.values()
        return terms_of(image.reward, "reward") | terms_of(video.reward, VIDEO_REWARD)
    return terms_of(reward, "reward")
