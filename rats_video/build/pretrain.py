"""`train vae | teacher | reward`: how the embedded default is made."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rats_video.assets import resolve_folder
from rats_video.backbones.load import load_backbone
from rats_video.backbones.wan import WanBackbone
from rats_video.build.common import claim_folder, environment, load_seeded, pick_device
from rats_video.build.reward import build_reward, check_reward_prompts, latent_space
from rats_video.config.distill import ShapesPrompts
from rats_video.config.pretrain import LatentRewardTrainConfig, RewardTrainConfig, TeacherTrainConfig, VaeConfig
from rats_video.datasets.prompts import load_prompts
from rats_video.errors import UserError
from rats_video.files import write_json
from rats_video.inference.student import load_card
from rats_video.training.latent_pool import Studio
from rats_video.training.latent_reward import POOL, evaluate_latent_reward, train_latent_reward
from rats_video.training.reward import train_reward
from rats_video.training.teacher import save_pipeline, train_teacher
from rats_video.training.vae import train_vae


def _record(folder: Path, cfg: Any, seconds: float, device: torch.device, metrics: dict[str, float]) -> list[str]:
    """Write what a trained model is beside it; returns the lines to show."""
    content = {
        "config": cfg.model_dump(mode="json"),
        "seed": cfg.seed,
        "seconds": round(seconds, 1),
        "environment": environment(device),
        "metrics": {name: round(value, 4) for name, value in metrics.items()},
    }
    write_json(folder / "training.json", content)
    return [*(f"{name}: {value:.4g}" for name, value in metrics.items()), f"{seconds:.0f} s: {folder}"]


def run_train_vae(
    *, config: str, output: Path, seed: int | None, device: str, overrides: Sequence[str], overwrite: bool
) -> list[str]:
    """`train vae`: OUTPUT/vae and OUTPUT/training.json."""
    cfg = load_seeded(VaeConfig, config, group="vae", overrides=overrides, seed=seed)
    where = pick_device(device)
    if overwrite or not (output / "stage-1").is_dir():  # finished stages are kept: an interrupted run goes on
        claim_folder(output, overwrite=overwrite)
    began = time.monotonic()
    vae, metrics = train_vae(cfg, where, output)
    vae.save_pretrained(output / "vae")
    return _record(output, cfg, time.monotonic() - began, where, metrics)


def run_train_teacher(
    *, config: str, output: Path, seed: int | None, device: str, overrides: Sequence[str], overwrite: bool
) -> list[str]:
    """`train teacher`: a folder that `diffusers.WanPipeline` loads."""
    from diffusers import AutoencoderKLWan

    cfg = load_seeded(TeacherTrainConfig, config, group="teacher", overrides=overrides, seed=seed)
    where = pick_device(device)
    vae_folder = resolve_folder(cfg.vae, where="vae")
    init = None if cfg.init is None else resolve_folder(cfg.init, where="init")
    vae = AutoencoderKLWan.from_pretrained(vae_folder / "vae").to(where).eval()
    claim_folder(output, overwrite=overwrite)
    began = time.monotonic()
    backbone, metrics = train_teacher(cfg, vae, init, where, output)
    save_pipeline(backbone, output, shift=cfg.shift)
    for record in (vae_folder / "vae" / "training.json", vae_folder / "training.json"):  # of a pipeline, of `train vae`
        if record.is_file():
            shutil.copy(record, output / "vae" / record.name)
            break
    return _record(output, cfg, time.monotonic() - began, where, metrics)


def run_train_reward(
    *, config: str, output: Path, seed: int | None, device: str, overrides: Sequence[str], overwrite: bool
) -> list[str]:
    """`train reward`: a folder that the `word` reward loads."""
    cfg = load_seeded(RewardTrainConfig, config, group="reward", overrides=overrides, seed=seed)
    where = pick_device(device)
    backbone = WanBackbone.from_pretrained(resolve_folder(cfg.model, where="model"), where)
    claim_folder(output, overwrite=overwrite)
    began = time.monotonic()
    reward, metrics = train_reward(cfg, backbone)
    reward.save(output)
    return _record(output, cfg, time.monotonic() - began, where, metrics)


def run_train_latent_reward(
    *, config: str, output: Path, seed: int | None, device: str, overrides: Sequence[str], overwrite: bool
) -> list[str]:
    """`train reward --latent`: a folder that the `latent` reward loads."""
    cfg = load_seeded(LatentRewardTrainConfig, config, group="latent_reward", overrides=overrides, seed=seed)
    where = pick_device(device)
    folder = resolve_folder(cfg.model, where="model")
    backbone = load_backbone(folder, where, getattr(torch, cfg.dtype))
    backbone.fps = cfg.clip.fps
    backbone.latent_shape(cfg.clip.spec)
    if cfg.num_rendered and not (isinstance(backbone, WanBackbone) and isinstance(cfg.prompts, ShapesPrompts)):
        raise UserError("only shapes are rendered, and only Wan's VAE encodes here", where="num_rendered", fix="use 0")
    reward = build_reward(cfg.reward, where, where="reward", clip=cfg.clip.spec)
    prompts = load_prompts(cfg.prompts)
    check_reward_prompts(reward, (*prompts.train, *prompts.heldout))
    student = None if cfg.student is None else resolve_folder(cfg.student, where="student")
    steps = 0 if student is None else load_card(student).num_steps[0]
    init = None if cfg.init is None else resolve_folder(cfg.init, where="init")
    if overwrite or not (output / POOL).is_file():  # what was scored is kept: an interrupted run goes on
        claim_folder(output, overwrite=overwrite)
    began = time.monotonic()
    space = latent_space(folder, backbone, cfg.clip.spec)
    made = train_latent_reward(cfg, Studio(cfg, backbone, reward, prompts.train), space, output, init)
    metrics = evaluate_latent_reward(
        cfg, made, Studio(cfg, backbone, reward, prompts.heldout),
        student=None if student is None else backbone.load_role(student), steps=steps,
    )  # fmt: skip
    return _record(output, cfg, time.monotonic() - began, where, metrics)
