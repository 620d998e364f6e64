"""Steps whose loss, gradient or weights are not finite: left out, gone back from, given up on."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_runs import assert_refused, assert_same_run, checkpoints, rows
from safetensors.torch import load_file
from torch import Tensor

from rats_video.methods.rats import Rats, rats_step
from rats_video.optim import set_learning_rate
from rats_video.types import PromptBatch

Distill = Callable[..., Any]
LR = 1e-3
SIX = ("training.steps=6", "training.checkpoint_every=2")


class Injector:
    """Counts a run's steps, tried again ones too, and does something at some of them; knows the rate in force."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lr, self.calls, self.acts = 0.0, itertools.count(1), []  # type: ignore[var-annotated]
        monkeypatch.setattr("rats_video.methods.rats.rats_step", self._step)
        monkeypatch.setattr("rats_video.training.update.set_learning_rate", self._rate)

    def at(self, steps: Iterable[int], act: Callable[[Rats, dict[str, float]], None], above: float = 0.0) -> None:
        """Do something at these steps, where the learning rate is above a limit."""
        self.acts.append(lambda _, step: act if step in steps and self.lr > above else None)

    def at_call(self, number: int, act: Callable[[Rats, dict[str, float]], None]) -> None:
        self.acts.append(lambda call, _: act if call == number else None)

    def _rate(self, *arguments: Any) -> float:
        self.lr = set_learning_rate(*arguments)
        return self.lr

    def _step(self, rats: Rats, batch: PromptBatch) -> tuple[Tensor, dict[str, float]]:
        loss, row = rats_step(rats, batch)
        call = next(self.calls)
        for choose in self.acts:
            if (act := choose(call, batch.index + 1)) is not None:
                act(rats, row)
        return loss * row.pop("times", 1.0), row


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Injector]:
    """What goes wrong from now on, and nothing else."""
    return lambda: Injector(monkeypatch)


def nan_loss(_: Rats, row: dict[str, float]) -> None:
    row["loss"] = math.nan


def endless_gradient(_: Rats, row: dict[str, float]) -> None:
    row["times"] = math.inf


def left_out(run: Path) -> list[float]:
    return [row["faults/skipped"] for row in rows(run)]


@pytest.mark.parametrize(
    ("act", "what"),
    [(nan_loss, "the loss is nan"), (endless_gradient, "the gradient is nan")],
    ids=["loss", "gradient"],
)
def test_a_step_left_out_leaves_no_trace(
    distill: Distill, inject: Callable[[], Injector], tmp_path: Path, act: Any, what: str
) -> None:
    inject().at([3], act)
    done = distill("run", "training.steps=3", "training.checkpoint_every=1", "teacher={kind: ema, num_steps: 4}")
    assert done.code == 0
    assert f"warning: distill: {what} at step 3, which is left out\n" in done.err
    before, after = (tmp_path / "run" / "checkpoints" / f"step-00000{step}" for step in (2, 3))
    for name in ("student", "teacher", "optimizer"):
        ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in (after, before))
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert left_out(tmp_path / "run") == [0, 0, 1]
    expected = {"step": 3, "faults/skipped": 1, "faults/rollbacks": 0, "evaluations": 20.0}
    assert rows(tmp_path / "run")[-1] == expected


def test_too_many_in_a_row_go_back_at_a_lower_rate(
    distill: Distill, inject: Callable[[], Injector], tmp_path: Path
) -> None:
    inject()
    assert distill("whole", *SIX).code == 0
    inject().at([4, 5], nan_loss, above=0.9 * LR)
    done = distill("run", *SIX, "training.faults.skip=1")
    assert done.code == 0
    assert [line for line in done.err.splitlines() if "warning" in line] == [
        "warning: distill: the loss is nan at step 4, which is left out",
        # not to step 4, which was saved with the weights that failed
        "warning: distill: the loss is nan at step 5: back to step 2, on at 0.5 of the learning rate",
    ]
    found, whole = rows(tmp_path / "run"), rows(tmp_path / "whole")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert [row["lr"] for row in found] == [LR, LR, LR / 2, LR / 2, LR / 2, LR / 2]
    assert [row["faults/rollbacks"] for row in found] == [0, 0, 1, 1, 1, 1]
    assert [row["loss"] for row in found[:3]] == [row["loss"] for row in whole[:3]]  # the same weights and batch
    assert found[3]["loss"] != whole[3]["loss"]
    assert checkpoints(tmp_path / "run") == ["step-000004", "step-000006"]


