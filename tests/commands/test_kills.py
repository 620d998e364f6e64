"""A run that is killed at the worst moments and gone on with is, bit for bit, the run that was not.

benchmarks/kills.py does it a hundred times at random moments.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from few_calls import FEW_CALLS
from killing import killed

from rats_video.commands.finish import finish
from rats_video.commands.train_student import train_student
from rats_video.distillation.settings import DistillConfig
from rats_video.runtime import ALONE
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder

OPTIONS = (
    *FEW_CALLS, "training.steps=7", "training.checkpoint_every=2", "training.keep_checkpoints=1", "teacher.kind=ema",
    "teacher.decay=0.5", "teacher.reuse=2", "guard={every: 2, num_clips: 2}",
)  # fmt: skip

# What is replaced by a SIGKILL, and at which of its calls.
MOMENTS = {
    "the first look": ("rats_video.training.guard.Guard.evaluate", 1),
    "amid the third step": ("rats_video.methods.rats.rats_step", 3),
    "amid a checkpoint": ("rats_video.training.checkpoint.save_file", 2),
    "between a look and its checkpoint": ("rats_video.training.checkpoint.CheckpointWriter.save", 2),
    "before the row of a step": ("rats_video.training.metrics.MetricsFile.append", 3),
    "between a checkpoint and the deletion of an old one": ("rats_video.training.checkpoint.remove", 1),
    "with the student written aside": ("rats_video.commands.finish.save_student", 1),
}


@pytest.fixture
def go(make_config: Callable[..., DistillConfig]) -> Callable[[Path], None]:
    """`distill --resume` into a folder."""

    def call(folder: Path) -> None:
        cfg, run = make_config(*OPTIONS), RunFolder(folder)
        student = train_student(cfg, run, ALONE, resume=True, overwrite=False)
        assert student is not None
        finish(cfg, run, student)

    return call


def content(run: Path) -> dict[str, Any]:
    """All that a run leaves, but for how long its steps took and what is known of its starts."""
    untold = {"environment.json", "plan.json", "metrics.jsonl"}
    files = {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*")) if path.is_file() and path.name not in untold
    }  # fmt: skip
    return files | {"rows": [row | {"seconds": 0} for row in read_metrics(run / "metrics.jsonl")]}


def test_killed_at_every_turn_it_is_the_same(go: Callable[[Path], None], tmp_path: Path) -> None:
    go(tmp_path / "whole")
    for moment in MOMENTS.values():
        killed(lambda: go(tmp_path / "killed"), *moment)
    go(tmp_path / "killed")
    whole, again = content(tmp_path / "whole"), content(tmp_path / "killed")
    assert again.keys() == whole.keys()
    assert [name for name in whole if again[name] != whole[name]] == []
    assert {"guard.json", "student/rats.json", "checkpoints/step-000007/teacher.safetensors"} <= whole.keys()
