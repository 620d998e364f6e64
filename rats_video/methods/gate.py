"""The reward-aware gate: the weight on shaping, which falls as the student's reward passes the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from rats_video.config.fields import Config, PositiveFloat
from rats_video.diffusion.causal import pool_to_latent_frames
from rats_video.errors import UserError
from rats_video.types import RewardScores

GateFn = Callable[[RewardScores, RewardScores], Tensor]
"""`(teacher scores, student scores) -> weight on shaping [B, F] or [B, 1]`, in [0, 1], without gradient."""


class SigmoidGateConfig(Config):
    """Shaping weight `floor + (1 - floor) * sigmoid((R_teacher - R_student) / tau)` (RATS, gate)."""

    kind: Literal["sigmoid"]
    tau: PositiveFloat = Field(0.15, description="reward difference that moves the weight from 0.5 to 0.73")
    level: Literal["frame", "clip"] = Field("frame", description="one weight a latent frame, or one a clip")
    floor: float = Field(0.0, ge=0, le=1, description="shaping that always remains; 0 is the paper's gate")
    part: str | None = Field(
        None, description="part of the reward that drives the gate, e.g. a term of weight 0; null = the score itself"
    )

    def build(self, temporal_stride: int) -> GateFn:
        """The gate as a function of scores."""
        return lambda teacher, student: sigmoid_gate(teacher, student, self, temporal_stride)


class ConstantGateConfig(Config):
    """The same shaping weight whatever the rewards say."""

    kind: Literal["constant"]
    weight: float = Field(1.0, ge=0, le=1, description="of shaping, for all clips")

    def build(self, temporal_stride: int) -> GateFn:  # noqa: ARG002  # the same for all frames
        """The gate as a function of scores."""
        return lambda _, student: torch.full_like(student.clip, self.weight)[:, None].detach()


GateConfig = Annotated[SigmoidGateConfig | ConstantGateConfig, Field(discriminator="kind")]
"""Every gate, by `method.gate.kind`. A new one is a class above, with its `build`, and its name here."""


def gate_parts(gate: GateFn, teacher: RewardScores, student: RewardScores, parts: Iterable[str]) -> dict[str, Tensor]:
    """The weight of each part of the latents, `[B, F]` or `[B, 1]`: by the scores of what sees it, or hears it.

    A part that nothing judges is held in full: no score says that the student does it better than its teacher.
    """
    weights = {}
    for part in parts:
        theirs, ours = teacher.of_part(part), student.of_part(part)
        if theirs is None or ours is None:
            weights[part] = torch.ones_like(student.clip)[:, None].detach()
        else:
            weights[part] = gate(theirs, ours)
    return weights


def build_gate(cfg: GateConfig, temporal_stride: int) -> GateFn:
    """The gate a configuration names, for clips with that many pixel frames a latent frame."""
    return cfg.build(temporal_stride)


def sigmoid_gate(teacher: RewardScores, student: RewardScores, cfg: SigmoidGateConfig, temporal_stride: int) -> Tensor:
    """`floor + (1 - floor) * sigmoid((R_T - R_S) / tau)`: strong while the teacher leads, gone once it is surpassed.

    The paper's figure prints g = 1 / (1 + exp((R_T - R_S) / tau)), which rises with the student's lead; the weight on
    shaping is 1 - g. With frame scores on both sides and level "frame" there is one weight a latent frame, `[B, F]`;
    otherwise one a clip, `[B, 1]`. With `cfg.part` that part of both scores is compared instead, one weight a clip.

    Raises:
        UserError: the reward has no such part.
    """
    if cfg.part is not None:
        lead = (_part(teacher, cfg.part) - _part(student, cfg.part))[:, None]
    elif cfg.level == "frame" and teacher.frames is not None and student.frames is not None:
        lead = pool_to_latent_frames(teacher.frames - student.frames, temporal_stride)
    else:
        lead = (teacher.clip - student.clip)[:, None]
    return (cfg.floor + (1 - cfg.floor) * torch.sigmoid(lead / cfg.tau)).detach()


def _part(scores: RewardScores, name: str) -> Tensor:
    if name not in scores.parts:
        known = ", ".join(scores.parts) or "it has none"
        raise UserError(f"the reward has no part {name!r}", where="method.gate.part", fix=f"its parts: {known}")
    return scores.parts[name]
