"""A finished `run`, and a count of network calls."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wan_family
from shared import made_once
from torch import Tensor

Command = Callable[..., Any]


@pytest.fixture(scope="session")
def sets(reward_folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`--set` options that shrink the packaged `tiny` to a smoke test, at 17 frames as shipped."""

    def copy_rewards(folder: Path) -> None:
        for reward in reward_folders:
            shutil.copytree(reward, folder / reward.name)

    rewards = made_once(tmp_path_factory, "rewards", copy_rewards)  # the run's configuration names them
    changes = {
        "model": made_once(tmp_path_factory, "wan", wan_family.build),
        "reward.path": rewards / "reward",
        "heldout_reward.path": rewards / "heldout",
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
    """The folder of a finished `run`, with its plan and its figures, which all workers look at and nobody changes."""

    def run(folder: Path) -> None:
        with whole_runs():
            code, out, err = command("run", "--config", "tiny", "--output", folder, *sets)
        assert code == 0, err
        assert f"Look first at {folder / 'comparison'}" in out

    return made_once(tmp_path_factory, "demo", run)


@pytest.fixture
def own(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to go on with."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Clips in each call of any denoiser."""
    from diffusers import WanTransformer3DModel

    rows: list[int] = []
    forward = WanTransformer3DModel.forward

    @functools.wraps(forward)
    def counting(self: Any, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
        rows.append(len(hidden_states))
        return forward(self, hidden_states, *arguments, **options)

    monkeypatch.setattr(WanTransformer3DModel, "forward", counting)
    return rows
