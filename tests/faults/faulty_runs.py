"""What tests of faults ask of a run's folder and of how a command ended."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rats_video.training.metrics import read_metrics


def rows(run: Path) -> list[dict[str, float]]:
    """The run's log, without what a clock says."""
    return [{name: row[name] for name in row if name != "seconds"} for row in read_metrics(run / "metrics.jsonl")]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit the same log, guard's record and weights; checkpoints before the last may be others."""
    assert rows(one) == rows(other)
    if (one / "guard.json").exists():
        assert (one / "guard.json").read_text() == (other / "guard.json").read_text()
    folders = [f"checkpoints/{checkpoints(one)[-1]}", "student", *(["best"] if (one / "best").exists() else [])]
    for folder in folders:
        files = sorted(path.relative_to(one) for path in (one / folder).rglob("*.safetensors"))
        assert files
        for file in files:
            ours, theirs = load_file(one / file), load_file(other / file)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()), file


def assert_refused(outcome: Any, expected: str) -> None:
    """Exit code 2 and one line."""
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.err
    *before, last = outcome.err.splitlines()
    assert last.startswith("error: ")
    assert not any(line.startswith("error: ") for line in before)
    assert expected in last


def fill(disk: Path, leave: int) -> None:
    """Leave so many KiB of it."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "ballast").write_bytes(b"x" * max(0, free - leave * 1024))
