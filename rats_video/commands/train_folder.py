"""The output folder of a `train` command."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rats_video.commands.folders import claim_run, locked_output, refuse_changes
from rats_video.commands.record import environment
from rats_video.config.fields import Config
from rats_video.config.load import load_config, write_resolved
from rats_video.files import tidy, write_json
from rats_video.pretraining.resumable import changed_training, delete_checkpoints
from rats_video.training.run_folder import CONFIG

RECORD = "training.json"


@contextlib.contextmanager
def training_in(cfg: Config, output: Path, group: str, *, resume: bool, overwrite: bool) -> Iterator[bool]:
    """Context that owns OUTPUT, its checkpoints deleted at the end; yields whether all was done before.

    Raises:
        UserError: another process works there, or it holds something, or a run of another configuration to go on with.
    """
    with locked_output(output):
        yield claim_training(cfg, output, group, resume=resume, overwrite=overwrite)
        delete_checkpoints(output / "checkpoints")


def claim_training(cfg: Config, output: Path, group: str, *, resume: bool, overwrite: bool) -> bool:
    """Make OUTPUT this training's, where nobody else works; returns whether all was done before.

    Raises:
        UserError: it holds something, or a run of another configuration to go on with.
    """
    tidy(output)
    if claim_run(output, resume=resume, overwrite=overwrite):
        before = load_config(type(cfg), str((output / CONFIG).resolve()), group=group)
        refuse_changes(output, changed_training(before, cfg))
    write_resolved(cfg, output / CONFIG)
    return (output / RECORD).is_file()


def record_training(
    folder: Path, cfg: Any, seconds: float, device: torch.device, metrics: dict[str, float]
) -> list[str]:
    """Write what a trained model is beside it, which says that it is whole; returns the lines to show."""
    content = {
        "config": cfg.model_dump(mode="json"),
        "seed": cfg.seed,
        "seconds": round(seconds, 1),
        "environment": environment(device),
        "metrics": {name: round(value, 4) for name, value in metrics.items()},
    }
    write_json(folder / RECORD, content)
    return [*(f"{name}: {value:.4g}" for name, value in metrics.items()), f"{seconds:.0f} s: {folder}"]
