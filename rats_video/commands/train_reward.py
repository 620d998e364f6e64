"""`train reward`, from pixels or from latents."""

from __future__ import annotations

from typing import Unpack

import torch

from rats_video.assets import resolve_folder
from rats_video.backbones.kinds import load_backbone
from rats_video.backbones.wan import WanBackbone
from rats_video.commands.train_folder import Made, Training, TrainOptions, of_metrics
from rats_video.datasets.prompts.settings import ShapesPromptsConfig
from rats_video.datasets.prompts.split import load_prompts
from rats_video.distillation.run_rewards import latent_space
from rats_video.errors import UserError
from rats_video.inference.student import load_card
from rats_video.pretraining.latent_pool import LatentRewardTrainConfig, LatentSampler
from rats_video.pretraining.latent_reward import evaluate_latent_reward, train_latent_reward
from rats_video.pretraining.reward import RewardTrainConfig, train_reward
from rats_video.rewards.reward import build_reward, check_reward_prompts


def run_train_reward(**options: Unpack[TrainOptions]) -> list[str]:
    """`train reward`: a folder that the `word` reward loads."""
    training, output = Training(RewardTrainConfig, "reward", options), options["output"]
    backbone = WanBackbone.from_pretrained(resolve_folder(training.cfg.model, where="model"), training.device)

    def make() -> Made:
        reward, metrics = train_reward(training.cfg, backbone, output)
        reward.save(output)
        return of_metrics(metrics)

    return training.run(make)


def run_train_latent_reward(**options: Unpack[TrainOptions]) -> list[str]:
    """`train reward --latent`: a folder that the `latent` reward loads."""
    training = Training(LatentRewardTrainConfig, "latent_reward", options)
    cfg, device = training.cfg, training.device
    folder = resolve_folder(cfg.model, where="model")
    backbone = load_backbone(folder, device, getattr(torch, cfg.dtype))
    backbone.fps = cfg.clip.fps
    backbone.latent_shape(cfg.clip.spec)
    if cfg.num_rendered and not (isinstance(backbone, WanBackbone) and isinstance(cfg.prompts, ShapesPromptsConfig)):
        raise UserError("only shapes are rendered, and only Wan's VAE encodes here", where="num_rendered", fix="use 0")
    reward = build_reward(cfg.reward, device, where="reward", clip=cfg.clip.spec)
    prompts = load_prompts(cfg.prompts)
    check_reward_prompts(reward, (*prompts.train, *prompts.heldout))
    student = None if cfg.student is None else resolve_folder(cfg.student, where="student")
    steps = 0 if student is None else load_card(student).num_steps[0]
    init = None if cfg.init is None else resolve_folder(cfg.init, where="init")

    def make() -> Made:
        space = latent_space(folder, backbone, cfg.clip.spec)
        train, heldout = (LatentSampler(cfg, backbone, reward, part) for part in (prompts.train, prompts.heldout))
        made = train_latent_reward(cfg, train, space, options["output"], init)
        role = None if student is None else backbone.load_role(student)
        return of_metrics(evaluate_latent_reward(cfg, made, heldout, student=role, steps=steps))

    return training.run(make)
