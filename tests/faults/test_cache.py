"""Teacher rollouts that were damaged on disk: noticed, computed again, and the run is the one without the damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_runs import assert_same_run, rows
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Distill = Callable[..., Any]


def truncated(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def flipped(path: Path, _: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1  # of a number's fraction: still finite, of the right shape
    path.write_bytes(content)


def rewritten(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, header)


def nan_inside(path: Path, _: Path) -> None:
    rewritten(path, lambda tensors: tensors["latents.1"].flatten()[:1].fill_(torch.nan))


def wrong_shape(path: Path, _: Path) -> None:
    rewritten(path, lambda tensors: tensors.update({"latents.1": tensors["latents.1"].repeat(2, 1, 1, 1, 1)}))


def other_batch(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


DAMAGES = [truncated, flipped, nan_inside, wrong_shape, other_batch]


def test_damaged_rollouts_are_computed_again(distill: Distill, tmp_path: Path) -> None:
    """A step and a damage each: the run goes on with the next one."""
    steps = f"training.steps={len(DAMAGES)}"
    assert distill("whole", steps, f"teacher.cache={tmp_path / 'cache'}").code == 0
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == len(DAMAGES)
    contents = [path.read_bytes() for path in files]
    rollouts = [{name: tensor.clone() for name, tensor in load_file(path).items()} for path in files]
    for damage, path, other in zip(DAMAGES, files, files[1:] + files[:1], strict=True):
        damage(path, other)
    assert all(path.read_bytes() != content for path, content in zip(files, contents, strict=True))
    done = distill("run", steps, f"teacher.cache={tmp_path / 'cache'}")
    assert done.code == 0
    warnings = [line for line in done.err.splitlines() if line.startswith("warning")]
    assert warnings == [f"warning: teacher rollout {path}: damaged, computed again" for path in files]
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    for path, rollout in zip(files, rollouts, strict=True):  # mended
        mended = load_file(path)
        assert all(torch.equal(tensor, mended[name]) for name, tensor in rollout.items())
    assert "damaged" not in distill("again", steps, f"teacher.cache={tmp_path / 'cache'}").err


def test_what_is_not_finite_is_not_kept(distill: Distill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that had no number once must not have none for ever."""
    from rats_video.methods import teacher

    score_clips = teacher.score_clips

    def failing(*arguments: Any) -> Any:
        scores = score_clips(*arguments)
        return scores.__class__(scores.clip * torch.tensor([torch.nan, 1.0]), scores.frames, scores.parts)

    cache = f"teacher.cache={tmp_path / 'cache'}"
    with monkeypatch.context() as patch:
        patch.setattr("rats_video.methods.teacher.score_clips", failing)
        assert distill("run", cache, "training.steps=1").code == 0
    assert [row["reward/skipped"] for row in rows(tmp_path / "run")] == [1]
    assert list((tmp_path / "cache").rglob("*.safetensors")) == []
    assert distill("after", cache, "training.steps=1").code == 0
    assert distill("whole", "training.steps=1").code == 0
    assert_same_run(tmp_path / "after", tmp_path / "whole")
