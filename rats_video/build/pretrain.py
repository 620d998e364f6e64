"""`train vae | teacher | paths | reward`: how the embedded default is made."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rats_video.assets import resolve_folder
from rats_video.backbones.folder import load_parts
from rats_video.backbones.load import load_backbone
from rats_video.backbones.wan import WanBackbone
from rats_video.backbones.wan_paths import PATH_ENCODER, PathWanBackbone, save_path_encoder
from rats_video.build.common import claim_run, environment, load_seeded, pick_device, refuse_changes, working_in
from rats_video.build.reward import build_reward, check_reward_prompts, latent_space
from rats_video.config.distill import ShapesPrompts
from rats_video.config.load import load_config, write_resolved
from rats_video.config.pretrain import (
    LatentRewardTrainConfig,
    PathTrainConfig,
    RewardTrainConfig,
    TeacherTrainConfig,
    VaeConfig,
)
from rats_video.config.resume import changed_training
from rats_video.config.schema import Config
from rats_video.datasets.prompts import load_prompts
from rats_video.errors import UserError
from rats_video.files import tidy, write_json
from rats_video.inference.student import load_card
from rats_video.training.latent_pool import Studio
from rats_video.training.latent_reward import evaluate_latent_reward, train_latent_reward
from rats_video.training.paths import train_paths
from rats_video.training.resumable import forget
from rats_video.training.reward import train_reward
from rats_video.training.run_folder import CONFIG
from rats_video.training.teacher import save_pipeline, train_teacher
from rats_video.training.vae import train_vae

RECORD = "training.json"


@contextlib.contextmanager
def training_in(cfg: Config, output: Path, group: str, *, resume: bool, overwrite: bool) -> Iterator[bool]:
    """Context that owns OUTPUT, its checkpoints deleted at the end; yields whether all was done before.

    Raises:
        UserError: another process works there, or it holds something, or a run of another configuration to go on with.
    """
    with working_in(output):
        yield claim_training(cfg, output, group, resume=resume, overwrite=overwrite)
        forget(output / "checkpoints")


def claim_training(cfg: Config, output: Path, group: str, *, resume: bool, overwrite: bool) -> bool:
    """Make OUTPUT this training's, where nobody else works; returns whether all was done before.

    Raises:
        UserError: it holds something, or a run of another configuration to go on with.
    """
    tidy(output)
    if claim_run(output, resume=resume, overwrite=overwrite):
        before = load_config(type(cfg), str((output / CONFIG).resolve()), group=group)
        refuse_changes(output, changed_training(before, cfg))
    write_resolved(cfg, output / CONFIG)
    return (output / RECORD).is_file()


def record_training(
    folder: Path, cfg: Any, seconds: float, device: torch.device, metrics: dict[str, float]
) -> list[str]:
    """Write what a trained model is beside it, which says that it is whole; returns the lines to show."""
    content = {
        "config": cfg.model_dump(mode="json"),
        "seed": cfg.seed,
        "seconds": round(seconds, 1),
        "environment": environment(device),
        "metrics": {name: round(value, 4) for name, value in metrics.items()},
    }
    write_json(folder / RECORD, content)
    return [*(f"{name}: {value:.4g}" for name, value in metrics.items()), f"{seconds:.0f} s: {folder}"]


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
    if cfg.num_rendered and not (isinstance(backbone, WanBackbone) and isinstance(cfg.prompts, ShapesPrompts)):
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
        made = train_latent_reward(cfg, Studio(cfg, backbone, reward, prompts.train), space, output, init)
        metrics = evaluate_latent_reward(
            cfg, made, Studio(cfg, backbone, reward, prompts.heldout),
            student=None if student is None else backbone.load_role(student), steps=steps,
        )  # fmt: skip
        return record_training(output, cfg, time.monotonic() - began, where, metrics)
