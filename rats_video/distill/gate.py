"""The reward-aware gate: how much of the teacher's guidance is still wanted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rats_video.config.method import ConstantGate, SigmoidGate
from rats_video.diffusion.causal import pool_to_latent_frames
from rats_video.errors import UserError
from rats_video.types import RewardScores

GateFn = Callable[[RewardScores, RewardScores], Tensor]
"""`(teacher scores, student scores) -> weight on shaping [B, F] or [B, 1]`, in [0, 1], without gradient."""


def build_gate(cfg: SigmoidGate | ConstantGate, temporal_stride: int) -> GateFn:
    """The gate a configuration names."""
    match cfg:
        case SigmoidGate():
            return lambda teacher, student: sigmoid_gate(teacher, student, cfg, temporal_stride)
        case ConstantGate():
            return lambda _, student: torch.full_like(student.clip, cfg.weight)[:, None].detach()


def sigmoid_gate(teacher: RewardScores, student: RewardScores, cfg: SigmoidGate, temporal_stride: int) -> Tensor:
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
