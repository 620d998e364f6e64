"""Puts the `parallel` section of a configuration to work."""

from __future__ import annotations

import math

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.split import split_tokens, split_weights
from rats_video.datasets.prompts.split import load_prompts
from rats_video.distillation.run_rewards import check_rewards
from rats_video.distillation.settings import DistillConfig
from rats_video.rewards.remote import serve_reward
from rats_video.rewards.reward import build_reward
from rats_video.runtime import Runtime
from rats_video.training.interrupt import StopRequest


def split_roles(cfg: DistillConfig, student: PipelineBackbone, teacher: PipelineBackbone, runtime: Runtime) -> None:
    """Split the roles' denoisers over processes if the configuration says so.

    Raises:
        UserError: this model's clips cannot be shared.
    """
    networks = {id(network): network for role in (student, teacher) for network in role.denoisers.values()}.values()
    if runtime.context > 1:
        _, *latents = student.latent_shape(cfg.clip.spec)
        tokens = math.prod(size // patch for size, patch in zip(latents, student.patch_size, strict=True))
        split_tokens(networks, tokens, runtime)
    if cfg.parallel.shard:
        split_weights(networks, runtime)


def serve_rewards(cfg: DistillConfig, runtime: Runtime) -> None:
    """The work of a reward rank: load and check the reward, then answer its trainers until they have finished."""
    reward = build_reward(cfg.reward, runtime.device, where="reward", clip=cfg.clip.spec)
    prompts = load_prompts(cfg.prompts)
    check_rewards(cfg, reward, (*prompts.train, *prompts.heldout), runtime.device)
    with StopRequest():  # a request to stop is for the trainers, which then let this process go
        serve_reward(reward, runtime)
