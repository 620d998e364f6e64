"""A finished run's folder, opened."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rats_video.assets import find_hub_id, is_embedded
from rats_video.config.load import load_config
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError, warn
from rats_video.hub import CARD
from rats_video.training.checkpoint import list_checkpoints, steps_done
from rats_video.training.run_folder import RunFolder


def load_run(folder: Path) -> tuple[RunFolder, DistillConfig]:
    """A finished run and its configuration; raises UserError if the folder is none.

    Warns where the run has gone on since its student was written, and is not finished.
    """
    run = RunFolder(folder)
    if not run.config.is_file():
        if find_hub_id(str(folder)):
            raise UserError(
                "a student on the hub has no run beside it",
                where=str(folder),
                fix="give the folder of a `rats-video distill`; `rats-video sample --model` takes this one",
            )
        raise UserError(
            "not a run: it has no config.resolved.yaml",
            where=str(folder),
            fix="give the folder of a `rats-video distill`",
        )
    run.check_entries()
    cfg = load_config(DistillConfig, str(run.config.resolve()), group="distill")
    end = cfg.training.steps
    step = max(map(steps_done, list_checkpoints(run.checkpoints)), default=end)
    if step < end and (run.student / CARD).is_file():
        warn(f"is at step {step} of {end}; its student is the one from before it went on", where=str(folder))
    return run, cfg


def config_near(folder: Path, base: str) -> DistillConfig | None:
    """`config_of` of a run, or of a student in one."""
    return config_of((folder, folder.resolve().parent), base)


def config_of(folders: Iterable[Path], base: str) -> DistillConfig | None:
    """The configuration of the first of these folders that is a run, or of an embedded base; None without either."""
    for folder in folders:
        if RunFolder(folder).config.is_file():
            return load_run(folder)[1]
    return load_config(DistillConfig, "tiny", group="distill") if is_embedded(base) else None
