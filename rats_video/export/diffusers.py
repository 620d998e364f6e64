"""`diffusers`: a whole pipeline folder, whose scheduler steps through exactly the student's noise levels."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.folder import read_index
from rats_video.export.merged import SCHEDULER, write_merged
from rats_video.export.recipe import StockCall
from rats_video.files import write_json

INDEX = "model_index.json"
WEIGHTS = {".safetensors", ".bin"}


def write_pipeline(student: PipelineBackbone, base: Path, recipe: StockCall, folder: Path) -> None:
    """The student's denoiser and scheduler among the base's other parts."""
    index = copy_parts(base, folder, student, {*student.denoiser_parts, SCHEDULER})
    write_merged(student, recipe, folder)
    write_json(folder / INDEX, index | {SCHEDULER: ["diffusers", type(recipe.scheduler).__name__]})


def write_denoiser(model: PipelineBackbone, base: Path, folder: Path) -> None:
    """The model's denoiser among all of the base's other parts, its scheduler too."""
    index = copy_parts(base, folder, model, set(model.denoiser_parts))
    model.save_role(folder)
    write_json(folder / INDEX, index)


def copy_parts(base: Path, folder: Path, model: PipelineBackbone, ours: Collection[str]) -> dict[str, Any]:
    """Copy a pipeline's parts but for ours, byte for byte; returns its index."""
    index = read_index(base, model.pipelines)
    parts = {name for name, value in index.items() if isinstance(value, list) and value != [None, None]}
    for name in sorted(parts - set(ours)):
        shutil.copytree(base / name, folder / name, copy_function=_link_or_copy)
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
