"""Imitation: the teacher's trajectory matched at every horizon, and nothing else.

Its shaping is RATS' own (`methods/shaping.py`); without reward and gate the teacher stays the upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rats_video.methods.base import BaseMethod, BaseMethodConfig, LogRow
from rats_video.methods.context import MethodContext
from rats_video.methods.finite import SKIPPED
from rats_video.methods.shaping import ShapingConfig, sampled_frames, shaping_of_parts, weigh_horizons
from rats_video.methods.student import student_rollout
from rats_video.types import PromptBatch


class ImitationConfig(BaseMethodConfig):
    """Loss = shaping: the teacher's trajectory matched at every horizon, whatever the reward says."""

    kind: Literal["imitation"]
    shaping: ShapingConfig = ShapingConfig()

    @property
    def uses_teacher(self) -> bool:
        """True: it is matched."""
        return True

    @property
    def compares_predictions(self) -> bool:
        """True if shaping does."""
        return self.shaping.space == "x0"

    def check_horizons(self, num_steps: int) -> None:
        """Raise UserError if its weights do not fit that many steps."""
        self.shaping.check_horizons(num_steps)

    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:  # noqa: ARG002
        """A rollout of each."""
        return teacher + student

    def build(self, context: MethodContext) -> Imitation:
        """The method on the run's roles."""
        return Imitation(**context.inputs(), config=self)


@dataclass(frozen=True, kw_only=True)
class Imitation(BaseMethod):
    """Loss = mean over horizons and latent frames of `|student - teacher|^2`."""

    config: ImitationConfig

    def step(self, batch: PromptBatch) -> tuple[Tensor, LogRow]:
        """Loss of one batch, and what to log of it."""
        teacher = self.teacher.rollout(batch)
        student = student_rollout(self, batch, predictions=self.config.compares_predictions)
        parts = shaping_of_parts(self.student.split, student, teacher.trajectory, self.config.shaping)
        parts = {part: by_horizon[..., sampled_frames(part, batch.given)] for part, by_horizon in parts.items()}
        losses = [weigh_horizons(each, self.config.shaping.horizon_weights).mean() for each in parts.values()]
        loss = torch.stack(losses).mean()
        apart = torch.stack([each.detach().mean(dim=(1, 2)) for each in parts.values()]).mean(dim=0).tolist()
        row = {f"shaping/{sigma:.3f}": distance for sigma, distance in zip(student.sigmas, apart, strict=True)}
        reward = float(teacher.scores.clip.mean())  # finite or not: nothing learns from it
        return loss, {"loss": float(loss.detach()), "reward/teacher": reward, SKIPPED: 0.0, **row}
