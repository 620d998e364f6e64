"""`lora`: the adapter under diffusers' keys, and in the file's header how it must be sampled.

Diffusers' keys have no alpha beside them, only one in the header, which other programs do not read and tools that
rewrite a file lose: B holds alpha / rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import rats_video
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.experts import HIGH_NOISE, LOW_NOISE
from rats_video.backbones.lora import adapter_files, has_adapter
from rats_video.errors import UserError
from rats_video.export.base import ExportedStudent, Form
from rats_video.export.comfyui_models import only_diffusers
from rats_video.export.merged import SCHEDULER, load_scheduler
from rats_video.export.parts import bring_base
from rats_video.export.stock import open_base
from rats_video.export.usage import base_snippet
from rats_video.inference.student import EULER
from rats_video.inference.style import experts_of

_SECOND: Mapping[str, dict[str, bool]] = {HIGH_NOISE: {}, LOW_NOISE: {"load_into_transformer_2": True}}
REMARKS = "rats_video"  # the header's key


class Lora(Form):
    """The LoRA file, one an expert, and the scheduler."""

    name = "lora"
    summary = "a LoRA on the base, and a scheduler"
    relation = "adapter"
    packages = ("peft",)

    def check(self, student: Path, base: Path, family: type[PipelineBackbone], scale: float) -> None:  # noqa: ARG002
        """Refuse a student that is no LoRA, and any scale."""
        if not has_adapter(student):
            raise UserError(
                "this student is no LoRA: all of its weights were trained", where="--format lora",
                fix="take merged or diffusers, or train with student.weights.kind=lora",
            )  # fmt: skip
        check_unscaled(student, scale)

    def write(self, student: PipelineBackbone, exported: ExportedStudent, folder: Path) -> None:
        """Write the adapter and the scheduler."""
        assert student.adapters is not None
        assert student.role is not None
        student.adapters.fold_alpha(student.role)
        for part, file in adapter_files(student.denoiser_parts).items():
            student.adapters.write(student.role, folder / file, {part: HIGH_NOISE}, header(student, exported))
        exported.stock.scheduler.save_pretrained(folder / SCHEDULER)
        bring_base(exported, folder)

    def load(self, exported: ExportedStudent, device: torch.device, folder: Path) -> Any:
        """The base's pipeline with the adapter."""
        pipeline = open_base(exported, device, **load_scheduler(folder))
        fuse_base_loras(pipeline, exported)
        for part, file in adapter_files(tuple(exported.networks)).items():
            pipeline.load_lora_weights(folder, weight_name=file, **_SECOND[part])
        return pipeline

    def programs(self, exported: ExportedStudent) -> str:
        """Diffusers."""
        return only_diffusers(exported)

    def sampling(self, exported: ExportedStudent, name: str) -> str:
        """Code that loads the adapter into the base's pipeline."""
        lines = _base_lora_lines(exported) + [
            f"pipe.load_lora_weights(folder, weight_name={file!r}{', ' if _SECOND[part] else ''}"
            f"{', '.join(f'{key}={value}' for key, value in _SECOND[part].items())})"
            for part, file in adapter_files(tuple(exported.networks)).items()
        ]
        return base_snippet(exported, name, then=lines)

    def note(self, exported: ExportedStudent) -> str:
        """The base's LoRAs too."""
        return "; ".join(filter(None, (exported.stock.note, exported.base_lora_note)))


def fuse_base_loras(pipeline: Any, exported: ExportedStudent) -> None:
    """Put the base's LoRAs under a student's, as diffusers does."""
    parts = tuple(exported.networks)
    for lora in exported.card.base_loras:
        file = Path(lora.path)
        for part in experts_of(file.name, parts, {}):
            pipeline.load_lora_weights(file.parent, weight_name=file.name, **_SECOND[part])
        pipeline.fuse_lora(components=list(parts), lora_scale=lora.scale)
        pipeline.unload_lora_weights()


def _base_lora_lines(exported: ExportedStudent) -> list[str]:
    """The same as code for a card."""
    lines, parts = [], tuple(exported.networks)
    for lora in exported.card.base_loras:
        name = Path(lora.path).name
        for part in experts_of(name, parts, {}):
            second = "".join(f", {key}={value}" for key, value in _SECOND[part].items())
            lines.append(f"pipe.load_lora_weights({name!r}{second})  # the LoRA that it was trained over")
        lines.append(f"pipe.fuse_lora(components={list(parts)}, lora_scale={lora.scale})")
        lines.append("pipe.unload_lora_weights()")
    return lines


def check_unscaled(student: Path, scale: float) -> None:
    """Raise UserError for a LoRA that is to be taken other than whole."""
    if scale != 1 and has_adapter(student):
        raise UserError("a LoRA is scaled where it is loaded", where="--scale", fix="take it out, or --format merged")


def header(student: PipelineBackbone, exported: ExportedStudent) -> dict[str, str]:
    """A student's description in a safetensors header, which holds strings alone: one JSON object, `rats_video`."""
    card = exported.card
    under = [{"name": Path(lora.path).name, "scale": lora.scale} for lora in card.base_loras]
    about = {
        "version": rats_video.__version__,
        "base_model": exported.base_id,
        "sigmas": {str(steps): student.sigmas(steps, card.shift).tolist() for steps in card.num_steps},
        "shift": card.shift,
        "guidance_scale": 1.0,
        **({} if card.sampler == EULER else {"sampler": card.sampler}),
        "clip": card.clip,
        "training_steps": card.steps,
        "seed": card.seed,
        **({"base_loras": under} if under else {}),
        **({} if exported.boundary is None else {"boundary_ratio": exported.boundary}),
    }
    return {REMARKS: json.dumps(about)}
