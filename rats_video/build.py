"""The composition root: a configuration in, ready objects and finished folders out. Only the CLI imports it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rats_video.assets import resolve_folder
from rats_video.backbones.wan import WanBackbone
from rats_video.config.load import load_config
from rats_video.config.pretrain import RewardTrainConfig, TeacherTrainConfig, VaeConfig
from rats_video.errors import UserError
from rats_video.training.reward import train_reward
from rats_video.training.teacher import save_pipeline, train_teacher
from rats_video.training.vae import train_vae


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU, or the CPU where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"no such device: {name!r}", where="--device", fix="auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"{name} is not here: {torch.cuda.device_count()} GPUs seen", where="--device", fix="use cpu")
    return device


def environment(device: torch.device) -> dict[str, str]:
    """Versions and hardware, for the record."""
    packages = ("rats-video", "torch", "diffusers", "transformers")
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return {
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "device": f"{device.type}: {hardware}",
        "threads": str(torch.get_num_threads()),
    }


def claim_folder(folder: Path, *, overwrite: bool) -> None:
    """Make an output folder ours; raises UserError if it holds something and `overwrite` is off."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not overwrite:
            raise UserError("already exists and is not empty", where=str(folder), fix="add --overwrite or another --output")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def write_json(path: Path, content: object) -> None:
    """Write whole or not at all."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(aside, path)


def _record(folder: Path, cfg: Any, seconds: float, device: torch.device, metrics: dict[str, float]) -> None:
    """What a trained model is, beside it."""
    content = {
        "config": cfg.model_dump(mode="json"),
        "seed": cfg.seed,
        "seconds": round(seconds, 1),
        "environment": environment(device),
        "metrics": {name: round(value, 4) for name, value in metrics.items()},
    }
    write_json(folder / "training.json", content)


def _pretrain_config(
    model: type[Any], group: str, config: str, overrides: Sequence[str], seed: int | None
) -> Any:
    extra = [] if seed is None else [f"seed={seed}"]
    return load_config(model, config, group=group, overrides=[*overrides, *extra])


def run_train_vae(
    *, config: str, output: Path, seed: int | None, device: str, overrides: Sequence[str], overwrite: bool
) -> dict[str, float]:
    """`train vae`: OUTPUT/vae and OUTPUT/training.json."""
    cfg = _pretrain_config(VaeConfig, "vae", config, overrides, seed)
    where = pick_device(device)
    claim_folder(output, overwrite=overwrite)
    began = time.monotonic()
    vae, metrics = train_vae(cfg, where, output)
    vae.save_pretrained(output / "vae")
    _record(output, cfg, time.monotonic() - began, where, metrics)
    return metrics


def run_train_teacher(
    *, config: str, output: Path, seed: int | None, device: str, overrides: Sequence[str], overwrite: bool
) -> dict[str, float]:
    """`train teacher`: a folder that `diffusers.WanPipeline` loads."""
    from diffusers import AutoencoderKLWan

    cfg = _pretrain_config(TeacherTrainConfig, "teacher", config, overrides, seed)
    where = pick_device(device)
    vae = AutoencoderKLWan.from_pretrained(resolve_folder(cfg.vae, where="vae") / "vae").to(where).eval()
    claim_folder(output, overwrite=overwrite)
    began = time.monotonic()
    backbone, metrics = train_teacher(cfg, vae, where)
    save_pipeline(backbone, output, shift=cfg.shift)
    _record(output, cfg, time.monotonic() - began, where, metrics)
    return metrics


def run_train_reward(
    *, config: str, output: Path, seed: int | None, device: str, overrides: Sequence[str], overwrite: bool
) -> dict[str, float]:
    """`train reward`: a folder that the `word` reward loads."""
    cfg = _pretrain_config(RewardTrainConfig, "reward", config, overrides, seed)
    where = pick_device(device)
    backbone = WanBackbone.from_pretrained(resolve_folder(cfg.model, where="model"), where)
    claim_folder(output, overwrite=overwrite)
    began = time.monotonic()
    reward, metrics = train_reward(cfg, backbone)
    reward.save(output)
    _record(output, cfg, time.monotonic() - began, where, metrics)
    return metrics
