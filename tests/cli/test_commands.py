"""The commands end to end on the tiny pipeline: what they write, what they refuse and how they say it."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import shutil
import signal
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import WanTransformer3DModel
from torch import Tensor

from rats_video.files import locked
from rats_video.inference.video import read_mp4
from rats_video.methods.rats import Rats, rats_step
from rats_video.runtime import Runtime
from rats_video.training.metrics import read_metrics
from rats_video.types import PromptBatch

PROMPT = "a fast red circle moving left on a gray background"
Command = Callable[..., Any]


@pytest.fixture(scope="module")
def sets(tiny_wan: Path, reward_folders: tuple[Path, Path]) -> list[str]:
    """`--set` options that shrink the packaged `tiny` to a smoke test, at 17 frames as shipped."""
    changes = {
        "model": tiny_wan,
        "reward.path": reward_folders[0],
        "heldout_reward.path": reward_folders[1],
        "clip.height": 32,
        "clip.width": 32,
        "training.steps": 2,
        "training.batch_size": 2,
        "training.optimizer.decay": "false",
        "teacher.num_steps": 8,
        "comparison.num_videos": 1,
        "evaluation.nfe": "[4]",
        "evaluation.num_clips": 4,
        "evaluation.teacher_steps": 4,
    }
    return [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def finished(command: Command, sets: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished `run`."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    code, out, err = command("run", "--config", "tiny", "--output", folder, *sets)
    assert code == 0, err
    assert f"Look first at {folder / 'comparison'}" in out
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Clips in each call of any denoiser."""
    rows: list[int] = []
    forward = WanTransformer3DModel.forward

    @functools.wraps(forward)
    def counting(self: Any, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
        rows.append(len(hidden_states))
        return forward(self, hidden_states, *arguments, **options)

    monkeypatch.setattr(WanTransformer3DModel, "forward", counting)
    return rows


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file's time and content."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(outcome: Any, expected: str) -> None:
    """Exit code 2 and one line; what the libraries say of loading is looked at once, below."""
    assert outcome.code == 2, outcome
    assert outcome.out in {"", "1/4 distill\n"}
    assert "Traceback" not in outcome.err
    *_, last = outcome.err.splitlines()
    assert last.startswith("error: ")
    assert outcome.err.count("error: ") == 1
    assert expected in last


# ------------------------------------------------------------------------------------------------------------- run


def test_run_writes_everything(finished: Path) -> None:
    assert names(finished) == [
        "best", "checkpoints", "comparison", "config.resolved.yaml", "environment.json", "evaluation", "guard.json",
        "guard.png", "metrics.jsonl", "plan.json", "samples", "student", "training.png",
    ]  # fmt: skip
    assert names(finished / "student") == ["rats.json", "transformer"]
    assert names(finished / "evaluation") == ["evaluation.json", "evaluation.md", "nfe.png", "reference.safetensors"]
    assert names(finished / "checkpoints") == ["step-000002"]
    (clip,) = (finished / "samples").glob("*.mp4")
    (pair,) = (finished / "comparison").glob("*.mp4")
    assert read_mp4(clip)[0].shape == (17, 3, 32, 32)
    assert len(read_mp4(pair)[0]) == 17
    assert (finished / "training.png").read_bytes()[:4] == b"\x89PNG"


def test_run_records_what_it_did(finished: Path) -> None:
    config = yaml.safe_load((finished / "config.resolved.yaml").read_text())
    assert config["training"]["steps"] == 2
    assert config["shift"] == 3.0
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["seconds"] > 0 and row["reward/teacher"] < 0 for row in rows)
    card = json.loads((finished / "student" / "rats.json").read_text())
    assert (card["num_steps"], card["steps"], card["seed"]) == ([4], 2, 0)
    (session,) = json.loads((finished / "environment.json").read_text())
    assert session["torch"] == torch.__version__
    assert session["command"].startswith("rats-video run ")
    assert session["seeds"] == {"training": 0, "guard": 2**20}
    assert session["host"] == platform.node()
    assert re.fullmatch(r"git [0-9a-f]{40}(-dirty)?|rats-video .*", session["code"])


def test_second_run_skips_what_is_done(command: Command, sets: list[str], finished: Path, calls: list[int]) -> None:
    before = snapshot(finished)
    code, out, _ = command("run", "--config", "tiny", "--output", finished, *sets)
    assert code == 0
    assert out.count("done before") == 4
    assert calls == []
    after = snapshot(finished)
    del before["config.resolved.yaml"], after["config.resolved.yaml"]  # written anew, the same
    assert after == before


