"""`evaluate` and `export comparison` of a finished run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outcomes import PROMPT, names, refused

from rats_video.inference.video import read_mp4

Command = Callable[..., Any]


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
    refused(command(*name, tmp_path), "no student here: rats.json is missing")
    (tmp_path / "file").write_text("")
    few = ["--num-clips", 1] if name == ["evaluate"] else []
    refused(command(*name, finished, *few, "--nfe", 1, "--output", tmp_path / "file"), str(tmp_path / "file"))
