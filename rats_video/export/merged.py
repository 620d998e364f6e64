"""`merged`: the denoiser alone, plain, as diffusers saves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.experts import HIGH_NOISE
from rats_video.export.recipe import StockCall
from rats_video.export.stock import class_in, open_pipeline

SCHEDULER = "scheduler"


def rescale(student: PipelineBackbone, base: PipelineBackbone, scale: float) -> None:
    """Take `scale` times the student's difference from its base: 0 is the base, 1 the student, in place."""
    if student.adapters is not None and student.role is not None:
        student.adapters.rescale(student.role, scale)
    else:
        origin = base.weights
        with torch.no_grad():
            for name, weight in student.weights.items():
                weight.copy_(torch.lerp(origin[name], weight, scale))


def merge(student: PipelineBackbone) -> None:
    """Add a student's adapter, where it has one, to the weights it adapts, in place: its denoiser is plain again."""
    if student.adapters is not None and student.role is not None:
        student.adapters.merge(student.role)
        student.adapters = student.role = None


def write_merged(student: PipelineBackbone, recipe: StockCall, folder: Path) -> None:
    """A folder a denoising network, and the scheduler."""
    merge(student)
    student.save_role(folder)
    recipe.scheduler.save_pretrained(folder / SCHEDULER)


def load_merged(folder: Path, base: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The base's pipeline with the exported denoiser and scheduler."""
    return open_pipeline(base, device, dtype, **load_networks(folder, dtype), **load_scheduler(folder))


def load_networks(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The denoising networks of a folder by name, on the CPU."""
    return {
        part.name: class_in(part / "config.json").from_pretrained(part, dtype=dtype, local_files_only=True)
        for part in network_folders(folder)
    }


def network_folders(folder: Path) -> list[Path]:
    """Folders of the denoising networks."""
    return sorted(part for part in folder.glob(f"{HIGH_NOISE}*") if part.is_dir())


def load_scheduler(folder: Path) -> dict[str, Any]:
    """The exported scheduler, as a part of a pipeline."""
    kind = class_in(folder / SCHEDULER / "scheduler_config.json")
    return {SCHEDULER: kind.from_pretrained(folder / SCHEDULER, local_files_only=True)}
