"""Functions that hang, crash or raise fail alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import zoo
from tasks import act, count_frames

from rats_video.datasets.video.isolated import IsolatedPool
from rats_video.datasets.video.isolated_worker import Failure

pytestmark = pytest.mark.pipeline


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_each_task_fails_alone_and_results_keep_their_order() -> None:
    tasks = ["pid", "crash", "tensor", "hang", "raise", "killed", "tensor", "pid"]
    with IsolatedPool(act, workers=2, timeout_seconds=3) as pool:
        answers = list(pool.imap(tasks))
    assert [task for task, _ in answers] == tasks
    outcomes = [outcome for _, outcome in answers]
    assert outcomes[1] == Failure("its process died", "SIGSEGV")
    assert outcomes[3] == Failure("takes too long", "over 3 s")
    assert outcomes[4] == Failure("its reader failed", "ValueError: bad")
    assert outcomes[5] == Failure("its process died", "SIGKILL, out of memory?")
    for tensor in (outcomes[2], outcomes[6]):
        assert torch.equal(tensor, torch.arange(2**20, dtype=torch.int64).to(torch.uint8))
        tensor.add_(1)  # it belongs to whoever has it
    assert all(gone(pid) for pid in (outcomes[0], outcomes[7]))


def test_workers_are_replaced_and_leave_nothing_behind() -> None:
    before, shared = len(list(Path("/proc/self/fd").iterdir())), sorted(Path("/dev/shm").iterdir())
    with IsolatedPool(act, workers=1, timeout_seconds=60, max_tasks=2) as pool:
        pids = [outcome for _, outcome in pool.imap(["pid"] * 3)]
    assert pids[0] == pids[1] != pids[2]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1  # the tracker of multiprocessing, once
    assert sorted(Path("/dev/shm").iterdir()) == shared


def test_closing_the_iterator_kills_the_workers() -> None:
    answers = IsolatedPool(act, workers=1, timeout_seconds=60).imap(["pid"] + ["hang"] * 9)
    _, pid = next(answers)
    answers.close()
    assert gone(pid)


def test_inline() -> None:
    answers = IsolatedPool(act, workers=0, timeout_seconds=1).imap(["pid", "raise"])
    assert [outcome for _, outcome in answers] == [os.getpid(), Failure("its reader failed", "ValueError: bad")]


@pytest.mark.parametrize("kind", ["h264", "hevc open", "vp9", "mpeg4 in avi"])
def test_fifty_damaged_files_each_give_frames_or_a_reason(tmp_path: Path, kind: str) -> None:
    data = zoo.make(kind, tmp_path).read_bytes()
    paths = [tmp_path / f"{seed}.mp4" for seed in range(50)]
    for seed, path in enumerate(paths):
        path.write_bytes(zoo.damage(data, seed))
    with IsolatedPool(count_frames, workers=1, timeout_seconds=30) as pool:
        outcomes = [outcome for _, outcome in pool.imap(paths)]
    reasons = {outcome.reason for outcome in outcomes if isinstance(outcome, Failure)}
    assert all(isinstance(outcome, Failure) or outcome > 0 for outcome in outcomes)
    assert sum(isinstance(outcome, Failure) for outcome in outcomes) >= 13  # a quarter is cut off
    assert reasons <= {
        "cannot be opened", "ends early", "damaged", "frames are missing", "no frames", "no video stream", "is empty",
        "its frames change size", "its times run backwards", "its frames have no times", "its frames are too large",
        "turned by no quarter", "no decoder for its codec",
    }  # fmt: skip
