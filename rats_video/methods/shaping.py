"""Sigma-aligned multi-horizon matching, reduced per latent frame."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from rats_video.config.fields import Config, NonNegativeFloat
from rats_video.errors import UserError
from rats_video.types import Trajectory


class ShapingConfig(Config):
    """Comparison of student and teacher at the horizons."""

    space: Literal["latents", "x0"] = Field(
        "latents", description="what is compared: the latents they reach, or the clean clips that their calls predict"
    )
    distance: Literal["l2", "cosine", "both"] = Field("l2", description="of a latent frame's appearance")
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


def shaping_by_horizon(student: Trajectory, teacher: Trajectory, cfg: ShapingConfig) -> Tensor:
    """Distance of the two trajectories at each of their common horizons, `[K, B, F]`; the teacher is detached.

    The horizons of latents are the K noise levels that the student's calls lead to. Those of `space: x0` are the K that
    they are made at: a call predicts `x0 = latents - sigma * velocity`. (Shaping on predicted clean clips by cosine and
    L2 is the paper's, by a public reading note.)

    Raises:
        ValueError: the trajectories were kept at different noise levels.
    """
    if cfg.space == "x0":
        assert student.predictions is not None
        assert teacher.predictions is not None
        student, teacher = student.predictions, teacher.predictions
    apart = [abs(a - b) for a, b in zip(student.sigmas, teacher.sigmas, strict=True)]
    if max(apart) > 1e-5:  # float32 rounding of the same grid
        raise ValueError(f"horizons differ: student {student.sigmas}, teacher {teacher.sigmas}")
    return torch.stack([
        latents_distance(ours, theirs.detach(), cfg)
        for ours, theirs in zip(student.latents, teacher.latents, strict=True)
    ])  # fmt: skip


def shaping_of_parts(
    split: Callable[[Tensor], Mapping[str, Tensor]], student: Trajectory, teacher: Trajectory, cfg: ShapingConfig
) -> dict[str, Tensor]:
    """`shaping_by_horizon` of each part of the latents, `[K, B, F]` with as many frames F as the part has."""
    ours, theirs = split_path(split, student), split_path(split, teacher)
    return {part: shaping_by_horizon(ours[part], theirs[part], cfg) for part in ours}


def split_path(split: Callable[[Tensor], Mapping[str, Tensor]], path: Trajectory) -> dict[str, Trajectory]:
    """A trajectory's parts."""
    kept = [split(latents) for latents in path.latents]
    clean = {} if path.predictions is None else split_path(split, path.predictions)
    return {
        part: replace(path, latents=tuple(each[part] for each in kept), predictions=clean.get(part)) for part in kept[0]
    }


def latents_distance(ours: Tensor, theirs: Tensor, cfg: ShapingConfig) -> Tensor:
    """Distance `[B, F]` by latent frame of two clips' latents `[B, C, F, H, W]`: appearance, and motion by L2."""
    squares = frame_distance(ours - theirs, cfg.motion_weight)
    match cfg.distance:
        case "l2":
            return squares
        case "both":
            return squares + cosine_distance(ours, theirs)
        case "cosine":
            motion = squares - frame_distance(ours - theirs, 0.0)
            return cosine_distance(ours, theirs) + motion


def cosine_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """1 - the cosine of two latent frames as vectors over C, H, W: `[B, F]`, between 0 and 2."""
    return 1 - F.cosine_similarity(ours.movedim(2, 1).flatten(2), theirs.movedim(2, 1).flatten(2), dim=-1)


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
