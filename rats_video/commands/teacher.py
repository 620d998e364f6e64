"""The run that a student comes from, and its teacher as the run judged it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rats_video.assets import is_embedded
from rats_video.commands.students import LoadedStudent, load_run
from rats_video.config.load import load_config
from rats_video.distillation.settings import DistillConfig
from rats_video.evaluation.settings import EvaluationConfig
from rats_video.inference.sampler import SamplerSpec
from rats_video.training.run_folder import RunFolder


def student_config(model: Path | None, base: str) -> DistillConfig | None:
    """The configuration of the student's run, or the packaged one of the embedded base; None without either.

    Args:
        model: a run or a student; None is the embedded one.
        base: the student's base, as its card names it.
    """
    for run in () if model is None else (model, model.resolve().parent):
        if RunFolder(run).config.is_file():
            return load_run(run)[1]
    return load_config(DistillConfig, "tiny", group="distill") if is_embedded(base) else None


def judged_teacher(cfg: DistillConfig | None, loaded: LoadedStudent) -> SamplerSpec:
    """The sampler that makes a student's base its teacher: as its run judged it, else as `evaluate` does by default."""
    if cfg is not None:
        return replace(cfg.judged_teacher, shift=loaded.card.shift)
    options = EvaluationConfig()
    return SamplerSpec(options.teacher_steps, loaded.card.shift, options.guidance_scale)
