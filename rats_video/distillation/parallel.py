"""Puts the `parallel` section of a configuration to work."""

from __future__ import annotations

import math
from collections.abc import Collection

from torch import nn

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.split import split_tokens, split_weights
from rats_video.datasets.prompts.split import load_prompts
from rats_video.distillation.run_rewards import check_rewards
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.rewards.remote import serve_reward
from rats_video.rewards.reward import build_reward
from rats_video.runtime import Runtime
from rats_video.training.interrupt import StopRequest


def split_roles(
    cfg: DistillConfig, roles: Collection[PipelineBackbone], others: Collection[nn.Module], runtime: Runtime
) -> None:
    """Split what computes over processes, if the configuration says so: once all roles are there, before any call.

    Args:
        cfg: of the run.
        roles: whose denoisers are split; those that share one are split with it.
        others: networks that train beside them, of which only the weights are split.
        runtime: the processes.

    Raises:
        UserError: this model's clips cannot be shared, or its experts not be called together.
    """
    networks = {id(network): network for role in roles for network in role.denoisers.values()}.values()
    role = next(iter(roles))
    if runtime.context > 1:
        _, *latents = role.latent_shape(cfg.clip.spec)
        tokens = math.prod(size // patch for size, patch in zip(latents, role.patch_size, strict=True))
        split_tokens(networks, tokens, runtime)
    if not cfg.parallel.shard:
        return
    if len(role.denoisers) > 1 and cfg.method.draws_levels:
        raise UserError(
            f"gathers an expert on all processes at once, and {cfg.method.kind} draws a noise level a clip, which "
            f"only one of {role.family}'s two experts takes", where="parallel.shard",
            fix="set it to false, with compute.offload=block if the weights do not fit",
        )  # fmt: skip
    split_weights([*networks, *others], runtime)


def serve_rewards(cfg: DistillConfig, runtime: Runtime) -> None:
    """The work of a reward rank: load and check the reward, then answer its trainers until they have finished."""
    reward = build_reward(cfg.reward, runtime.device, where="reward", clip=cfg.clip.spec)
    prompts = load_prompts(cfg.prompts)
    check_rewards(cfg, reward, (*prompts.train, *prompts.heldout), runtime.device)
    with StopRequest():  # a request to stop is for the trainers, which then let this process go
        serve_reward(reward, runtime)
