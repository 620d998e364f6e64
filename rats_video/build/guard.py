"""The guard of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rats_video.build.reward import build_reward
from rats_video.config.distill import DistillConfig
from rats_video.evaluation.sweep import Measure, reward_measure
from rats_video.inference.sampler import SamplerSpec
from rats_video.rewards.temporal import dynamic_degree, saturation
from rats_video.runtime import Runtime
from rats_video.training.guard import HELDOUT, MOTION, REWARD, SATURATION, Guard, GuardClips
from rats_video.training.run_folder import RunFolder
from rats_video.types import LatentScorer, Reward

SEED_OFFSET = 2**20  # of the guard's noise from the run's seed: no evaluation starts there


def build_guard(
    cfg: DistillConfig, reward: Reward, prompts: Sequence[str], run: RunFolder, runtime: Runtime
) -> Guard | None:
    """The guard that the configuration asks for, with the reward that trains and the first of the held-out prompts."""
    if cfg.guard is None:
        return None
    teacher = cfg.teacher
    clips = GuardClips(
        prompts=prompts[: cfg.guard.num_clips],
        clip=cfg.clip.spec,
        spec=SamplerSpec(cfg.student.num_steps[0], cfg.shift),
        teacher=SamplerSpec(teacher.num_steps, cfg.shift, teacher.guidance_scale),
        measures=guard_measures(cfg, reward, runtime.device),
        seed=cfg.seed + SEED_OFFSET,
        batch_size=cfg.evaluation.batch_size,
    )
    return Guard(cfg.guard, clips, run, runtime)


def guard_measures(cfg: DistillConfig, reward: Reward, device: torch.device) -> list[Measure]:
    """The trained reward, the held-out one where there is one, and the monitors."""
    trained = reward_measure(REWARD, reward)
    if isinstance(reward, LatentScorer):  # clips are judged by what it imitates
        pixels = build_reward(cfg.reward, torch.device("cpu"), where="reward", clip=cfg.clip.spec)
        trained = _visiting(reward_measure(REWARD, pixels), pixels, device)
    measures = [trained]
    if cfg.heldout_reward is not None:
        heldout = build_reward(cfg.heldout_reward, torch.device("cpu"), where="heldout_reward", clip=cfg.clip.spec)
        measures.append(_visiting(_with_parts(HELDOUT, heldout), heldout, device))
    if cfg.clip.num_frames > 1:
        measures.append(lambda videos, _: {MOTION: dynamic_degree(videos).clip})
    measures.append(lambda videos, _: {SATURATION: saturation(videos).clip})
    return measures


def _with_parts(name: str, reward: Reward) -> Measure:
    def scores(videos: Tensor, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        found = reward(videos, prompts)
        return {name: found.clip} | {f"{name}/{part}": values for part, values in found.parts.items()}

    return scores


def _visiting(measure: Measure, reward: Reward, device: torch.device) -> Measure:
    """Measure by a reward that is on the device only meanwhile: between looks its memory is the training's."""

    def scores(videos: Tensor, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        if isinstance(reward, nn.Module):
            reward.to(device)
        found = measure(videos, prompts)
        if isinstance(reward, nn.Module):
            reward.to("cpu")
        return found

    return scores
