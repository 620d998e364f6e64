"""The columns that a RATS step logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from torch import Tensor

from rats_video.methods.base import LogRow
from rats_video.methods.finite import SKIPPED
from rats_video.methods.shaping import PICTURES
from rats_video.types import RewardScores


def log_of_step(loss: Tensor, student: RewardScores, kept: Tensor, rewards: Tensor) -> LogRow:
    """What needs no teacher: means over all B clips; `rewards` are `[B]`, or those of a group `[K, B]`."""
    group = {"mean": rewards.mean(), "spread": rewards.std(dim=0, correction=0).mean()} if rewards.ndim > 1 else {}
    row = {
        "loss": loss,
        "reward/student": student.clip.mean(),
        SKIPPED: (~kept).float().mean(),
        **{f"reward/policy_{name}": value for name, value in group.items()},
        **{f"reward/student/{name}": part.mean() for name, part in student.parts.items()},
    }
    return {name: float(value.detach()) for name, value in row.items()}


def log_of_teacher(teacher: RewardScores, student: RewardScores, clips: int) -> LogRow:
    """What needs the teacher: sums over the clips that it was asked about, as parts of a mean over all `clips`."""
    return _share({"reward/teacher": teacher.clip, "reward/gap": student.clip - teacher.clip}, clips)


def log_of_parts(
    prefix: str,
    gates: Mapping[str, Tensor],
    parts: Mapping[str, Tensor],
    sampled: Mapping[str, slice],
    sigmas: Sequence[float],
    clips: int,
) -> LogRow:
    """The same of gates and distances; those of the sound have its name in theirs, those of a term its prefix."""
    row: dict[str, Tensor] = {}
    for part, gate in gates.items():
        inside, name = ("", "weight") if part == PICTURES else (f"{part}/", part)
        frames, by_horizon = gate.unbind(dim=1), parts[part][..., sampled[part]]
        row |= {
            f"gate/{prefix}{name}": gate,
            **{f"shaping/{prefix}{inside}{sigma:.3f}": each for sigma, each in zip(sigmas, by_horizon, strict=True)},
            **{f"gate/{prefix}frame{f}": column for f, column in enumerate(frames) if len(frames) > 1},
        }
    return _share(row, clips)


def _share(row: Mapping[str, Tensor], clips: int) -> LogRow:
    return {name: float(value.detach().sum()) / (clips * prod(value.shape[1:])) for name, value in row.items()}
