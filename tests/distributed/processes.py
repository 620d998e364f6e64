"""Trainings that several processes do together; a test does the same ones alone.

    torchrun --nproc-per-node 2 processes.py CONFIG JOBS.json

They run one after another in the same processes, because starting those takes longer than all of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from rats_video.commands.device import start_runtime
from rats_video.commands.finish import finish
from rats_video.commands.train_student import train_student
from rats_video.config.load import load_config
from rats_video.distillation.settings import DistillConfig
from rats_video.runtime import Runtime
from rats_video.training.run_folder import RunFolder

COMMON = ("training.keep_checkpoints=1", "guard={every: 2, num_clips: 3}", "validation={every: 2, num_clips: 3}")
PLAN = {"seconds_per_step": 1.0, "peak_bytes": 1}


class Job(NamedTuple):
    """A training of a configuration, changed by `overrides`, into a folder whose run it goes on with."""

    config: str
    output: str
    overrides: tuple[str, ...]


def work(job: Job) -> Runtime:
    cfg = load_config(DistillConfig, job.config, group="distill", overrides=[*COMMON, *job.overrides])
    runtime, run = start_runtime("cpu", cfg.parallel), RunFolder(Path(job.output))
    with (  # slow, and looked at elsewhere
        mock.patch("rats_video.commands.train_student.plan_of_run", return_value=PLAN),
        mock.patch("rats_video.commands.finish.plot_training"),
        mock.patch("rats_video.commands.finish.plot_guard"),
    ):
        student = train_student(cfg, run, runtime, resume=True, overwrite=False)
        if runtime.is_main and student is not None:
            finish(cfg, run, student)
    return runtime


def main() -> None:
    # diffusers takes the rank modulo the number of accelerators, of which a CPU build of torch has none
    with mock.patch.object(torch.accelerator, "device_count", return_value=1):
        for job in json.loads(Path(sys.argv[1]).read_text()):
            runtime = work(Job(*job))
    runtime.close()


if __name__ == "__main__":
    main()
