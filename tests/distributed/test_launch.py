"""`--gpus` and `--nodes`: the same files and words as one process, mistakes in one line, and an orderly stop."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import command_line
from safetensors.torch import load_file

from rats_video.cli import launch
from rats_video.errors import Interrupted, UserError
from rats_video.inference.video import read_mp4
from rats_video.training.metrics import read_metrics

pytestmark = pytest.mark.slow

Command = Callable[..., Any]
TWO = ("--device", "cpu", "--gpus", "2")
ODD = (  # which two cannot share evenly; latencies differ from run to run
    "--set", "comparison.num_videos=3", "--set", "evaluation.num_clips=3", "--set", "evaluation.latency_clips=0",
)  # fmt: skip


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)  # of two busy cores
    return process.returncode, out, err


@pytest.fixture(scope="module")
def alone(command: Command, config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("alone") / "run"
    outcome = command("run", "--config", config_file, "--output", folder, "--device", "cpu", *ODD)
    assert outcome.code == 0, outcome.err
    return folder, outcome.out


@pytest.fixture(scope="module")
def launched(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and words of a `run` on two processes: new ones, not forks."""
    folder = tmp_path_factory.mktemp("launched") / "run"
    line = ["run", "--config", config_file, "--output", folder, *TWO, *ODD]
    command = [sys.executable, "-m", "rats_video.cli", *map(str, line)]
    code, out, err = end(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    assert code == 0, err
    return folder, out


@pytest.fixture(scope="module")
def refused(launched: tuple[Path, str], config_file: Path) -> tuple[int, str, str]:
    """How a mistake that each process finds ends, where a lost process would be restarted."""
    return end(command_line("distill", "--config", config_file, "--output", launched[0], *TWO, "--restarts", 1, *ODD))


def without_seconds(text: str, folder: Path) -> str:
    return re.sub(r"\d+\.\d+ s|\d+\.\d+ ?\||about \d+:\d+ left", "", text.replace(str(folder), "RUN"))


def test_says_and_writes_what_one_process_does(alone: tuple[Path, str], launched: tuple[Path, str]) -> None:
    (one, said_alone), (two, said) = alone, launched
    assert without_seconds(said, two) == without_seconds(said_alone, one)
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (one, two)]
    assert names[0] == names[1]
    assert sum(name.endswith(".mp4") for name in names[0]) == 6
    student, expected = (
        load_file(run / "student" / "transformer" / "diffusion_pytorch_model.safetensors") for run in (two, one)
    )
    for name, tensor in student.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=3e-6)


def test_every_clip_is_the_same(alone: tuple[Path, str], launched: tuple[Path, str]) -> None:
    (one, _), (two, _) = alone, launched
    manifests = [json.loads((run / "samples" / "manifest.json").read_text()) for run in (one, two)]
    ours, theirs = ([{**row, "seconds": 0, "student": ""} for row in rows] for rows in manifests)
    assert ours == theirs  # but for the students' digests: they differ by rounding
    assert [row["index"] for row in manifests[1]] == [0, 1, 2]
    for row in manifests[0]:
        clips = [read_mp4(run / "samples" / row["file"])[0] for run in (one, two)]
        assert (clips[0] - clips[1]).abs().mean() < 0.03  # one rounded pixel, and x264 decides otherwise


def test_every_score_is_the_same(alone: tuple[Path, str], launched: tuple[Path, str]) -> None:
    (one, _), (two, _) = alone, launched
    for file in ("evaluation/evaluation.json", "comparison/index.json"):
        ours, theirs = (flat(json.loads((run / file).read_text())) for run in (two, one))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if "seconds" not in key:
                assert ours[key] == (pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value)


