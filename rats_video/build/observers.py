"""Who looks on at a run."""

from __future__ import annotations

from collections.abc import Sequence

from rats_video.build.guard import guard_clips
from rats_video.build.reward import Judges
from rats_video.config.distill import DistillConfig
from rats_video.runtime import Runtime
from rats_video.training.guard import Guard
from rats_video.training.observers import Observer
from rats_video.training.run_folder import RunFolder
from rats_video.training.trackers import Trackers
from rats_video.training.validation import ValidationClips
from rats_video.training.view import View
from rats_video.types import Backbone


def build_observers(
    cfg: DistillConfig,
    judges: Judges | None,
    student: Backbone,
    prompts: Sequence[str],
    run: RunFolder,
    guard: Guard | None,
    runtime: Runtime,
) -> list[Observer]:
    """Those of this process: clips of the held-out prompts are made by all, only the main one shows and tells."""
    clips = None
    if cfg.validation is not None and judges is not None:
        chosen = guard_clips(cfg, judges, prompts[: cfg.validation.num_clips], runtime, cfg.validation.nfe)
        clips = ValidationClips(cfg.validation, chosen, student, run, cfg.training.steps, runtime)
    observers: list[Observer] = [] if clips is None else [clips]
    if runtime.is_main:
        observers.append(View(cfg, run, runtime.device, guard))
    if runtime.is_main and cfg.tracking.trackers:
        observers.append(Trackers(cfg, run, guard, clips))
    return observers
