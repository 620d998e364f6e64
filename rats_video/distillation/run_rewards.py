"""The rewards of a run, loaded and tested."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rats_video.assets import resolve_folder
from rats_video.backbones.base import PipelineBackbone
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.files import weights_digest
from rats_video.rewards.latent import LatentReward, LatentRewardConfig, LatentSpace
from rats_video.rewards.reward import RewardConfig, build_reward, check_reward_prompts, reward_on_meta
from rats_video.rewards.self_test import self_test
from rats_video.rewards.sum import SumReward, Term, terms_of
from rats_video.types import ClipSpec, LatentScorer, Reward

VIDEO_REWARD = "method.video_reward"


def loss_reward(cfg: DistillConfig, backbone: PipelineBackbone) -> Reward:
    """The reward that a run trains on: of pixels, alone or with the method's further ones, or a latent reward.

    Raises:
        UserError: it cannot be loaded, or was trained for other latents than this run's.
    """
    if not isinstance(cfg.reward, LatentRewardConfig):
        device = backbone.device
        return _pixel_reward(cfg, lambda one, where: build_reward(one, device, where=where, clip=cfg.clip.spec))
    if cfg.method.further_rewards:
        raise UserError(
            "judges pixels, which a latent reward does not see", where=VIDEO_REWARD,
            fix="set it to null, or choose a reward of pixels",
        )  # fmt: skip
    here = latent_space(resolve_folder(cfg.model, where="model"), backbone, cfg.clip.spec)
    folder = resolve_folder(cfg.reward.path, where="reward.path")

    def build(imitated: RewardConfig) -> Reward:
        return build_reward(imitated, backbone.device, where=str(folder / "config.json"), clip=cfg.clip.spec)

    return LatentReward.load(folder, backbone.device, build, here)


def loss_reward_on_meta(cfg: DistillConfig) -> Reward:
    """The same without weights, with the sizes of the rewards' folders, or the published ones where there are none."""
    return _pixel_reward(cfg, lambda one, where: reward_on_meta(one, where=where, clip=cfg.clip.spec))


def _pixel_reward(cfg: DistillConfig, build: Callable[[RewardConfig, str], Reward]) -> Reward:
    """A run's reward, with the method's further ones; `build` makes one of its settings and its key."""
    reward = build(cfg.reward, "reward")
    further = {
        name: Term(build(settings, VIDEO_REWARD), weight)
        for name, (settings, weight) in cfg.method.further_rewards.items()
    }
    return SumReward({"image": Term(reward), **further}) if further else reward


def latent_space(model: Path, backbone: PipelineBackbone, clip: ClipSpec) -> LatentSpace:
    """The space of a run's latents: of this model's folder and this clip size."""
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


@dataclass(frozen=True)
class RunRewards:
    """The rewards of a run: the trained one of pixels, and the held-out one.

    If a reward that scores latents trains, it is `latent`, and `trained` is the one that it imitates.
    """

    trained: Reward
    heldout: Reward | None
    latent: LatentScorer | None = None


def load_run_rewards(cfg: DistillConfig, reward: Reward, device: torch.device) -> RunRewards:
    """The rewards of a run that trains on `reward`; raises UserError if one cannot be loaded."""

    def build(which: RewardConfig, where: str) -> Reward:
        return build_reward(which, device, where=where, clip=cfg.clip.spec)

    latent = reward if isinstance(reward, LatentScorer) else None
    return RunRewards(
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
) -> RunRewards:
    """Load the rewards of a run that trains on `reward`, and try all of them on prompts and on two clips.

    Raises:
        UserError: one of them cannot score a prompt or fails its self-test, or the loss has no gradient to climb.
    """
    rewards = load_run_rewards(cfg, reward, device)
    check_reward_prompts(reward, prompts)
    if rewards.trained is not reward:
        check_reward_prompts(rewards.trained, prompts)
    for key, term in _loss_terms(cfg, reward).items():
        in_loss = cfg.method.uses_gradient and term.weight != 0
        found = self_test(
            term.reward, cfg.clip.spec, prompts,
            where=key, device=device, latent_shape=latent_shape, with_gradient=in_loss,
        )  # fmt: skip
        if in_loss:
            found.require_loss()
    if rewards.heldout is not None:
        check_reward_prompts(rewards.heldout, prompts)
        for key, term in terms_of(rewards.heldout, "heldout_reward").items():
            self_test(term.reward, cfg.clip.spec, prompts, where=key, device=device, with_gradient=False)
    return rewards


def _loss_terms(cfg: DistillConfig, reward: Reward) -> dict[str, Term]:
    """The terms of what a run trains on by their keys in its configuration."""
    if cfg.method.further_rewards:
        assert isinstance(reward, SumReward)
        image, video = reward.terms.values()
        return terms_of(image.reward, "reward") | terms_of(video.reward, VIDEO_REWARD)
    return terms_of(reward, "reward")
