"""The callbacks of a run: validation clips, the view, trackers."""

from __future__ import annotations

from collections.abc import Sequence

from rats_video.distillation.guard import guard_clips
from rats_video.distillation.run_rewards import RunRewards
from rats_video.distillation.settings import DistillConfig
from rats_video.runtime import Runtime
from rats_video.training.callbacks import Callback
from rats_video.training.guard import Guard
from rats_video.training.run_folder import RunFolder
from rats_video.training.trackers import Trackers
from rats_video.training.validation import ValidationClips
from rats_video.training.view import TerminalView
from rats_video.types import Backbone


def build_callbacks(
    cfg: DistillConfig,
    rewards: RunRewards | None,
    student: Backbone,
    prompts: Sequence[str],
    run: RunFolder,
    guard: Guard | None,
    runtime: Runtime,
) -> list[Callback]:
    """Callbacks of this process: all make clips of held-out prompts, the main one alone shows and tracks."""
    clips = None
    if cfg.validation is not None and rewards is not None:
        chosen = guard_clips(cfg, rewards, prompts[: cfg.validation.num_clips], runtime, cfg.validation.nfe)
        clips = ValidationClips(cfg.validation, chosen, student, run, cfg.training.steps, runtime)
    callbacks: list[Callback] = [] if clips is None else [clips]
    if runtime.is_main:
        callbacks.append(TerminalView(cfg, run, runtime.device, guard))
    if runtime.is_main and cfg.tracking.trackers:
        callbacks.append(Trackers(cfg, run, guard, clips))
    return callbacks
