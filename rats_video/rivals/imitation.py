"""Imitation: the teacher's trajectory matched at every horizon, and nothing else.

Its shaping is RATS' own (`distill/shaping.py`); without reward and gate the teacher stays the upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rats_video.config.method import ImitationMethod
from rats_video.distill.finite import SKIPPED
from rats_video.distill.method import Players, Row, student_path
from rats_video.distill.shaping import shaping_by_horizon, weigh_horizons
from rats_video.types import PromptBatch


@dataclass(frozen=True, kw_only=True)
class Imitation(Players):
    """Loss = mean over horizons and latent frames of `|student - teacher|^2`."""

    method: ImitationMethod

    def step(self, batch: PromptBatch) -> tuple[Tensor, Row]:
        """Loss of one batch, and what to log of it."""
        guide, path = self.teacher.guide(batch), student_path(self, batch)
        by_horizon = shaping_by_horizon(path, guide.trajectory, motion_weight=self.method.shaping.motion_weight)
        loss = weigh_horizons(by_horizon, self.method.shaping.horizon_weights).mean()
        apart = by_horizon.detach().mean(dim=(1, 2)).tolist()
        row = {f"shaping/{sigma:.3f}": distance for sigma, distance in zip(path.sigmas, apart, strict=True)}
        teacher = float(guide.scores.clip.mean())  # finite or not: nothing learns from it
        return loss, {"loss": float(loss.detach()), "reward/teacher": teacher, SKIPPED: 0.0, **row}
