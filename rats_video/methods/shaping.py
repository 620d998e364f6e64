"""Sigma-aligned multi-horizon matching, reduced per latent frame."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from rats_video.config.fields import Config, NonNegativeFloat
from rats_video.errors import UserError
from rats_video.types import Trajectory


class ShapingConfig(Config):
    """Comparison of student and teacher latents at the horizons."""

    motion_weight: NonNegativeFloat = Field(0.5, description="weight of the motion term beside the appearance term")
    horizon_weights: tuple[NonNegativeFloat, ...] | None = Field(
        None, description="one weight a student step, first to last; null weighs all alike"
    )

    def check_horizons(self, num_steps: int) -> None:
        """Raise UserError if there is not one weight for each student step."""
        weights = self.horizon_weights
        if weights is not None and (len(weights) != num_steps or sum(weights) == 0):
            raise UserError(
                f"needs {num_steps} weights that are not all 0, got {list(weights)}",
                where="method.shaping.horizon_weights", fix="one a student step, or null",
            )  # fmt: skip


def shaping_by_horizon(student: Trajectory, teacher: Trajectory, *, motion_weight: float) -> Tensor:
    """Squared distance of the two trajectories at each of their common horizons, `[K, B, F]`; the teacher is detached.

    Raises:
        ValueError: the trajectories were kept at different noise levels.
    """
    apart = [abs(a - b) for a, b in zip(student.sigmas, teacher.sigmas, strict=True)]
    if max(apart) > 1e-5:  # float32 rounding of the same grid
        raise ValueError(f"horizons differ: student {student.sigmas}, teacher {teacher.sigmas}")
    return torch.stack([
        frame_distance(ours - theirs.detach(), motion_weight)
        for ours, theirs in zip(student.latents, teacher.latents, strict=True)
    ])  # fmt: skip


def frame_distance(residual: Tensor, motion_weight: float) -> Tensor:
    """Appearance plus motion error per latent frame, `[B, F]`, of a residual `[B, C, F, H, W]`.

    Appearance is the mean square over C, H, W. Motion is the mean square of the residual's change since the frame
    before (the first frame shares the second's): an error that stays put costs nothing there, one that moves does.
    """
    appearance = residual.square().mean(dim=(1, 3, 4))
    if residual.shape[2] == 1:
        return appearance
    change = residual.diff(dim=2).square().mean(dim=(1, 3, 4))
    return appearance + motion_weight * torch.cat([change[:, :1], change], dim=1)


def weigh_horizons(by_horizon: Tensor, weights: Sequence[float] | None) -> Tensor:
    """Weighted mean over horizons: `[K, B, F]` to `[B, F]`; None weighs all alike."""
    if weights is None:
        return by_horizon.mean(dim=0)
    factors = by_horizon.new_tensor(list(weights))
    return torch.einsum("k,kbf->bf", factors / factors.sum(), by_horizon)
