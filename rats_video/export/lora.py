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
from rats_video.export.merged import SCHEDULER, load_scheduler
from rats_video.export.recipe import StockCall
from rats_video.export.stock import open_pipeline
from rats_video.inference.student import StudentCard

REMARKS = "rats_video"  # the header's key


def header(student: PipelineBackbone, card: StudentCard, base_id: str) -> dict[str, str]:
    """What a safetensors header, which holds strings alone, says of a student: one JSON object under `rats_video`."""
    about = {
        "version": rats_video.__version__,
        "base_model": base_id,
        "sigmas": {str(steps): student.sigmas(steps, card.shift).tolist() for steps in card.num_steps},
        "shift": card.shift,
        "guidance_scale": 1.0,
        "clip": card.clip,
        "training_steps": card.steps,
        "seed": card.seed,
    }
    return {REMARKS: json.dumps(about)}


def write_lora(student: PipelineBackbone, card: StudentCard, recipe: StockCall, base_id: str, folder: Path) -> None:
    """The LoRA file, alpha in its header, and the scheduler."""
    assert student.adapters is not None
    assert student.role is not None
    student.adapters.save(student.role, folder, header(student, card, base_id))
    recipe.scheduler.save_pretrained(folder / SCHEDULER)


def load_lora(folder: Path, base: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The base's pipeline with the adapter; `load_lora_weights` passes a second expert's half of the file by."""
    pipeline = open_pipeline(base, device, dtype, **load_scheduler(folder))
    pipeline.load_lora_weights(folder, weight_name=LORA_FILE)
    if (second := getattr(pipeline, LOW_NOISE, None)) is not None:
        second.load_lora_adapter(folder, prefix=LOW_NOISE, weight_name=LORA_FILE)
    return pipeline
