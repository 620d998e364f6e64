"""`train reward`, from pixels or from latents."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from rats_video.assets import resolve_folder
from rats_video.backbones.kinds import load_backbone
from rats_video.backbones.wan import WanBackbone
from rats_video.commands.device import pick_device
from rats_video.commands.train_folder import record_training, training_in
from rats_video.config.load import load_seeded
from rats_video.datasets.prompts.settings import ShapesPromptsConfig
from rats_video.datasets.prompts.split import load_prompts
from rats_video.distillation.run_rewards import latent_space
from rats_video.errors import UserError
from rats_video.inference.student import load_card
from rats_video.pretraining.latent_pool import LatentRewardTrainConfig, LatentSampler
from rats_video.pretraining.latent_reward import evaluate_latent_reward, train_latent_reward
from rats_video.pretraining.reward import RewardTrainConfig, train_reward
from rats_video.rewards.reward import build_reward, check_reward_prompts


def run_train_reward(
    *, config: str, output: Path, seed: int | None, device: str, overrides: Sequence[str], resume: bool, overwrite: bool
) -> list[str]:
    """`train reward`: a folder that the `word` reward loads."""
    cfg = load_seeded(RewardTrainConfig, config, group="reward", overrides=overrides, seed=seed)
    where, began = pick_device(device), time.monotonic()
    backbone = WanBackbone.from_pretrained(resolve_folder(cfg.model, where="model"), where)
    with training_in(cfg, output, "reward", resume=resume, overwrite=overwrite) as is_done:
        if is_done:
            return done_before(output)
        reward, metrics = train_reward(cfg, backbone, output)
        reward.save(output)
        return record_training(output, cfg, time.monotonic() - began, where, metrics)


def done_before(output: Path) -> list[str]:
    """What a command says that finds its work done."""
    return [f"done before: {output}"]


def run_train_latent_reward(
    *, config: str, output: Path, seed: int | None, device: str, overrides: Sequence[str], resume: bool, overwrite: bool
) -> list[str]:
    """`train reward --latent`: a folder that the `latent` reward loads."""
    cfg = load_seeded(LatentRewardTrainConfig, config, group="latent_reward", overrides=overrides, seed=seed)
    where, began = pick_device(device), time.monotonic()
    folder = resolve_folder(cfg.model, where="model")
    backbone = load_backbone(folder, where, getattr(torch, cfg.dtype))
    backbone.fps = cfg.clip.fps
    backbone.latent_shape(cfg.clip.spec)
    if cfg.num_rendered and not (isinstance(backbone, WanBackbone) and isinstance(cfg.prompts, ShapesPromptsConfig)):
        raise UserError("only shapes are rendered, and only Wan's VAE encodes here", where="num_rendered", fix="use 0")
    reward = build_reward(cfg.reward, where, where="reward", clip=cfg.clip.spec)
    prompts = load_prompts(cfg.prompts)
    check_reward_prompts(reward, (*prompts.train, *prompts.heldout))
    student = None if cfg.student is None else resolve_folder(cfg.student, where="student")
    steps = 0 if student is None else load_card(student).num_steps[0]
    init = None if cfg.init is None else resolve_folder(cfg.init, where="init")
    with training_in(cfg, output, "latent_reward", resume=resume, overwrite=overwrite) as is_done:
        if is_done:
            return done_before(output)
        space = latent_space(folder, backbone, cfg.clip.spec)
        made = train_latent_reward(cfg, LatentSampler(cfg, backbone, reward, prompts.train), space, output, init)
        metrics = evaluate_latent_reward(
            cfg, made, LatentSampler(cfg, backbone, reward, prompts.heldout),
            student=None if student is None else backbone.load_role(student), steps=steps,
        )  # fmt: skip
        return record_training(output, cfg, time.monotonic() - began, where, metrics)
