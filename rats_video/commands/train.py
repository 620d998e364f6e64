"""`train vae | teacher | paths`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Unpack

import torch

from rats_video.assets import resolve_folder
from rats_video.backbones.folder import load_parts
from rats_video.backbones.wan_paths import PATH_ENCODER, PathWanBackbone, save_path_encoder
from rats_video.commands.train_folder import Made, Training, TrainOptions, of_metrics
from rats_video.files import RECORD
from rats_video.pretraining.flow import save_pipeline
from rats_video.pretraining.paths import PathTrainConfig, train_paths
from rats_video.pretraining.teacher import TeacherTrainConfig, train_teacher
from rats_video.pretraining.vae import VaeConfig, train_vae


def run_train_vae(**options: Unpack[TrainOptions]) -> list[str]:
    """`train vae`: OUTPUT/vae and OUTPUT/training.json."""
    training, output = Training(VaeConfig, "vae", options), options["output"]
    cfg, device = training.cfg, training.device
    init = None if cfg.init is None else _load_vae(resolve_folder(cfg.init, where="init"), device)

    def make() -> Made:
        vae, metrics = train_vae(cfg, device, output, init=init)
        vae.save_pretrained(output / "vae")
        return of_metrics(metrics)

    return training.run(make)


def _load_vae(folder: Path, device: torch.device) -> Any:
    from diffusers import AutoencoderKLWan

    fix = "give a folder with a vae/ in it"
    return load_parts(folder, {"vae": AutoencoderKLWan}, device, torch.float32, family="Wan", fix=fix)["vae"]


def run_train_teacher(**options: Unpack[TrainOptions]) -> list[str]:
    """`train teacher`: a folder that `diffusers.WanPipeline` loads."""
    training, output = Training(TeacherTrainConfig, "teacher", options), options["output"]
    cfg, device = training.cfg, training.device
    vae_folder = resolve_folder(cfg.vae, where="vae")
    init = None if cfg.init is None else resolve_folder(cfg.init, where="init")
    vae = _load_vae(vae_folder, device)

    def make() -> Made:
        backbone, metrics = train_teacher(cfg, vae, init, device, output)
        if cfg.half:
            backbone.denoiser.half()
        save_pipeline(backbone, output, shift=cfg.shift, from_first_frame=cfg.given_first_frame > 0)
        for record in (vae_folder / "vae" / RECORD, vae_folder / RECORD):  # of a pipeline, of `train vae`
            if record.is_file():
                shutil.copy(record, output / "vae" / record.name)
                break
        return of_metrics(metrics)

    return training.run(make)


def run_train_paths(**options: Unpack[TrainOptions]) -> list[str]:
    """`train paths`: a folder that `diffusers.WanPipeline` loads, and that follows motion paths where we load it."""
    training, output = Training(PathTrainConfig, "paths", options), options["output"]
    cfg = training.cfg
    backbone = PathWanBackbone.from_base(resolve_folder(cfg.model, where="model"), training.device, cfg.seed)
    backbone.latent_shape(cfg.clip.spec)

    def make() -> Made:
        learned, metrics = train_paths(cfg, backbone, output)
        save_pipeline(learned, output, shift=cfg.shift)
        save_path_encoder(learned.parts[PATH_ENCODER], output)
        return of_metrics(metrics)

    return training.run(make)
