"""`lora`: the adapter under diffusers' keys, and in the file's header how it must be sampled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import rats_video
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.experts import LOW_NOISE
from rats_video.backbones.lora import LORA_FILE
from rats_video.errors import UserError
from rats_video.export.base import ExportedStudent, Form
from rats_video.export.merged import SCHEDULER, load_scheduler
from rats_video.export.stock import open_pipeline
from rats_video.export.usage import base_snippet

REMARKS = "rats_video"  # the header's key


class Lora(Form):
    """The LoRA file, alpha in its header, and the scheduler."""

    name = "lora"
    summary = "a LoRA on the base, and a scheduler"
    relation = "adapter"

    def check(self, student: Path, family: type[PipelineBackbone], scale: float) -> None:  # noqa: ARG002
        """Refuse a student that is no LoRA, and any scale."""
        if not (student / LORA_FILE).is_file():
            raise UserError(
                "this student is no LoRA: all of its weights were trained", where="--format lora",
                fix="take merged, diffusers or comfyui, or train with student.weights.kind=lora",
            )  # fmt: skip
        check_unscaled(student, scale)

    def write(self, student: PipelineBackbone, exported: ExportedStudent, folder: Path) -> None:
        """Write the adapter and the scheduler."""
        assert student.adapters is not None
        assert student.role is not None
        student.adapters.save(student.role, folder, header(student, exported))
        exported.stock.scheduler.save_pretrained(folder / SCHEDULER)

    def load(self, exported: ExportedStudent, device: torch.device, folder: Path) -> Any:
        """The base's pipeline with the adapter; `load_lora_weights` skips a second expert's half of the file."""
        pipeline = open_pipeline(exported.base, device, exported.dtype, **load_scheduler(folder))
        pipeline.load_lora_weights(folder, weight_name=LORA_FILE)
        if (second := getattr(pipeline, LOW_NOISE, None)) is not None:
            second.load_lora_adapter(folder, prefix=LOW_NOISE, weight_name=LORA_FILE)
        return pipeline

    def sampling(self, exported: ExportedStudent, name: str) -> str:
        """Code that loads the adapter into the base's pipeline."""
        lines = [f"pipe.load_lora_weights(folder, weight_name={LORA_FILE!r})"]
        if LOW_NOISE in exported.networks:
            lines.append(f"pipe.{LOW_NOISE}.load_lora_adapter(folder, prefix={LOW_NOISE!r}, weight_name={LORA_FILE!r})")
        return base_snippet(exported, name, then=lines)


def check_unscaled(student: Path, scale: float) -> None:
    """Raise UserError for a LoRA that is to be taken other than whole."""
    if scale != 1 and (student / LORA_FILE).is_file():
        raise UserError("a LoRA is scaled where it is loaded", where="--scale", fix="take it out, or --format merged")


def header(student: PipelineBackbone, exported: ExportedStudent) -> dict[str, str]:
    """A student's description in a safetensors header, which holds strings alone: one JSON object, `rats_video`."""
    card = exported.card
    about = {
        "version": rats_video.__version__,
        "base_model": exported.base_id,
        "sigmas": {str(steps): student.sigmas(steps, card.shift).tolist() for steps in card.num_steps},
        "shift": card.shift,
        "guidance_scale": 1.0,
        "clip": card.clip,
        "training_steps": card.steps,
        "seed": card.seed,
    }
    return {REMARKS: json.dumps(about)}
