"""`train vae | teacher | paths`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rats_video.assets import resolve_folder
from rats_video.backbones.folder import load_parts
from rats_video.backbones.wan_paths import PATH_ENCODER, PathWanBackbone, save_path_encoder
from rats_video.commands.device import pick_device
from rats_video.commands.train_folder import RECORD, record_training, training_in
from rats_video.commands.train_reward import done_before
from rats_video.config.load import load_seeded
from rats_video.pretraining.flow import save_pipeline
from rats_video.pretraining.paths import PathTrainConfig, train_paths
from rats_video.pretraining.teacher import TeacherTrainConfig, train_teacher
from rats_video.pretraining.vae import VaeConfig, train_vae


def run_train_vae(
    *, config: str, output: Path, seed: int | None, device: str, overrides: Sequence[str], resume: bool, overwrite: bool
) -> list[str]:
    """`train vae`: OUTPUT/vae and OUTPUT/training.json."""
    cfg = load_seeded(VaeConfig, config, group="vae", overrides=overrides, seed=seed)
    where, began = pick_device(device), time.monotonic()
    init = None if cfg.init is None else _load_vae(resolve_folder(cfg.init, where="init"), where)
    with training_in(cfg, output, "vae", resume=resume, overwrite=overwrite) as is_done:
        if is_done:
            return done_before(output)
        vae, metrics = train_vae(cfg, where, output, init=init)
        vae.save_pretrained(output / "vae")
        return record_training(output, cfg, time.monotonic() - began, where, metrics)


def _load_vae(folder: Path, device: torch.device) -> Any:
    from diffusers import AutoencoderKLWan

    fix = "give a folder with a vae/ in it"
    return load_parts(folder, {"vae": AutoencoderKLWan}, device, torch.float32, family="Wan", fix=fix)["vae"]


def run_train_teacher(
    *, config: str, output: Path, seed: int | None, device: str, overrides: Sequence[str], resume: bool, overwrite: bool
) -> list[str]:
    """`train teacher`: a folder that `diffusers.WanPipeline` loads."""
    cfg = load_seeded(TeacherTrainConfig, config, group="teacher", overrides=overrides, seed=seed)
    where, began = pick_device(device), time.monotonic()
    vae_folder = resolve_folder(cfg.vae, where="vae")
    init = None if cfg.init is None else resolve_folder(cfg.init, where="init")
    vae = _load_vae(vae_folder, where)
    with training_in(cfg, output, "teacher", resume=resume, overwrite=overwrite) as is_done:
        if is_done:
            return done_before(output)
        backbone, metrics = train_teacher(cfg, vae, init, where, output)
        save_pipeline(backbone, output, shift=cfg.shift)
        for record in (vae_folder / "vae" / RECORD, vae_folder / RECORD):  # of a pipeline, of `train vae`
            if record.is_file():
                shutil.copy(record, output / "vae" / record.name)
                break
        return record_training(output, cfg, time.monotonic() - began, where, metrics)


def run_train_paths(
    *, config: str, output: Path, seed: int | None, device: str, overrides: Sequence[str], resume: bool, overwrite: bool
) -> list[str]:
    """`train paths`: a folder that `diffusers.WanPipeline` loads, and that follows motion paths where we load it."""
    cfg = load_seeded(PathTrainConfig, config, group="paths", overrides=overrides, seed=seed)
    where, began = pick_device(device), time.monotonic()
    backbone = PathWanBackbone.from_base(resolve_folder(cfg.model, where="model"), where, cfg.seed)
    backbone.latent_shape(cfg.clip.spec)
    with training_in(cfg, output, "paths", resume=resume, overwrite=overwrite) as is_done:
        if is_done:
            return done_before(output)
        learned, metrics = train_paths(cfg, backbone, output)
        save_pipeline(learned, output, shift=cfg.shift)
        save_path_encoder(learned.parts[PATH_ENCODER], output)
        return record_training(output, cfg, time.monotonic() - began, where, metrics)
