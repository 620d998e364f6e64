"""The guard of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rats_video.distillation.run_rewards import RunRewards
from rats_video.distillation.settings import DistillConfig
from rats_video.evaluation.sound import SoundMeasure
from rats_video.evaluation.sweep import Measure, RewardMeasure, reward_measure
from rats_video.inference.sampler import SamplerSpec
from rats_video.rewards.temporal import dynamic_degree, saturation
from rats_video.runtime import Runtime
from rats_video.sound import Sound
from rats_video.training.guard import HELDOUT, IMITATED, MOTION, REWARD, SATURATION, Guard, GuardClips, GuardConfig
from rats_video.training.run_folder import RunFolder
from rats_video.types import LatentScorer

SEED_OFFSET = 2**20  # from the run's seed to that of the guard's noise: no evaluation starts there


def build_guard(
    cfg: DistillConfig,
    options: GuardConfig,
    rewards: RunRewards,
    prompts: Sequence[str],
    run: RunFolder,
    runtime: Runtime,
) -> Guard:
    """The guard with these options, on the first of the held-out prompts."""
    return Guard(options, guard_clips(cfg, rewards, prompts[: options.num_clips], runtime), run, runtime)


def guard_clips(
    cfg: DistillConfig, rewards: RunRewards, prompts: Sequence[str], runtime: Runtime, num_steps: int | None = None
) -> GuardClips:
    """One clip a prompt, in `num_steps` student steps, else the first count it is trained for."""
    return GuardClips(
        prompts=prompts,
        clip=cfg.clip.spec,
        spec=SamplerSpec(num_steps or cfg.student.num_steps[0], cfg.shift, sampler=cfg.student.sampler),
        teacher=cfg.teacher_spec,
        measures=guard_measures(cfg, rewards, runtime.device),
        seed=cfg.seed + SEED_OFFSET,
        batch_size=cfg.evaluation.batch_size,
        latent_measures=[] if rewards.latent is None else [_latent_measure(rewards.latent)],
    )


def guard_measures(cfg: DistillConfig, rewards: RunRewards, device: torch.device) -> list[Measure]:
    """Measures of pixels: the trained reward or what it imitates, the held-out one if any, the monitors."""
    if rewards.latent is None:
        measures: list[Measure] = [reward_measure(REWARD, rewards.trained)]
    else:  # what it imitates is not what the loss needs
        measures = [_Visiting(IMITATED, rewards.trained, device=device)]
    if rewards.heldout is not None:
        measures.append(_Visiting(HELDOUT, rewards.heldout, with_parts=True, device=device))
    if cfg.clip.num_frames > 1:
        measures.append(lambda videos, _: {MOTION: dynamic_degree(videos).clip})
    measures += [lambda videos, _: {SATURATION: saturation(videos).clip}, SoundMeasure()]
    return measures


def _latent_measure(reward: LatentScorer) -> Measure:
    return lambda latents, prompts: {REWARD: reward.score_latents(latents, prompts).clip}


@dataclass(frozen=True)
class _Visiting(RewardMeasure):
    """Keeps the reward on the device only while it scores, so that training can use the memory."""

    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        self._move("cpu")

    def __call__(self, videos: Tensor, prompts: Sequence[str], sound: Sound | None = None) -> Mapping[str, Tensor]:
        """The same scores."""
        self._move(self.device)
        found = super().__call__(videos, prompts, sound)
        self._move("cpu")
        return found

    def _move(self, to: torch.device | str) -> None:
        if isinstance(self.reward, nn.Module):
            self.reward.to(to)