def flat(tree: Any, key: str = "") -> dict[str, Any]:
    """Leaves by their path."""
    if not isinstance(tree, dict | list):
        return {key: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {leaf: value for name, below in items for leaf, value in flat(below, f"{key}.{name}").items()}


def test_mistake_that_one_process_finds_is_one_line(launched: tuple[Path, str], refused: tuple[int, str, str]) -> None:
    folder, _ = launched
    code, out, err = refused
    assert (code, out) == (2, "")
    assert err == f"error: {folder}: holds a run (--resume goes on with it, --overwrite replaces it)\n"


def test_signal_to_the_launcher_saves(alone: tuple[Path, str], config_file: Path, tmp_path: Path) -> None:
    many = ("--set", "training.steps=5000", "--set", "training.checkpoint_every=5000")
    shared = ("--device", "cpu", "--gpus", 3, "--set", "parallel.reward_ranks=1")  # two trainers on one reward rank
    process = command_line("distill", "--config", config_file, "--output", tmp_path / "run", *shared, *many)
    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(3000):
        if metrics.is_file() and metrics.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    code, _, err = end(process)
    assert code == 75
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    steps = int(saved.name.removeprefix("step-"))
    assert err.splitlines()[-1] == f"stopped after step {steps}, which is saved; --resume goes on from there"
    assert "Traceback" not in err
    first, *others = read_metrics(metrics)
    assert len(others) == steps - 1
    expected = read_metrics(alone[0] / "metrics.jsonl")[0]
    assert {**first, "seconds": 0} == pytest.approx({**expected, "seconds": 0}, rel=1e-5, abs=1e-6)


def test_lost_process_is_restarted_and_a_mistake_is_not(
    config_file: Path, refused: tuple[int, str, str], tmp_path: Path
) -> None:
    steps = ("--set", "training.steps=12", "--set", "training.checkpoint_every=1")
    run = tmp_path / "run"
    process = command_line("distill", "--config", config_file, "--output", run, *TWO, "--restarts", 1, *steps)
    for _ in range(6000):
        if len(list(run.glob("checkpoints/step-*"))) > 1:
            break
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    code, _, err = end(process)
    assert code == 0, err
    assert "warning: a process was lost: going on from the last checkpoint, restart 1 of 1" in err
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [*range(1, 13)]
    assert len(json.loads((run / "environment.json").read_text())) == 2
    code, _, err = refused
    assert code == 2
    assert "a process was lost" not in err


def test_two_machines(alone: tuple[Path, str], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        meeting = f"localhost:{probe.getsockname()[1]}"
    manifest = json.loads((alone[0] / "samples" / "manifest.json").read_text())
    prompts = [part for row in manifest for part in ("--prompt", row["prompt"])]
    options = ("--output", tmp_path, *prompts, "--device", "cpu", "--nodes", 2, "--rendezvous", meeting)
    machines = [command_line("sample", "--model", alone[0], *options, "--node-rank", rank) for rank in (0, 1)]
    (code, said, err), other = (end(machine) for machine in machines)
    assert code == 0, err
    assert said.startswith("3 clips at 4 NFE")
    assert other[:2] == (0, "")
    rows = json.loads((tmp_path / "manifest.json").read_text())
    assert [row["file"] for row in rows] == sorted(path.name for path in tmp_path.glob("*.mp4"))
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in manifest]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--gpus", "2"), "error: --gpus: 2 processes need 2 GPUs, 1 seen (start fewer, or use --device cpu)"),
        (("--gpus", "2", "--device", "cuda:0"), "error: --device: cuda:0 is one GPU for 2 processes (use cuda or cpu)"),
        (
            ("--nodes", "2"),
            "--rendezvous: 2 nodes must know where to meet, got nothing (give HOST:PORT of one of them, the same",
        ),
        (("--nodes", "2", "--rendezvous", "host"), "got host (give HOST:PORT of one of them, the same on all)"),
        (("--gpus", "0"), "--gpus"),
        (("--node-rank", "1"), "--node-rank: 1 is none of the 1 machines, which count from 0 (check --nodes)"),
        (
            ("--nodes", "2", "--rendezvous", "host:1", "--node-rank", "2"),
            "--node-rank: 2 is none of the 2 machines, which count from 0 (check --nodes)",
        ),
    ],
)
def test_what_cannot_be_launched_is_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    outcome = command("distill", *arguments)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert expected in line
    assert "RATS_VIDEO_ENDINGS" not in os.environ


def test_of_several_endings_the_mistake_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def left(rank: int, code: int, text: str) -> None:
        (tmp_path / f"{rank}.ending").write_text(json.dumps({"text": text, "code": code, "time": rank}))

    with pytest.raises(UserError, match=r"^process 1 was lost$"):
        launch._end(tmp_path, "process 1 was lost", 2)
    left(0, 130, "stopped after step 2")
    with pytest.raises(Interrupted, match=r"^stopped after step 2$"):
        launch._end(tmp_path, "interrupted", 130)
    left(0, 75, "stopped after step 2")
    with pytest.raises(Interrupted, match=r"^stopped after step 2$") as caught:
        launch._end(tmp_path, "stopped by SIGUSR1", 75)
    assert caught.value.code == 75
    with pytest.raises(UserError, match=r"^process 1 was lost$"):  # and the launcher stopped the other
        launch._end(tmp_path, "process 1 was lost", 2, was_lost=True)
    left(1, 1, "Traceback: first\n")
    left(2, 1, "Traceback: second\n")
    with pytest.raises(SystemExit, match="1"):
        launch._end(tmp_path, "process 1 was lost", 2)
    assert capsys.readouterr().err == "Traceback: first\n"
    left(3, 2, "no such folder")
    with pytest.raises(UserError, match=r"^no such folder$"):
        launch._end(tmp_path, "process 1 was lost", 2)


def test_only_the_first_process_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with launch.RankZeroOutput(()):
            sys.stdout.write("done\n")
            sys.stderr.write("a warning\n")
    assert capsys.readouterr() == ("done\n", "a warning\n")


def test_a_bug_is_left_to_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("RATS_VIDEO_ENDINGS", str(tmp_path))
    with pytest.raises(SystemExit), launch.RankZeroOutput((UserError,)):
        raise ZeroDivisionError("a bug")
    ending = json.loads((tmp_path / "1.ending").read_text())
    assert ending["code"] == 1
    assert ending["text"].startswith("Traceback")
    assert ending["text"].endswith("ZeroDivisionError: a bug\n")
    with pytest.raises(UserError), launch.RankZeroOutput((UserError,)):
        raise UserError("a mistake")
