"""`sample` of a finished run: how many network calls, what it writes and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import PROMPT, names, refused
from torch import Tensor

from rats_video.commands.runs import load_run
from rats_video.inference.video import read_mp4

Command = Callable[..., Any]


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
    assert "warning: --nfe 3: this student was trained for 2, 4; quality may drop" in err
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
    monkeypatch.setattr("rats_video.inference.video.write_mp4", lambda frames, *_, **__: clips.append(frames))
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
        (
            ["--prompts", "taken"],
            "taken, line 2: this model does not know 'circel' in 'a red circel' (nearest known: 'circle' for 'circel')",
        ),
        (["--prompt", PROMPT, "--nfe", "0"], "'--nfe'"),
        (["--prompt", PROMPT, "--num-videos", "0"], "'--num-videos'"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: cannot read it: No such file or directory"),
        (["--prompt", PROMPT, "--device", "cuda:99"], "--device: cuda:99 is not here"),
        (
            ["--prompt", PROMPT, "--model", "nowhere"],
            "--model: no such folder: nowhere (give a run, a student or a pipeline: a folder, or USER/NAME on the hub)",
        ),
        (
            ["--prompt", PROMPT, "--lora", "no.safetensors:0.5"],
            "--lora: no such file: no.safetensors (give FILE",
        ),
        (["--prompt", PROMPT, "--height", "40"], "--height: must be a multiple of 16"),
        (["--prompt", PROMPT, "--output", "taken"], "taken"),
        (["--prompt", PROMPT, "--output", "taken/below"], "taken/below"),
    ],
)
def test_bad_sample_is_one_line(
    command: Command, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a red circle\na red circel")
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


def test_a_run_that_went_on_says_that_its_student_is_older(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))
    load_run(run)
    assert capsys.readouterr().err == ""
    config = run / "config.resolved.yaml"
    config.write_text(config.read_text().replace("  steps: 2\n", "  steps: 300\n"))  # as --resume --set leaves it
    load_run(run)
    assert capsys.readouterr().err == (
        f"warning: {run}: is at step 2 of 300; its student is the one from before it went on\n"
    )
