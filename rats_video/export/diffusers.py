"""`diffusers`: a whole pipeline folder, whose scheduler steps through exactly the student's noise levels."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from rats_video.assets import INDEX
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.folder import read_index
from rats_video.export.base import ExportedStudent, Form
from rats_video.export.merged import ONLY_DIFFUSERS, SCHEDULER, write_networks
from rats_video.export.stock import TOKENIZER, misread_tokenizers, open_pipeline
from rats_video.export.usage import whole_snippet
from rats_video.files import write_json

WEIGHTS = {".safetensors", ".bin"}


class Diffusers(Form):
    """The student's denoiser and scheduler among the base's other parts."""

    name = "diffusers"
    summary = "a whole pipeline: the student's denoiser and scheduler among the base's other parts"
    relation = "finetune"

    def write(self, student: PipelineBackbone, exported: ExportedStudent, folder: Path) -> None:
        """Write the pipeline folder."""
        index = copy_parts(exported.base, folder, {*student.denoiser_parts, SCHEDULER})
        write_networks(student, exported, folder)
        write_json(
            folder / INDEX,
            index
            | {"_class_name": exported.pipeline, SCHEDULER: ["diffusers", type(exported.stock.scheduler).__name__]},
        )

    def load(self, exported: ExportedStudent, device: torch.device, folder: Path) -> Any:
        """The folder as a pipeline."""
        return open_pipeline(folder, device, exported.dtype)

    def programs(self, exported: ExportedStudent) -> str:  # noqa: ARG002
        """Diffusers."""
        return ONLY_DIFFUSERS

    def sampling(self, exported: ExportedStudent, name: str) -> str:
        """Code that loads the folder."""
        return whole_snippet(exported, name)


def write_denoiser(model: PipelineBackbone, base: Path, folder: Path) -> None:
    """The model's denoiser among all of the base's other parts, its scheduler too."""
    index = copy_parts(base, folder, set(model.denoiser_parts))
    model.save_role(folder)
    write_json(folder / INDEX, index)


def copy_parts(base: Path, folder: Path, ours: Collection[str]) -> dict[str, Any]:
    """Copy a pipeline's parts but for ours, byte for byte; returns its index."""
    index = read_index(base)
    parts = {name for name, value in index.items() if isinstance(value, list) and value != [None, None]}
    for name in sorted(parts - set(ours)):
        shutil.copytree(base / name, folder / name, copy_function=_link_or_copy)
    index |= {name: ["transformers", TOKENIZER] for name in misread_tokenizers(base)}
    return {name: value for name, value in index.items() if name != "_name_or_path"}


def _link_or_copy(source: str, target: str) -> None:
    """Give a file of weights a second name, which takes no space and outlives the first; copy what people edit."""
    origin = Path(source).resolve()
    if origin.suffix in WEIGHTS:
        try:
            os.link(origin, target)
        except OSError:  # another file system, or a file that is not ours to link
            pass
        else:
            return
    shutil.copyfile(origin, target)
