"""`diffusers`: a whole pipeline folder, whose scheduler steps through exactly the student's noise levels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.folder import read_configs, read_index
from rats_video.backbones.kinds import find_family
from rats_video.errors import UserError
from rats_video.export.base import ExportedStudent, Form
from rats_video.export.comfyui_models import only_diffusers
from rats_video.export.merged import SCHEDULER, write_networks
from rats_video.export.parts import copy_parts
from rats_video.export.stock import open_pipeline
from rats_video.export.usage import whole_snippet
from rats_video.files import write_json
from rats_video.hub import INDEX
from rats_video.inference.student import ITSELF, StudentCard


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

    def own_card(self, exported: ExportedStudent, folder: Path) -> StudentCard | None:
        """It needs no base, but for CogVideoX, whose noise levels we read from the base's scheduler."""
        family = find_family(folder, exported.card.backbone)
        try:
            family.check(read_index(folder), read_configs(folder, family.family), str(folder))
        except UserError:
            return super().own_card(exported, folder)
        return replace(exported.card, model=ITSELF)

    def load(self, exported: ExportedStudent, device: torch.device, folder: Path) -> Any:
        """The folder as a pipeline."""
        return open_pipeline(folder, device, exported.dtype)

    def programs(self, exported: ExportedStudent) -> str:
        """Diffusers."""
        return only_diffusers(exported)

    def sampling(self, exported: ExportedStudent, name: str) -> str:
        """Code that loads the folder."""
        return whole_snippet(exported, name)


def write_denoiser(model: PipelineBackbone, base: Path, folder: Path) -> None:
    """The model's denoiser among all of the base's other parts, its scheduler too."""
    index = copy_parts(base, folder, set(model.denoiser_parts))
    model.save_role(folder)
    write_json(folder / INDEX, index)
