"""The steps of a small training that survives being killed: `train vae | teacher | reward`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from rats_video.files import tidy
from rats_video.runtime import ALONE, Runtime
from rats_video.training.checkpoint import CheckpointWriter, Weights, resume
from rats_video.training.interrupt import StopRequest
from rats_video.training.progress import ProgressBar

EVERY = 100
"""Steps between checkpoints, where no configuration says otherwise."""


def resumable(
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
    """Yield the steps that are still to do, each with the bar to advance, and keep what they made in `folder`.

    All processes of `runtime` call it together, one of them writes.

    What a step draws must depend on its number alone: then a training that goes on is, bit for bit, one that was not
    interrupted.

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
        CheckpointWriter(folder, 2, writes=runtime.is_main) as writer,
    ):
        for step in range(start, total):
            yield step, progress
            is_stop = runtime.any(stop.requested)
            if is_stop or (step + 1) % every == 0:
                writer.save(step + 1, weights, average, optimizer)
            if is_stop:
                writer.wait()
                runtime.wait()
                stop.end(f"stopped after step {step + 1}, which is saved", runtime)
        writer.wait()


def forget(folder: Path) -> None:
    """Delete the checkpoints of a training whose result is saved."""
    shutil.rmtree(folder, ignore_errors=True)
