"""`distill` on the tiny pipeline: what it writes, refuses and goes on with."""

from __future__ import annotations

import json
import os
import platform
import signal
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outcomes import names, refused
from torch import Tensor

from rats_video.files import locked
from rats_video.methods.rats import Rats, rats_step
from rats_video.training.metrics import read_metrics
from rats_video.types import PromptBatch

Command = Callable[..., Any]


@pytest.fixture
def distill(command: Command, config_file: Path, tmp_path: Path) -> Command:
    """`distill` of the 5-frame smoke configuration into `tmp_path/run`."""

    def call(*arguments: str, **changes: object) -> Any:
        overrides = [part for key, value in changes.items() for part in ("--set", f"training.{key}={value}")]
        return command("distill", "--config", config_file, "--output", tmp_path / "run", *overrides, *arguments)

    return call


def metrics_steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.whole_run
def test_distill_writes_a_student(distill: Command, tmp_path: Path) -> None:
    code, out, _ = distill("--seed", "9")
    assert code == 0
    assert out.splitlines() == [
        f"student: {tmp_path / 'run' / 'student'}", f"training figure: {tmp_path / 'run' / 'training.png'}"
    ]  # fmt: skip
    assert names(tmp_path / "run") == [
        "checkpoints", "config.resolved.yaml", "environment.json", "metrics.jsonl", "plan.json", "student",
        "training.png",
    ]  # fmt: skip
    assert json.loads((tmp_path / "run" / "student" / "rats.json").read_text())["seed"] == 9


