"""A disk that fills up, in each kind of write: one line, what was there stays, and the run goes on from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_runs import assert_refused, assert_same_run, checkpoints, fill, rows

from rats_video.methods.rats import Rats, rats_step
from rats_video.training.guard import Guard
from rats_video.types import PromptBatch

Distill = Callable[..., Any]
Mount = Callable[[int], Path]
Fill = Callable[..., AbstractContextManager[None]]
FOUR = ("training.steps=4", "training.checkpoint_every=2")
MANY = ("training.steps=24", "training.checkpoint_every=100")


@pytest.fixture
def fill_at(monkeypatch: pytest.MonkeyPatch) -> Fill:
    """Fills the disk while a step of the run is done."""

    @contextmanager
    def call(step: int, disk: Path, leave: int) -> Iterator[None]:
        def filling(rats: Rats, batch: PromptBatch) -> tuple[torch.Tensor, dict[str, float]]:
            if batch.index == step - 1:
                fill(disk, leave)
            return rats_step(rats, batch)

        with monkeypatch.context() as patch:
            patch.setattr("rats_video.methods.rats.rats_step", filling)
            yield

    return call


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if ".partial" in path.name or ".old" in path.name]


@pytest.mark.parametrize(
    ("step", "leave", "steps", "what"),
    # the log's last page on the disk takes some rows more
    [(3, 64, FOUR, "cannot write the checkpoint: "), (6, 0, MANY, "disk full while writing")],
    ids=["checkpoint", "log"],
)
def test_full_disk_ends_a_run_that_goes_on_with_space(
    distill: Distill, small_disk: Mount, fill_at: Fill, tmp_path: Path, step: int, leave: int,
    steps: tuple[str, ...], what: str,
) -> None:  # fmt: skip
    disk = small_disk(1600)
    assert distill(disk / "run", "training.steps=2").code == 0
    with fill_at(step, disk, leave):
        assert_refused(distill(disk / "run", "--resume", *steps), what)
    assert checkpoints(disk / "run") == ["step-000002"]
    assert leftovers(disk) == []
    assert [row["step"] for row in rows(disk / "run")][:2] == [1, 2]
    (disk / "ballast").unlink()
    assert distill(disk / "run", "--resume", *FOUR).code == 0
    assert distill("whole", *FOUR).code == 0
    assert_same_run(disk / "run", tmp_path / "whole")


@pytest.mark.parametrize(("leave", "what"), [(48, "cannot write the checkpoint: "), (0, "cannot write the record: ")])
def test_full_disk_while_the_guard_looks(
    distill: Distill, small_disk: Mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leave: int, what: str
) -> None:
    disk = small_disk(1600)
    options = ("training.checkpoint_every=1", "training.steps=4", "guard={every: 2, num_clips: 2}")
    best = 3 if leave == 0 else 2  # of step 4, or of step 2: only then its weights are written
    look = Guard.evaluate

    def filling(guard: Guard, rats: Rats, step: int, drift: float) -> None:
        if step == 2:
            fill(disk, leave)
        look(guard, rats, step, drift)

    monkeypatch.setattr(
        Guard, "best", property(lambda guard: next((each for each in guard.evaluations if each.step == best), None))
    )
    with monkeypatch.context() as patch:
        patch.setattr(Guard, "evaluate", filling)
        assert_refused(distill(disk / "run", *options), what)
    assert leftovers(disk) == []
    assert checkpoints(disk / "run") == ["step-000001"]
    (disk / "ballast").unlink()
    assert distill(disk / "run", "--resume", *options).code == 0
    assert distill("whole", *options).code == 0
    assert_same_run(disk / "run", tmp_path / "whole")


def test_full_disk_under_the_teacher_cache(distill: Distill, small_disk: Mount, fill_at: Fill, tmp_path: Path) -> None:
    disk = small_disk(256)
    cache = f"teacher.cache={disk}"
    with fill_at(2, disk, 0):
        outcome = distill("run", cache, "training.steps=3", "training.checkpoint_every=1")
    assert_refused(outcome, "cannot write the teacher rollout: ")
    assert leftovers(disk) == []
    assert len(list(disk.rglob("*.safetensors"))) == 1
    (disk / "ballast").unlink()
    assert distill("run", "--resume", cache, "training.steps=3", "training.checkpoint_every=1").code == 0
    assert distill("whole", "training.steps=3").code == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
