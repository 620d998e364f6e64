"""What each process of a test does; started by torch's launcher, or called by the test itself to do it alone.

    torchrun --nproc-per-node 2 processes.py CONFIG JOBS.json

Jobs run one after another in the same processes, because starting them takes longer than all jobs together.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from rats_video.build.common import start_runtime
from rats_video.build.distill import finish, train_student
from rats_video.config.distill import DistillConfig
from rats_video.config.load import load_config
from rats_video.runtime import Runtime
from rats_video.training.run_folder import RunFolder


def distill(config: str, job: dict[str, Any]) -> Runtime:
    cfg = load_config(DistillConfig, config, group="distill", overrides=job["overrides"])
    runtime, run = start_runtime("cpu", cfg.parallel), RunFolder(Path(job["output"]))
    student = train_student(cfg, run, runtime, resume=True, overwrite=False)
    if runtime.is_main and student is not None:
        finish(cfg, run, student)
    return runtime


def main() -> None:
    config, jobs = sys.argv[1:]
    # diffusers asks for the number of accelerators, which a CPU build of torch has none of
    with mock.patch.object(torch.accelerator, "device_count", return_value=1):
        for job in json.loads(Path(jobs).read_text()):
            print("job", job, flush=True)
            runtime = distill(config, job)
    runtime.close()


if __name__ == "__main__":
    main()
