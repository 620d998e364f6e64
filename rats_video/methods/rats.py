"""One RATS step (arXiv 2604.14910): read it beside the paper's method figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rats_video.config.fields import NonNegativeFloat
from rats_video.methods.base import BaseMethodConfig, FollowsTeacher, StepsConfig, student_rollout
from rats_video.methods.finite import SKIPPED, block_gradient, finite_clips, mask_scores, warn_skipped
from rats_video.methods.gate import GateConfig, GateFn
from rats_video.methods.policy import Group, PolicyConfig, policy_loss, sample_group
from rats_video.methods.real_data import RealData
from rats_video.methods.scoring import score_clips
from rats_video.methods.shaping import ShapingConfig, shaping_by_horizon, weigh_horizons
from rats_video.methods.teacher import TeacherSampler
from rats_video.types import Backbone, PromptBatch, Reward, RewardScores, Trajectory


class RatsConfig(BaseMethodConfig):
    """Loss = -reward_weight * R_student + alpha * gate * shaping (+ real_data.weight * real_data)."""

    kind: Literal["rats"] = "rats"
    reward_weight: NonNegativeFloat = 1.0
    alpha: NonNegativeFloat = 1.0
    gate: GateConfig
    shaping: ShapingConfig = ShapingConfig()
    reward_margin: NonNegativeFloat | None = Field(
        None, description="cap the student's reward at the teacher's plus this; null leaves it uncapped, as published"
    )
    policy: PolicyConfig | None = Field(
        None, description="raise the reward by a policy gradient, as one without gradient needs; null = the direct one"
    )

    @property
    def uses_gradient(self) -> bool:
        """Whether the reward's own gradient is in the loss."""
        return self.reward_weight > 0 and self.policy is None

    @property
    def uses_teacher(self) -> bool:
        """Always: the gate compares with it."""
        return True

    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:  # noqa: ARG002
        """A rollout of each, and the policy's noisy ones."""
        policy = self.policy.evaluations(num_steps) if self.policy is not None and self.reward_weight > 0 else 0
        return teacher + student + policy


@dataclass(frozen=True)
class Rats(FollowsTeacher):
    """The parts that a step puts together, and what may stand beside it; the guard may strengthen shaping."""

    student: Backbone
    teacher: TeacherSampler
    reward: Reward
    gate: GateFn
    method: RatsConfig
    student_config: StepsConfig
    shift: float
    shaping_strength: float = 1.0
    real_data: RealData | None = None

    def step(self, batch: PromptBatch) -> tuple[Tensor, dict[str, float]]:
        """`rats_step`."""
        return rats_step(self, batch)


def rats_step(rats: Rats, batch: PromptBatch) -> tuple[Tensor, dict[str, float]]:
    """Loss of one batch (a 0-d tensor with gradient to the student) and what the paper's training figure shows.

    Loss = -R_student + alpha * gate(R_teacher, R_student) * |student - teacher|^2 over horizons and latent frames.
    With `method.policy` the first term is the group-relative policy objective. A clip without a finite score adds 0.
    """
    method = rats.method
    guide = rats.teacher.rollout(batch)
    path = student_rollout(rats, batch)
    clip = path.x0.view_as(path.x0)  # gradient from pixels comes back here, shaping's does not
    with torch.set_grad_enabled(method.uses_gradient):
        scores = score_clips(rats.reward, rats.student, clip, batch.prompts, batch.grad_frames)
    group = policy_group(rats, batch)
    kept = finite_clips(guide.scores, scores, *(group.scores if group else ()))  # [B]
    block_gradient(clip, kept)
    teacher, student = mask_scores(guide.scores, kept), mask_scores(scores, kept)

    by_horizon = shaping_by_horizon(path, guide.trajectory, motion_weight=method.shaping.motion_weight) * kept[:, None]
    shaping = weigh_horizons(by_horizon, method.shaping.horizon_weights)  # [K, B, F] to [B, F]
    weight = rats.gate(teacher, student) * kept[:, None]  # [B, F] or [B, 1]
    rewards = group.rewards(kept) if group else student.clip  # [K, B] or [B]
    gain = capped_reward(rewards, teacher.clip, method.reward_margin)
    alpha = method.alpha * rats.shaping_strength
    reward_term = policy_loss(group, gain).mean() if group else -gain.mean()
    loss = method.reward_weight * reward_term + alpha * (weight * shaping).mean()

    row = _log(loss, teacher, student, weight, path, by_horizon, kept, gain)
    if row[SKIPPED] > 0:
        warn_skipped(batch.prompts, kept)
    return loss, row


def policy_group(rats: Rats, batch: PromptBatch) -> Group | None:
    """Noisy rollouts of the student from the shared noise; None where the reward's own gradient is used, or none."""
    if rats.method.policy is None or rats.method.reward_weight == 0:
        return None
    sigmas = rats.student.sigmas(batch.num_steps, rats.shift)
    return sample_group(rats.student, rats.reward, batch, sigmas, rats.method.policy)


def capped_reward(student: Tensor, teacher: Tensor, margin: float | None) -> Tensor:
    """The student's reward `[..., B]`, without gradient where it is already `margin` past the teacher's."""
    return student if margin is None else torch.minimum(student, teacher + margin)


def _log(
    loss: Tensor,
    teacher: RewardScores,
    student: RewardScores,
    weight: Tensor,
    path: Trajectory,
    by_horizon: Tensor,
    kept: Tensor,
    gain: Tensor,
) -> dict[str, float]:
    group = {"mean": gain.mean(), "spread": gain.std(dim=0, correction=0).mean()} if gain.ndim > 1 else {}
    rows = {
        "loss": loss,
        "reward/student": student.clip.mean(),
        "reward/teacher": teacher.clip.mean(),
        "reward/gap": (student.clip - teacher.clip).mean(),
        SKIPPED: (~kept).float().mean(),
        "gate/weight": weight.mean(),
        **{f"reward/policy_{name}": value for name, value in group.items()},
        **{f"reward/student/{name}": part.mean() for name, part in student.parts.items()},
        **{f"shaping/{s:.3f}": d.mean() for s, d in zip(path.sigmas, by_horizon, strict=True)},
        **{f"gate/frame{f}": column.mean() for f, column in enumerate(weight.unbind(dim=1)) if weight.shape[1] > 1},
    }
    return {name: float(value.detach()) for name, value in rows.items()}
