"""A finished `run`, and a count of network calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import WanTransformer3DModel
from torch import Tensor

Command = Callable[..., Any]


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def finished(command: Command, whole_runs: Any, sets: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished `run`, with its plan and its figures."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    with whole_runs():
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
