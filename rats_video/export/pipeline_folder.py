"""`diffusers`: a whole pipeline folder, whose scheduler steps through exactly the student's noise levels."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.folder import read_index
from rats_video.export.denoiser import SCHEDULER, write_merged
from rats_video.export.recipe import Recipe
from rats_video.files import write_json

WEIGHTS = {".safetensors", ".bin"}


def write_pipeline(student: PipelineBackbone, base: Path, recipe: Recipe, folder: Path) -> None:
    """The student's denoiser and scheduler among the base's other parts."""
    index = read_index(base, student.pipelines)
    ours = {*student.denoiser_parts, SCHEDULER}
    parts = {name for name, value in index.items() if isinstance(value, list) and value != [None, None]}
    for name in sorted(parts - ours):
        shutil.copytree(base / name, folder / name, copy_function=_link_or_copy)
    write_merged(student, recipe, folder)
    index[SCHEDULER] = ["diffusers", type(recipe.scheduler).__name__]
    index.pop("_name_or_path", None)
    write_json(folder / "model_index.json", index)


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