def test_resumed_run_goes_back_as_the_uninterrupted_one(
    distill: Distill, inject: Callable[[], Injector], tmp_path: Path
) -> None:
    """Steps tried: 1 2 3 4(nan) 5(nan) | 3 4 5 6; crashes before it goes back, after that, and after it was saved."""
    options = (*SIX, "training.faults.skip=1", "guard={every: 2, num_clips: 2}", "teacher={kind: ema, num_steps: 4}")
    inject().at([4, 5], nan_loss, above=0.9 * LR)
    assert distill("whole", *options).code == 0

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    for call in (5, 2, 6, 2):  # counted from the checkpoint that it goes on from: none, 4, 2, 4
        crashing = inject()
        crashing.at([4, 5], nan_loss, above=0.9 * LR)
        crashing.at_call(call, crash)
        going_on = ["--resume"] if (tmp_path / "run").exists() else []
        assert distill("run", *going_on, *options).code == 130
    inject().at([4, 5], nan_loss, above=0.9 * LR)
    assert distill("run", "--resume", *options).code == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    looks = json.loads((tmp_path / "whole" / "guard.json").read_text())["looks"]
    assert [look["step"] for look in looks] == [0, 2, 4, 6]  # those of steps that were gone back from are forgotten


def test_weights_that_broke_are_gone_back_from_at_once(
    distill: Distill, inject: Callable[[], Injector], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    injector = inject()
    step = torch.optim.AdamW.step

    def spoil(optimizer: torch.optim.AdamW, *arguments: Any) -> Any:
        done = step(optimizer, *arguments)
        if optimizer.param_groups[0]["lr"] == LR and rows(tmp_path / "run")[-1:] != []:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][-1].flatten()[0] = math.inf
        return done

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    done = distill("run", "training.steps=3", "training.checkpoint_every=1")
    assert done.code == 0, done.err
    assert "the updated weights are not finite at step 2: back to step 1, on at 0.5 of" in done.err
    assert [row["lr"] for row in rows(tmp_path / "run")] == [LR, LR / 2, LR / 2]
    assert next(injector.calls) == 5
    student = load_file(tmp_path / "run" / "checkpoints" / "step-000003" / "student.safetensors")
    assert all(tensor.isfinite().all() for tensor in student.values())


def test_what_stays_wrong_ends_the_run_which_goes_on_when_mended(
    distill: Distill, inject: Callable[[], Injector], tmp_path: Path
) -> None:
    inject().at([4, 5], nan_loss)
    outcome = distill("run", *SIX, "training.faults={skip: 1, rollbacks: 2}")
    assert_refused(
        outcome,
        "distill: the loss is nan at step 5; gone back 2x before, earlier checkpoints are kept"
        " (lower training.optimizer.lr or method.alpha, or --resume with other training.faults)",
    )
    assert outcome.err.count("back to step 2, on at") == 2
    assert "back to step 2, on at 0.25 of the learning rate" in outcome.err
    assert not (tmp_path / "run" / "student").exists()
    assert left_out(tmp_path / "run") == [0, 0, 0, 1]
    inject()
    assert distill("run", "--resume", *SIX, "training.faults.skip=2").code == 0
    assert left_out(tmp_path / "run") == [0, 0, 0, 1, 0, 0]


def test_limit_over_the_whole_run_and_on_the_gradient(
    distill: Distill, inject: Callable[[], Injector], tmp_path: Path
) -> None:
    inject().at([2, 4], nan_loss, above=0.9 * LR)
    assert distill("total", *SIX, "training.faults={skip: 1, skip_total: 1, lower: 0.1}").code == 0
    assert left_out(tmp_path / "total") == [0, 1, 0, 0, 0, 0]
    assert [row.get("lr") for row in rows(tmp_path / "total")] == pytest.approx([LR, None, *[LR / 10] * 4])
    inject()
    outcome = distill("norm", "training.steps=1", "training.faults={skip: 0, max_norm: 1.0e-9}")
    assert_refused(outcome, "training.faults.max_norm 1e-09 at step 1; no checkpoint to go back to")


def test_request_to_stop_survives_going_back(distill: Distill, inject: Callable[[], Injector], tmp_path: Path) -> None:
    faulty = inject()
    faulty.at([4], nan_loss, above=0.9 * LR)
    faulty.at_call(4, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    outcome = distill("run", *SIX, "training.faults.skip=0")
    assert outcome.code != 0
    assert "stopped before step 3; --resume goes on from there" in outcome.err
    assert [row["lr"] for row in rows(tmp_path / "run")] == [LR, LR]


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_clock_that_jumps_changes_nothing(
    distill: Distill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    assert distill("whole", "training.checkpoint_every=1").code == 0
    ticks, now = itertools.count(), time.time
    monkeypatch.setattr(time, "time", lambda: now() + jump * next(ticks))
    assert distill("run", "training.checkpoint_every=1", "training.steps=1").code == 0
    for path in sorted((tmp_path / "run").rglob("*")):  # the newest is not found by its date
        os.utime(path, (now() - jump, now() - jump))
    assert distill("run", "--resume", "training.checkpoint_every=1").code == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
