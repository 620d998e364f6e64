"""One RATS step (arXiv 2604.14910): read it beside the paper's method figure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rats_video.config.distill import MethodConfig, StudentConfig
from rats_video.diffusion.rollout import rollout
from rats_video.distill.gate import GateFn
from rats_video.distill.judge import judge
from rats_video.distill.shaping import shaping_by_horizon, weigh_horizons
from rats_video.distill.teacher import TeacherSampler
from rats_video.types import Backbone, PromptBatch, Reward, RewardScores, Trajectory


@dataclass(frozen=True)
class Rats:
    """The parts that a step puts together; the guard may strengthen shaping."""

    student: Backbone
    teacher: TeacherSampler
    reward: Reward
    gate: GateFn
    method: MethodConfig
    student_config: StudentConfig
    shift: float
    shaping_strength: float = 1.0


def rats_step(rats: Rats, batch: PromptBatch) -> tuple[Tensor, dict[str, float]]:
    """Loss of one batch (a 0-d tensor with gradient to the student) and what the paper's training figure shows.

    Loss = -R_student + alpha * gate(R_teacher, R_student) * |student - teacher|^2 over horizons and latent frames.
    """
    method = rats.method
    guide = rats.teacher.guide(batch)
    path = student_path(rats, batch)
    with torch.set_grad_enabled(method.reward_weight > 0):
        scores = judge(rats.reward, rats.student, path.x0, batch.prompts, batch.grad_frames)

    by_horizon = shaping_by_horizon(path, guide.trajectory, motion_weight=method.shaping.motion_weight)  # [K, B, F]
    shaping = weigh_horizons(by_horizon, method.shaping.horizon_weights)  # [B, F]
    weight = rats.gate(guide.scores, scores)  # [B, F] or [B, 1]
    gain = reward_gain(scores.clip, guide.scores.clip, method.reward_margin)  # [B]
    alpha = method.alpha * rats.shaping_strength
    loss = -method.reward_weight * gain.mean() + alpha * (weight * shaping).mean()
    return loss, _log(loss, guide.scores, scores, weight, path, by_horizon)


def student_path(rats: Rats, batch: PromptBatch) -> Trajectory:
    """The student's own few-step trajectory from the shared noise, kept at every noise level below 1."""
    return rollout(
        rats.student.velocity,
        batch.noise,
        rats.student.sigmas(batch.num_steps, rats.shift),
        rats.student.encode_text(batch.prompts),
        keep=range(1, batch.num_steps + 1),
        grad_steps=rats.student_config.gradient_steps(batch.num_steps),
    )


def reward_gain(student: Tensor, teacher: Tensor, margin: float | None) -> Tensor:
    """The student's reward `[B]`, without gradient where it is already `margin` past the teacher's."""
    return student if margin is None else torch.minimum(student, teacher + margin)


def _log(
    loss: Tensor, teacher: RewardScores, student: RewardScores, weight: Tensor, path: Trajectory, by_horizon: Tensor
) -> dict[str, float]:
    rows = {
        "loss": loss,
        "reward/student": student.clip.mean(),
        "reward/teacher": teacher.clip.mean(),
        "reward/gap": (student.clip - teacher.clip).mean(),
        "gate/weight": weight.mean(),
        **{f"reward/student/{name}": part.mean() for name, part in student.parts.items()},
        **{f"shaping/{s:.3f}": d.mean() for s, d in zip(path.sigmas, by_horizon, strict=True)},
        **{f"gate/frame{f}": column.mean() for f, column in enumerate(weight.unbind(dim=1)) if weight.shape[1] > 1},
    }
    return {name: float(value.detach()) for name, value in rows.items()}
