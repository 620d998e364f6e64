"""A base pipeline that was moved after the training: `--base` says where it is now."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_student import save_lora_student

from rats_video.backbones.wan import WanBackbone
from rats_video.commands.demo import load_studio
from rats_video.commands.students import load_student
from rats_video.config.load import write_resolved
from rats_video.errors import UserError
from rats_video.hub import CARD
from rats_video.inference.student import ITSELF

Command = Callable[..., Any]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gone") / "base"


@pytest.fixture(scope="module")
def run(loaded: WanBackbone, gone: Path, make_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished LoRA run whose configuration and student name a base that is not there any more."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    folder.mkdir(parents=True)
    short = ("evaluation.num_clips=1", "evaluation.teacher_steps=1", "evaluation.latency_clips=0",
             "evaluation.diversity=null", "evaluation.nfe=[1]")  # fmt: skip
    write_resolved(make_config(f"model={gone}", *short), folder / "config.resolved.yaml")
    save_lora_student(loaded, gone, 1, folder / "student")
    return folder


COMMANDS: dict[str, Callable[[Path], list[Any]]] = {
    "sample": lambda run: ["sample", "--model", run, "--nfe", 1, "--prompt", "a red circle"],
    "model": lambda run: ["export", "model", run, "--format", "lora", "--nfe", 1],
    "comparison": lambda run: ["export", "comparison", run, "--nfe", 1],
    "evaluate": lambda run: ["evaluate", run],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_takes_the_base_from_where_it_is(
    command: Command, run: Path, gone: Path, tiny_wan: Path, tmp_path: Path, name: str
) -> None:
    options = [*COMMANDS[name](run), "--output", tmp_path / "out"]
    code, _, err = command(*options)
    assert code == 2
    assert err == (
        f"error: {run}/student/rats.json: model: no such folder: {gone} (it is the student's base: where it has moved "
        "to, say --base DIR)\n"
    )
    assert not (tmp_path / "out").exists()
    code, _, err = command(*options, "--base", tiny_wan)
    assert code == 0, err
    assert any((tmp_path / "out").iterdir())


def test_demo_takes_it_too(run: Path, tiny_wan: Path) -> None:
    with pytest.raises(UserError, match="--base DIR"):
        load_studio(run, CPU)
    studio, _ = load_studio(run, CPU, tiny_wan)
    assert studio.trained == (1,)


def test_it_is_the_student_on_that_base(run: Path, tiny_wan: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny_wan, tmp_path / "moved")
    student = load_student(run, CPU, moved)
    assert (student.model, student.card.model) == (moved, str(moved))
    assert all(weight.abs().min() > 0 for name, weight in student.student.weights.items() if "lora_B" in name)


def test_bases_that_are_none(command: Command, run: Path, tmp_path: Path) -> None:
    ask = ["sample", "--model", run, "--prompt", "a red circle", "--output", tmp_path / "out"]
    code, _, err = command(*ask, "--base", tmp_path / "nowhere")
    assert code == 2
    assert err.startswith(f"error: --base: no such folder: {tmp_path}/nowhere")
    whole = shutil.copytree(run / "student", tmp_path / "whole")
    (whole / CARD).write_text(json.dumps(json.loads((whole / CARD).read_text()) | {"model": ITSELF}))
    code, _, err = command("sample", "--model", whole, "--prompt", "a", "--output", tmp_path / "out", "--base", run)
    assert (code, err) == (2, f"error: --base: {whole} is a whole pipeline and needs no base (leave it out)\n")
