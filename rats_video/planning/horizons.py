"""The horizons of a run: the student's noise levels and the teacher's that they are compared at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.experts import expert_by_step
from rats_video.distillation.settings import DistillConfig
from rats_video.methods.horizon import match_horizons


def horizon_rows(cfg: DistillConfig, backbone: PipelineBackbone) -> Iterator[dict[str, Any]]:
    """A row for each step of each student step count: both noise levels and what is left between them."""
    teacher = backbone.sigmas(cfg.teacher.num_steps, cfg.shift)
    boundary: float | None = getattr(backbone, "boundary_ratio", None)
    for steps in dict.fromkeys(cfg.student.num_steps):
        grid = backbone.sigmas(steps, cfg.shift)
        makers = expert_by_step(grid, boundary)
        for start, sigma, maker in zip(grid[:-1].tolist(), grid[1:], makers, strict=True):
            matched = match_horizons(torch.stack([grid[0], sigma]), teacher)
            row = {
                "num_steps": steps, "from": start, "student": float(sigma),
                "teacher": [float(teacher[i]) for i in matched.keep], "residual": matched.residual,
            }  # fmt: skip
            if boundary is not None:  # the expert that makes the step that ends there
                row["expert"] = maker
            yield row
