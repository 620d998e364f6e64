"""A student's teacher, as its run judged it."""

from __future__ import annotations

from dataclasses import replace

from rats_video.commands.students import LoadedStudent
from rats_video.distillation.settings import DistillConfig
from rats_video.evaluation.settings import EvaluationConfig
from rats_video.inference.sampler import SamplerSpec


def judged_teacher(cfg: DistillConfig | None, loaded: LoadedStudent) -> SamplerSpec:
    """The sampler that makes a student's base its teacher: as its run judged it, else as `evaluate` does by default."""
    if cfg is not None:
        return replace(cfg.judged_teacher, shift=loaded.card.shift)
    options = EvaluationConfig()
    return SamplerSpec(options.teacher_steps, loaded.card.shift, options.guidance_scale)