def test_overwrite_asks_nothing_of_what_it_replaces(command: Command, sets: list[str], tmp_path: Path) -> None:
    (tmp_path / "run" / "student").mkdir(parents=True)
    (tmp_path / "run" / "config.resolved.yaml").write_text("from: another version")
    (tmp_path / "run" / "student" / "rats.json").write_text("{")
    outcome = command("run", "--overwrite", "--output", tmp_path / "run", *sets, "--set", "reward.path=nowhere")
    refused(outcome, "reward.path: no such folder: nowhere")


def test_reward_rank_of_a_finished_run_leaves(
    command: Command, sets: list[str], finished: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = Runtime(torch.device("cpu"), rank=1, reward_ranks=1)
    monkeypatch.setattr("rats_video.commands.distill.start_runtime", lambda *_: rank)
    before = snapshot(finished)
    (finished / "samples" / "manifest.json").unlink()  # for the trainers to make
    code, out, err = command("run", "--config", "tiny", "--output", finished, *sets)
    assert (code, out, err) == (0, f"1/4 distill\n    done before: {finished / 'student'}\n", "")
    assert calls == []
    (finished / "samples" / "manifest.json").write_bytes(before["samples/manifest.json"][1])
    assert {name: content for name, (_, content) in snapshot(finished).items()} == {
        name: content for name, (_, content) in before.items()
    }


def test_run_of_another_configuration_is_refused(command: Command, sets: list[str], finished: Path) -> None:
    before = snapshot(finished)
    outcome = command("run", "--config", "tiny", "--output", finished, *sets, "--set", "method.alpha=7")
    refused(outcome, f"{finished}: holds a run of another configuration: method.alpha differ")
    assert snapshot(finished) == before


def test_run_with_more_steps_trains_them(command: Command, sets: list[str], finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    more = ["--set", "training.steps=3"]
    code, out, err = command("run", "--config", "tiny", "--output", tmp_path / "run", *sets, *more)
    assert code == 0, err
    assert "done before" not in out  # what was made with the old student is old
    assert json.loads((tmp_path / "run" / "student" / "rats.json").read_text())["steps"] == 3


def test_run_with_another_evaluation_evaluates_anew(
    command: Command, sets: list[str], finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    changed = ["--set", "evaluation.num_clips=2"]
    code, out, err = command("run", "--config", "tiny", "--output", tmp_path / "run", *sets, *changed)
    assert code == 0, err
    assert "2 held-out clips an arm" in out


def test_run_finds_a_bad_heldout_reward_before_it_trains(command: Command, sets: list[str], tmp_path: Path) -> None:
    outcome = command("run", "--output", tmp_path / "run", *sets, "--set", "heldout_reward.path=nowhere")
    refused(outcome, "heldout_reward.path: no such folder: nowhere")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------- sample


def test_sample_is_exactly_four_calls_a_clip(
    command: Command, finished: Path, tmp_path: Path, calls: list[int]
) -> None:
    prompts = ["--prompt", PROMPT, "--prompt", "a slow blue square moving up on a white background"]
    code, out, err = command("sample", "--model", finished, "--nfe", 4, *prompts, "--output", tmp_path / "s")
    assert code == 0
    assert calls == [2, 2, 2, 2]
    assert out.startswith("2 clips at 4 NFE")
    assert "warning" not in err
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert [row["nfe"] for row in manifest] == [4, 4]
    for row in manifest:
        frames, fps = read_mp4(tmp_path / "s" / row["file"])
        assert frames.shape == (17, 3, 32, 32)
        assert fps == 8.0
    assert names(tmp_path / "s") == sorted([*(row["file"] for row in manifest), "manifest.json"])


def test_untrained_nfe_warns_but_works(command: Command, finished: Path, tmp_path: Path, calls: list[int]) -> None:
    student = finished / "student"  # the student's own folder does as well
    code, _, err = command("sample", "--model", student, "--nfe", 3, "--prompt", PROMPT, "--output", tmp_path)
    assert code == 0
    assert "warning: --nfe 3: this student was trained for 4; quality may drop" in err
    assert calls == [1, 1, 1]


def test_prompts_from_a_file_are_taken_in_turn(command: Command, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n\na red circle\n")
    options = ["--prompts", tmp_path / "prompts.txt", "--num-videos", 3, "--output", tmp_path / "s"]
    assert command("sample", "--model", finished, *options).code == 0
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert [row["prompt"] for row in manifest] == [PROMPT, "a red circle", PROMPT]
    first, second, third = (read_mp4(tmp_path / "s" / row["file"])[0] for row in manifest)
    assert not torch.equal(first, third)  # the same prompt from other noise
    assert not torch.equal(first, second)


def test_seed_repeats(command: Command, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips: list[Tensor] = []  # not the files: x264 itself, given equal frames, writes other bytes one time in forty
    monkeypatch.setattr("rats_video.commands.sample.write_mp4", lambda frames, *_, **__: clips.append(frames))
    for folder, seed in (("one", 1), ("again", 1), ("other", 2)):
        options = ["--prompt", PROMPT, "--seed", seed, "--output", tmp_path / folder]
        assert command("sample", "--model", finished, *options).code == 0
    one, again, other = clips
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--prompt", ""], "--prompt: the prompt is empty (say what to draw)"),
        (["--prompt", "a zebra on mars"], "--prompt: this model does not know 'zebra', 'mars' in 'a zebra on mars'"),
        (["--prompt", PROMPT, "--nfe", "0"], "'--nfe'"),
        (["--prompt", PROMPT, "--num-videos", "0"], "'--num-videos'"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: cannot read the prompts: No such file or directory"),
        (["--prompt", PROMPT, "--device", "cuda:99"], "--device: cuda:99 is not here"),
        (["--prompt", PROMPT, "--model", "nowhere"], "nowhere/student: no student here (rats.json is missing"),
        (["--prompt", PROMPT, "--output", "taken"], "taken"),
        (["--prompt", PROMPT, "--output", "taken/below"], "taken/below"),
    ],
)
def test_bad_sample_is_one_line(
    command: Command, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file")
    model = [] if "--model" in options else ["--model", finished]
    output = [] if "--output" in options else ["--output", "new"]
    refused(command("sample", *model, *output, *options), expected)
    assert names(tmp_path) == ["taken"]


def test_student_of_a_model_that_is_gone(command: Command, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "student", tmp_path / "student")
    card = tmp_path / "student" / "rats.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"model": "/gone"}))
    outcome = command("sample", "--model", tmp_path / "student", "--prompt", PROMPT, "--output", tmp_path / "s")
    refused(outcome, f"{card}: model: no such folder: /gone")


def test_the_error_is_all_that_is_said(
    command: Command, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcome = command("sample", "--model", finished, "--prompt", "a zebra", "--output", tmp_path)
    assert outcome.err.count("\n") == 1  # no progress bars of the loaders
    assert caplog.records == []  # no warnings of theirs


# ----------------------------------------------------------------------------------------------- export and evaluate


def test_export_comparison(command: Command, finished: Path, tmp_path: Path, calls: list[int]) -> None:
    options = ["--prompt", PROMPT, "--nfe", 2, "--seed", 3, "--output", tmp_path / "c"]
    code, _, err = command("export", "comparison", finished, *options)
    assert code == 0, err
    assert calls == [2] * 4 + [1] * 2 + [1] * 2  # teacher with guidance, base, student
    (index,) = json.loads((tmp_path / "c" / "index.json").read_text())
    assert index["prompt"] == PROMPT
    assert list(index["reward"]) == ["teacher", "base", "student"]
    frames, fps = read_mp4(tmp_path / "c" / index["file"])
    assert len(frames) == 17
    assert fps == 8.0
    assert frames.shape[3] > 3 * frames.shape[2] / 2  # three panels beside one another


def test_evaluate(command: Command, finished: Path, tmp_path: Path, calls: list[int]) -> None:
    options = ["--nfe", "2,4", "--num-clips", 3, "--output", tmp_path / "e"]
    code, out, err = command("evaluate", finished, *options)
    assert code == 0, err
    rows = json.loads((tmp_path / "e" / "evaluation.json").read_text())["rows"]
    found = [(row["arm"], row["num_steps"], row["nfe"], row["num_clips"]) for row in rows]
    assert found == [
        ("teacher", 4, 8, 3), ("base", 2, 2, 3), ("base", 4, 4, 3), ("student", 2, 2, 3), ("student", 4, 4, 3)
    ]  # fmt: skip
    # Three clips, one more of each for diversity, three alone for latency, each arm warmed up with a step.
    assert sum(calls) == (3 + 3 + 3) * (8 + 2 + 4 + 2 + 4) + (2 + 1 + 1 + 1 + 1)
    assert {"fvd", "kvd", "diversity_share", "pixel_diversity_share", "saturation"} <= set(rows[-1]["metrics"])
    assert all(0 < row["latency"]["denoiser"] < row["latency"]["seconds"] for row in rows)
    assert {"reward", "heldout_reward", "adherence", "smoothness", "constancy"} <= set(rows[0]["metrics"])
    assert all(row["metrics"]["reward"]["mean"] < 0 for row in rows)
    assert out.count("| student") == 3 * 2  # rewards, beside them, latency
    assert "12 rendered clips of the held-out prompts" in out
    assert names(tmp_path / "e") == ["evaluation.json", "evaluation.md", "nfe.png", "reference.safetensors"]


def test_evaluate_as_the_run_was(command: Command, finished: Path, tmp_path: Path) -> None:
    code, _, err = command("evaluate", finished, "--output", tmp_path / "e")
    assert code == 0, err
    files = [run / "evaluation.json" for run in (tmp_path / "e", finished / "evaluation")]
    timed = {"seconds_per_clip": 0, "latency": None}
    again, before = ([{**row, **timed} for row in json.loads(file.read_text())["rows"]] for file in files)
    assert again == before


@pytest.mark.parametrize("name", [["export", "comparison"], ["evaluate"]])
def test_folder_that_is_no_run(command: Command, finished: Path, tmp_path: Path, name: list[str]) -> None:
    refused(command(*name, tmp_path), f"{tmp_path}: not a run: it has no config.resolved.yaml")
    (tmp_path / "config.resolved.yaml").write_bytes((finished / "config.resolved.yaml").read_bytes())
    refused(command(*name, tmp_path), "no student here (rats.json is missing")
    (tmp_path / "file").write_text("")
    few = ["--num-clips", 1] if name == ["evaluate"] else []
    refused(command(*name, finished, *few, "--nfe", 1, "--output", tmp_path / "file"), str(tmp_path / "file"))


# --------------------------------------------------------------------------------------------------------- distill


@pytest.fixture
def distill(command: Command, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`distill` of the 5-frame smoke configuration into `tmp_path/run`, without the time that the figure takes."""
    monkeypatch.setattr("rats_video.commands.finish.plot_training", lambda _, path: path.touch())

    def call(*arguments: str, **changes: object) -> Any:
        overrides = [part for key, value in changes.items() for part in ("--set", f"training.{key}={value}")]
        return command("distill", "--config", config_file, "--output", tmp_path / "run", *overrides, *arguments)

    return call


def metrics_steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


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


def test_finished_run_is_refused_untouched(command: Command, sets: list[str], finished: Path) -> None:
    before = snapshot(finished)
    refused(
        command("distill", "--output", finished, *sets),
        f"{finished}: holds a run (--resume goes on with it, --overwrite replaces it)",
    )
    changed = ["--resume", "--seed", "3", "--set", "method.alpha=7"]
    outcome = command("distill", "--output", finished, *sets, *changed)
    refused(outcome, "holds a run of another configuration: seed, method.alpha differ")
    assert snapshot(finished) == before


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
        ("prompts={kind: file, train: nowhere.txt, heldout: b.txt}", "nowhere.txt: cannot read the prompts"),
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
        ("a red zebra", "a red circle", "this model does not know 'zebra' in 'a red zebra'"),
        ("a red circle", "a red zebra", "this model does not know 'zebra' in 'a red zebra'"),
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
        ("build.distill.build_backbone", "stopped by SIGUSR1; nothing that was saved is lost"),
        ("training.guard.Guard.evaluate", "stopped before step 1; --resume goes on from there"),
        ("build.run.finish", "stopped by SIGUSR1; nothing that was saved is lost"),
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
        outcome = distill(*guarded, "--resume")
    assert outcome.code == 75
    assert outcome.err.splitlines()[-1] == expected
    assert distill(*guarded, "--resume").code == 0
    assert metrics_steps(tmp_path / "run") == [1, 2]


def test_two_runs_in_one_folder(distill: Command, tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        for option in ("--resume", "--overwrite"):
            refused(distill(option), f"{tmp_path / 'run'}: process {os.getpid()} on {platform.node()} is working in it")
    assert distill("--resume", steps=1).code == 0
    assert ".lock" not in names(tmp_path / "run")


def test_resume_without_a_run_starts_one(distill: Command, tmp_path: Path) -> None:
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
