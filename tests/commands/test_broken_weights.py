"""Models whose weights hold NaN: the command ends before it writes, and names the part."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.pipeline

Command = Callable[..., Any]


def with_nan(folder: Path, name: str, weight: str) -> Path:
    path = folder / name
    tensors = load_file(path)
    tensors[weight].view(-1)[0] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.fixture
def broken_text(tiny_wan: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny_wan, tmp_path / "base"))
    return with_nan(folder, "text_encoder/model.safetensors", "shared.weight")


@pytest.mark.parametrize("key", ["model", "reward.path", "heldout_reward.path"])
def test_distill_leaves_no_folder(
    command: Command, config_file: Path, broken_text: Path, reward_folders: tuple[Path, Path], tmp_path: Path, key: str
) -> None:
    reward = Path(shutil.copytree(reward_folders[0], tmp_path / "reward"))
    with_nan(reward, "model.safetensors", "clip_head.0.weight")
    given = broken_text if key == "model" else reward
    outcome = command("distill", "--config", config_file, "--output", tmp_path / "run", "--set", f"{key}={given}")
    where = {broken_text: "text_encoder: shared.weight", reward: "model.safetensors: clip_head.0.weight"}[given]
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith(f"error: {given}/{where} holds NaN or infinity (1 of its ")
    assert not (tmp_path / "run").exists()


def test_prepare_can_be_called_again_with_whole_weights(
    command: Command, broken_text: Path, tiny_wan: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("a red circle\n")
    options = ["prepare", tmp_path / "p.txt", "--output", tmp_path / "cache"]
    outcome = command(*options, "--set", f"model={broken_text}")
    assert outcome.code == 2
    assert f"error: {broken_text}/text_encoder: shared.weight holds NaN" in outcome.err
    assert command(*options, "--set", f"model={tiny_wan}").code == 0
    (tmp_path / "p.txt").write_text("a blue circle\n")
    outcome = command(*options, "--set", f"model={tiny_wan}", "--set", "dtype=bfloat16")
    assert outcome.code == 2  # now it holds something
    assert "holds clips made otherwise: dtype" in outcome.err
