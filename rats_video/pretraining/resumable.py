"""The steps of a small training that survives being killed: `train vae | teacher | reward`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import BaseModel

from rats_video.config.changes import differences
from rats_video.files import tidy
from rats_video.progress import ProgressBar
from rats_video.runtime import ALONE, Runtime
from rats_video.training.checkpoint import CheckpointWriter, Weights
from rats_video.training.interrupt import StopRequest
from rats_video.training.restore import resume

FREE_OF_PRETRAINING = {
    "eval_clips", "eval_steps", "checkpoint_every", "prune_channels", "student",
    "validation",
    "micro_batch_size", "compute.attention", "compute.activation_checkpointing", "compute.compile", "compute.offload",
}  # fmt: skip
"""Keys of a `train` configuration that a resumed training may change: they do not affect what is learned."""


def changed_training(before: BaseModel, after: BaseModel) -> list[str]:
    """The dotted keys of a `train` configuration that decide what is learned and differ."""
    return list(differences(before.model_dump(), after.model_dump(), "", FREE_OF_PRETRAINING))


EVERY = 100
"""Steps between checkpoints, where no configuration says otherwise."""


def resumable_steps(
    title: str,
    total: int,
    folder: Path,
    weights: Weights,
    optimizer: torch.optim.Optimizer,
    *,
    average: Weights | None = None,
    every: int = EVERY,
    runtime: Runtime = ALONE,
) -> Iterator[tuple[int, ProgressBar]]:
    """Yield the remaining steps, each with the bar to advance, and save checkpoints in `folder`.

    All processes of `runtime` call it together; one of them writes.

    The random draws of a step must depend on its number alone: then a resumed training equals an uninterrupted one, bit
    for bit.

    Raises:
        UserError: a checkpoint cannot be written, or those that are there cannot be read.
        Interrupted: somebody asked to stop; the step was finished and saved.
    """
    if runtime.is_main:
        tidy(folder)
    start = resume(folder, weights, average, optimizer, runtime)["step"]
    with (
        StopRequest() as stop,
        ProgressBar(title, total, start) as progress,
        CheckpointWriter(folder, 2, runtime) as writer,
    ):
        for step in range(start, total):
            yield step, progress
            is_stop = runtime.any(stop.requested)
            if is_stop or (step + 1) % every == 0:
                writer.save(step + 1, weights, average, optimizer)
            if is_stop:
                writer.finish()
                stop.end(f"stopped after step {step + 1}, which is saved", runtime)
        writer.wait()


def delete_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a training whose result is saved."""
    shutil.rmtree(folder, ignore_errors=True)
