"""A distillation of clips with sound: each part has its gate, and a stopped run goes on as one that was not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ltx2_family import LTX23
from safetensors.torch import load_file
from shared import made_once
from tiny_clap import save_clap

from rats_video.evaluation.sound import loudness
from rats_video.inference.audio import read_sound

pytestmark = pytest.mark.pipeline


@pytest.fixture
def config(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    sound = {"kind": "clap_score", "path": str(made_once(tmp_path_factory, "clap", save_clap))}
    for name, prompts in {"train": "a fast red circle\n", "heldout": "a slow green square\n"}.items():
        (tmp_path / f"{name}.txt").write_text(prompts)
    further = {"stg_blocks": [1]}
    tree = {
        "model": str(made_once(tmp_path_factory, LTX23.name, LTX23.build)), "shift": 1.8,
        "clip": {"num_frames": 17, "height": 64, "width": 64, "fps": 25},
        "prompts": {"kind": "file", **{name: str(tmp_path / f"{name}.txt") for name in ("train", "heldout")}},
        "reward": {
            "kind": "sum",
            "terms": {"picture": {"reward": {"kind": "motion_smoothness"}}, "sound": {"spread": 0.1, "reward": sound}},
        },
        "method": {"kind": "rats", "gate": {"kind": "sigmoid", "tau": 0.15}},
        "teacher": {"kind": "frozen", "num_steps": 2, "guidance_scale": 3.0, "further_guidance": further},
        "student": {"num_steps": [1], "weights": {"kind": "lora", "rank": 2, "alpha": 2}},
        "compute": {"cache_text": True},
        "training": {"steps": 2, "batch_size": 1, "checkpoint_every": 1, "optimizer": {"lr": 1e-2, "warmup_steps": 0}},
        "guard": None,
    }  # fmt: skip
    (tmp_path / "sound.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "sound.yaml"


def test_each_part_is_gated_and_a_resumed_run_is_the_same(
    command: Callable[..., Any], config: Path, tmp_path: Path
) -> None:
    def distill(folder: str, *options: object) -> list[dict[str, float]]:
        code, _, err = command("distill", "--config", config, "--output", tmp_path / folder, *options)
        assert code == 0, err
        return [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]

    whole = distill("whole")
    first = whole[0]
    assert first["evaluations"] == 2 * 4 + 3  # guided by four calls a step; one call with gradient counts three
    assert {"gate/weight", "gate/audio", "shaping/0.000", "shaping/audio/0.000"} <= first.keys()
    assert first["shaping/audio/0.000"] > 1e-3
    assert first["gate/audio"] != first["gate/weight"]

    distill("parts", "--set", "training.steps=1")
    parts = distill("parts", "--set", "training.steps=2", "--resume")
    for ours, theirs in zip(parts, whole, strict=True):
        assert {k: v for k, v in ours.items() if k != "seconds"} == {k: v for k, v in theirs.items() if k != "seconds"}
    students = [
        load_file(tmp_path / name / "student" / "pytorch_lora_weights.safetensors") for name in ("whole", "parts")
    ]
    assert any("audio_ff" in key for key in students[0])
    assert all(torch.equal(students[0][key], students[1][key]) for key in students[0])


def test_what_a_run_shows_is_heard_and_watched(command: Callable[..., Any], config: Path, tmp_path: Path) -> None:
    """Guard, validation and comparison: their clips have the sound that `sample` would write."""
    run = tmp_path / "run"
    code, _, err = command(
        "distill", "--config", config, "--output", run, "--set", "training.steps=1",
        "--set", "guard={every: 1, num_clips: 1}", "--set", "validation={every: 1, num_clips: 1}",
    )  # fmt: skip
    assert code == 0, err
    guard = json.loads((run / "guard.json").read_text())
    assert {"loudness", "clipped_sound", "silence"} <= guard["teacher"].keys() & guard["looks"][-1]["scores"].keys()
    assert "loudness " in err
    (clip,) = json.loads((run / "validation" / "index.json").read_text())[-1]["clips"]
    assert clip["sound"] is True
    seen = read_sound(run / "validation" / clip["file"])
    assert seen is not None
    assert float(loudness(seen)) == pytest.approx(clip["scores"]["loudness"], abs=1)  # AAC changes little

    code, out, err = command("export", "comparison", run, "--nfe", 1, "--num-videos", 1)
    assert code == 0, err
    assert "the student's sound plays, the teacher's is track 2 and the base's track 3" in out
    (row,) = json.loads((run / "comparison" / "index.json").read_text())
    assert {panel["title"]: panel["track"] for panel in row["panels"]} == {"teacher": 2, "base": 3, "student": 1}
    heard = [read_sound(run / "comparison" / row["file"], track) for track in range(3)]
    for name, sound in zip(("student", "teacher", "base"), heard, strict=True):
        assert sound is not None
        assert float(loudness(sound)) == pytest.approx(row["loudness"][name], abs=1)