def test_folder_that_holds_something_is_refused_untouched(distill: Command, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("do not lose")
    refused(distill(), f"{tmp_path / 'run'}: already exists and is not empty (add --overwrite or another --output)")
    refused(distill("--resume"), f"{tmp_path / 'run'}: not a run: it has no config.resolved.yaml")
    assert (tmp_path / "run" / "thesis.txt").read_text() == "do not lose"
    assert names(tmp_path / "run") == ["thesis.txt"]


def test_overwrite_starts_anew(distill: Command, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "old").write_text("")
    assert distill("--overwrite", steps=1).code == 0
    assert "old" not in names(tmp_path / "run")
    assert metrics_steps(tmp_path / "run") == [1]


def test_output_that_is_a_file(distill: Command, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    refused(distill(), str(tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "a file"
    refused(distill("--overwrite"), str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("model=nowhere", "model: no such folder: nowhere"),
        ("reward.path=nowhere", "reward.path: no such folder: nowhere"),
        ("heldout_reward.path=nowhere", "heldout_reward.path: no such folder: nowhere"),
        ("clip.num_frames=6", "clip.num_frames: must be 1 + a multiple of 4, got 6"),
        ("clip.height=40", "clip.height: must be a multiple of 16, got 40"),
        ("teacher.num_steps=3", "teacher.num_steps: 3 is fewer than the student's 4"),
        ("method.shaping.horizon_weights=[1,2]", "method.shaping.horizon_weights: needs 4 weights that are not all 0"),
        ("method.shaping.horizon_weights=[0,0,0,0]", "method.shaping.horizon_weights: needs 4 weights"),
        ("method.alpa=1", "method.alpa"),
        ("prompts={kind: file, train: nowhere.txt, heldout: b.txt}", "nowhere.txt: cannot read it"),
    ],
)
def test_bad_configuration_is_one_line_before_anything_is_made(
    distill: Command, tmp_path: Path, change: str, expected: str
) -> None:
    refused(distill("--set", change), expected)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("train", "heldout", "expected"),
    [
        ("a red zebra", "a red circle", "train.txt, line 1: this model does not know 'zebra' in 'a red zebra'"),
        ("a red circle", "a red zebra", "heldout.txt, line 1: this model does not know 'zebra' in 'a red zebra'"),
        ("moving on a background", "a red circle", "the reward knows no word of 'moving on a background'"),
        ("a red circle", "moving on a background", "the reward knows no word of 'moving on a background'"),
    ],
)
def test_prompts_that_model_or_reward_cannot_follow(
    distill: Command, tmp_path: Path, train: str, heldout: str, expected: str
) -> None:
    (tmp_path / "train.txt").write_text(train)
    (tmp_path / "heldout.txt").write_text(heldout)
    files = f"prompts={{kind: file, train: {tmp_path / 'train.txt'}, heldout: {tmp_path / 'heldout.txt'}}}"
    refused(distill("--set", files), expected)
    assert not (tmp_path / "run").exists()


def at_step(number: int, act: Callable[[dict[str, float]], None]) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """`rats_step` that does something at one batch of the run."""

    def step(rats: Rats, batch: PromptBatch) -> tuple[Tensor, dict[str, float]]:
        loss, row = rats_step(rats, batch)
        if batch.index == number - 1:
            act(row)
        return loss, row

    return step


def test_loss_that_stays_not_finite_is_one_line_and_keeps_the_checkpoint(
    distill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("rats_video.methods.rats.rats_step", at_step(3, lambda row: row.update(loss=float("nan"))))
        outcome = distill("--set", "training.faults={skip: 0, rollbacks: 0}", steps=4, checkpoint_every=1)
    refused(
        outcome,
        "distill: the loss is nan at step 3; gone back 0x before, earlier checkpoints are kept (lower training.op",
    )
    assert names(tmp_path / "run" / "checkpoints") == ["step-000001", "step-000002"]
    assert "student" not in names(tmp_path / "run")
    assert distill("--resume", steps=4, checkpoint_every=1).code == 0
    assert metrics_steps(tmp_path / "run") == [1, 2, 3, 4]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_ctrl_c_saves_and_says_how_to_go_on(
    distill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("rats_video.methods.rats.rats_step", at_step(2, lambda _: os.kill(os.getpid(), number)))
        outcome = distill(steps=4)
    assert outcome.code == code
    assert outcome.err.splitlines()[-1].startswith("stopped after step 2, which is saved")
    assert "--resume" in outcome.err
    assert "Traceback" not in outcome.err
    assert names(tmp_path / "run" / "checkpoints") == ["step-000002"]
    refused(distill(steps=4), "holds a run (--resume goes on with it, --overwrite replaces it)")
    assert distill("--resume", steps=4).code == 0
    assert metrics_steps(tmp_path / "run") == [1, 2, 3, 4]
    assert json.loads((tmp_path / "run" / "student" / "rats.json").read_text())["steps"] == 4
    sessions = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert ["--resume" in session["command"] for session in sessions] == [False, True]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("commands.train_student.build_backbone", "stopped by SIGUSR1; nothing that was saved is lost"),
        ("training.guard.Guard.evaluate", "stopped before step 1; --resume goes on from there"),
        ("commands.distill.finish", "stopped by SIGUSR1; nothing that was saved is lost"),
    ],
)
def test_request_to_end_outside_the_steps(
    distill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, expected: str
) -> None:
    def asked(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    guarded = ("--set", "guard={every: 2, num_clips: 2}")
    with monkeypatch.context() as patch:
        patch.setattr(f"rats_video.{where}", asked)
        outcome = distill(*guarded)
    assert outcome.code == 75
    assert outcome.err.splitlines()[-1] == expected
    begun = (tmp_path / "run" / "config.resolved.yaml").is_file()
    assert distill(*guarded, *(["--resume"] if begun else [])).code == 0
    assert metrics_steps(tmp_path / "run") == [1, 2]


def test_two_runs_in_one_folder(distill: Command, tmp_path: Path) -> None:
    assert distill(steps=1).code == 0
    with locked(tmp_path / "run"):
        for option in ("--resume", "--overwrite"):
            refused(distill(option), f"{tmp_path / 'run'}: process {os.getpid()} on {platform.node()} is working in it")
    assert distill("--resume", steps=1).code == 0
    assert ".lock" not in names(tmp_path / "run")


@pytest.mark.parametrize(
    "called",
    ["distill", "run", "train vae", "train teacher", "train teacher --data d", "train paths", "train reward",
     "train reward --latent", "train reward --data d"],
)  # fmt: skip
def test_resume_without_a_run_starts_none(command: Command, tmp_path: Path, called: str) -> None:
    outcome = command(*called.split(), "--output", tmp_path / "tiny", "--resume")
    refused(outcome, f"error: {tmp_path / 'tiny'}: no run to go on with (leave --resume out to start one)")
    assert names(tmp_path) == []


def test_resume_names_the_run_that_was_meant(command: Command, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    (run / "student").mkdir(parents=True)
    (run / "student" / "rats.json").touch()
    (run / "config.resolved.yaml").touch()
    (tmp_path / "empty").mkdir()
    meant = f"runs near it: {run}"
    for name, expected in {
        "tny": f"no run to go on with ({meant}; leave --resume out to start one)",
        "empty": f"no run to go on with ({meant}; leave --resume out to start one)",
        "tiny/student": f"not a run: it has no config.resolved.yaml ({meant}; check --output)",
        ".": f"not a run: it has no config.resolved.yaml ({meant}; check --output)",
        "tiny/student/rats.json": "is a file (give another --output)",
    }.items():
        folder = Path(os.path.normpath(tmp_path / name))
        refused(command("distill", "--output", folder, "--resume"), f"error: {folder}: {expected}")


@pytest.mark.parametrize("restarts", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_a_job_that_was_lost_before_it_had_a_run_starts_it_when_restarted(
    distill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: str
) -> None:
    monkeypatch.setenv(restarts, "1")
    assert distill("--resume", steps=1).code == 0
    assert metrics_steps(tmp_path / "run") == [1]


def test_damaged_checkpoint_gives_way_to_the_one_before(distill: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert distill(steps=3, checkpoint_every=1).code == 0
    students = sorted(run.glob("checkpoints/*/student.safetensors"))
    written = [path.read_bytes() for path in students]
    metrics = [row | {"seconds": 0} for row in read_metrics(run / "metrics.jsonl")]
    students[1].write_bytes(written[1][:-8] + b"not this")
    outcome = distill("--resume", steps=3, checkpoint_every=1)
    assert outcome.code == 0
    damaged = f"warning: {students[1].parent}: damaged, the one before it is taken: student.safetensors is not what"
    assert damaged in outcome.err
    assert [path.read_bytes() for path in students] == written
    assert [row | {"seconds": 0} for row in read_metrics(run / "metrics.jsonl")] == metrics
    for path in students:
        path.unlink()
    refused(distill("--resume", steps=3), f"{run / 'checkpoints'}: all checkpoints are damaged (start anew with --over")


def test_what_a_killed_run_left_is_tidied_up(distill: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert distill(steps=1).code == 0
    unique = uuid.uuid4().hex
    (run / "student").rename(run / f".{unique}.old.student")  # as if killed between the two renames
    (run / "checkpoints" / f".{unique}.partial.step-000002").mkdir()
    for name in ("metrics.jsonl", "thesis.txt"):  # the last one is none of the run's
        (run / f".{unique}.partial.{name}").touch()
    (run / ".lock").write_text("process 1 on a machine that is no more")
    assert distill("--resume", steps=1).code == 0
    assert [name for name in names(run) if name.startswith(".")] == [f".{unique}.partial.thesis.txt"]
    assert names(run / "checkpoints") == ["step-000001"]
    assert names(run / "student") == ["rats.json", "transformer"]


def test_stored_rollouts_are_shared_by_runs(distill: Command, tmp_path: Path, calls: list[int]) -> None:
    cache = ("--set", f"teacher.cache={tmp_path / 'cache'}")
    assert distill(*cache).code == 0
    first = sum(calls)
    calls.clear()
    assert distill(*cache, "--overwrite", "--set", "method.alpha=7").code == 0
    assert first - sum(calls) == 2 * 2 * 16  # steps x clips x the teacher's NFE
    calls.clear()
    assert distill(*cache, "--overwrite", "--set", "teacher.guidance_scale=3").code == 0
    assert sum(calls) == first
