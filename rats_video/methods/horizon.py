"""Horizons: the noise levels that both trajectories pass through."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rats_video.types import Trajectory

SAME_SIGMA = 1e-6  # the same grid point in float32


@dataclass(frozen=True)
class Horizons:
    """The noise levels at which the student's grid meets the teacher's.

    Args:
        sigmas: K noise levels of the student, falling.
        teacher_steps: the teacher's solver steps.
        keep: indices into the teacher's grid that must be kept to reach every sigma.
        residual: the largest distance from a sigma to the teacher's nearest one; 0 where the grids nest.
    """

    sigmas: tuple[float, ...]
    teacher_steps: int
    keep: tuple[int, ...]
    residual: float


def match_horizons(student: Tensor, teacher: Tensor) -> Horizons:
    """Match every student noise level below 1 with the teacher's own, or its two neighbours where they do not nest.

    Args:
        student: the student's grid `[N + 1]`, 1 ... 0.
        teacher: the teacher's grid `[M + 1]`, 1 ... 0.
    """
    return match_levels(student[1:], teacher)


def match_levels(sigmas: Tensor, teacher: Tensor) -> Horizons:
    """The same for any noise levels `[K]`, falling, in the range of the teacher's."""
    distance = (sigmas[:, None] - teacher[None]).abs()
    nearest = distance.amin(dim=1)
    keep: set[int] = set()
    for sigma, row in zip(sigmas, distance, strict=True):
        below = int((teacher < sigma - SAME_SIGMA).sum())
        keep |= {int(row.argmin())} if row.min() < SAME_SIGMA else {len(teacher) - below - 1, len(teacher) - below}
    return Horizons(tuple(sigmas.tolist()), len(teacher) - 1, tuple(sorted(keep)), float(nearest.max()))


def at_horizons(trajectory: Trajectory, sigmas: tuple[float, ...]) -> Trajectory:
    """The trajectory's latents at `sigmas`, linear in sigma between its two neighbours."""
    return Trajectory(sigmas, tuple(_latents_at(trajectory, sigma) for sigma in sigmas), trajectory.nfe)


def _latents_at(trajectory: Trajectory, sigma: float) -> Tensor:
    kept = torch.tensor(trajectory.sigmas)
    nearest = int((kept - sigma).abs().argmin())
    if abs(trajectory.sigmas[nearest] - sigma) < SAME_SIGMA:
        return trajectory.latents[nearest]
    below = int((kept < sigma).nonzero()[0])
    high, low = trajectory.sigmas[below - 1], trajectory.sigmas[below]
    share = (high - sigma) / (high - low)
    return torch.lerp(trajectory.latents[below - 1], trajectory.latents[below], share)
