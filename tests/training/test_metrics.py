"""The metrics file: whole rows only, none after the checkpoint; and the learning-rate schedule they record."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rats_video.optim import cosine_lr
from rats_video.training.metrics import MetricsFile, read_metrics


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def write(path: Path, *steps: int) -> None:
    metrics = MetricsFile(path, 0)
    for step in steps:
        metrics.append({"step": step, "loss": step / 2})


def steps(path: Path) -> list[float]:
    return [row["step"] for row in read_metrics(path)]


def test_rows_come_back(path: Path) -> None:
    write(path, 1, 2)
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}]
    assert path.read_text().count("\n") == 2


def test_new_run_starts_empty(path: Path) -> None:
    write(path, 1, 2)
    MetricsFile(path, 0)
    assert path.read_text() == ""


def test_resumed_run_drops_the_rows_after_its_checkpoint(path: Path) -> None:
    write(path, 1, 2, 3, 4, 5)
    MetricsFile(path, 3).append({"step": 4, "loss": 9.0})
    assert steps(path) == [1, 2, 3, 4]
    assert read_metrics(path)[-1]["loss"] == 9.0


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', "{", "\0\0\0", '{"step": 3, "loss": 1.5'])
def test_torn_last_line_is_dropped(path: Path, torn: str) -> None:
    write(path, 1, 2)
    path.write_text(path.read_text() + torn)
    assert steps(path) == [1, 2]
    MetricsFile(path, 5).append({"step": 3, "loss": 0.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_each_row_is_on_disk_at_once(path: Path) -> None:
    metrics = MetricsFile(path, 0)
    metrics.append({"step": 1})
    assert steps(path) == [1]


def test_cosine_lr() -> None:
    assert [cosine_lr(step, 10, 2.0, warmup=2) for step in (0, 1, 2)] == [1.0, 2.0, 2.0]
    assert cosine_lr(6, 10, 2.0, warmup=2) == pytest.approx(1.0)
    assert cosine_lr(10, 10, 2.0, warmup=2) == pytest.approx(0.0)
    assert cosine_lr(10, 10, 2.0, floor=0.25) == pytest.approx(0.5)
    assert cosine_lr(4, 8, 1.0, floor=0.2) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert cosine_lr(0, 0, 1.0) == 1.0
