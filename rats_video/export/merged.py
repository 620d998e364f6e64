"""`merged`: the denoiser alone, plain, as diffusers saves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.experts import HIGH_NOISE
from rats_video.export.base import ExportedStudent, Form
from rats_video.export.comfyui_models import only_diffusers
from rats_video.export.parts import bring_base
from rats_video.export.stock import class_in, open_base
from rats_video.export.usage import base_snippet

SCHEDULER = "scheduler"


class Merged(Form):
    """A folder a denoising network, and the scheduler."""

    name = "merged"
    summary = "the student's denoiser and scheduler, to be put into the base's pipeline"
    relation = "finetune"

    def write(self, student: PipelineBackbone, exported: ExportedStudent, folder: Path) -> None:
        """Write the networks, adapters merged into them, and the scheduler."""
        write_networks(student, exported, folder)
        bring_base(exported, folder)

    def load(self, exported: ExportedStudent, device: torch.device, folder: Path) -> Any:
        """The base's pipeline with the exported denoiser and scheduler."""
        parts = load_networks(folder, exported.dtype) | load_scheduler(folder)
        return open_base(exported, device, **parts)

    def programs(self, exported: ExportedStudent) -> str:
        """Diffusers."""
        return only_diffusers(exported)

    def sampling(self, exported: ExportedStudent, name: str) -> str:
        """Code that puts the networks into the base's pipeline."""
        parts = "".join(
            f"    {part}={kind}.from_pretrained(folder, subfolder={part!r}, dtype=torch.{exported.card.dtype}),\n"
            for part, kind in exported.networks.items()
        )
        return base_snippet(exported, name, parts=parts, classes=sorted(set(exported.networks.values())))


def write_networks(student: PipelineBackbone, exported: ExportedStudent, folder: Path) -> None:
    """Write a folder a denoising network, and the scheduler."""
    merge(student)
    student.save_role(folder)
    exported.stock.scheduler.save_pretrained(folder / SCHEDULER)


def merge(student: PipelineBackbone) -> None:
    """Add a student's adapter, where it has one, to the weights it adapts, in place: its denoiser is plain again."""
    if student.adapters is not None and student.role is not None:
        student.adapters.merge(student.role)
        student.adapters = student.role = None


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
