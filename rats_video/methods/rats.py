"""One RATS step (arXiv 2604.14910): read it beside the paper's method figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rats_video.config.fields import NonNegativeFloat
from rats_video.diffusion.causal import with_hidden_frames
from rats_video.methods.base import BaseMethod, BaseMethodConfig, LogRow, MethodContext, student_rollout
from rats_video.methods.finite import SKIPPED, block_gradient, finite_clips, mask_scores, warn_skipped
from rats_video.methods.gate import GateConfig, GateFn, build_gate
from rats_video.methods.policy import Group, PolicyConfig, policy_loss, sample_group
from rats_video.methods.scoring import score_clips
from rats_video.methods.shaping import ShapingConfig, shaping_by_horizon, weigh_horizons
from rats_video.types import PromptBatch, RewardScores


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

    can_strengthen_shaping: ClassVar[bool] = True
    plannable: ClassVar[bool] = True

    @property
    def uses_gradient(self) -> bool:
        """True unless the policy objective raises the reward."""
        return self.reward_weight > 0 and self.policy is None

    @property
    def uses_teacher(self) -> bool:
        """True: the gate compares with it."""
        return True

    @property
    def policy_in_loss(self) -> PolicyConfig | None:
        """The policy objective's settings, if it is in the loss."""
        return self.policy if self.reward_weight > 0 else None

    @property
    def policy_samples(self) -> int:
        """The group's rollouts."""
        return 0 if self.policy_in_loss is None else self.policy_in_loss.samples

    def check_horizons(self, num_steps: int) -> None:
        """Raise UserError if its weights do not fit that many steps."""
        self.shaping.check_horizons(num_steps)

    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:  # noqa: ARG002
        """A rollout of each, and the policy's noisy ones."""
        return teacher + student + (0 if self.policy_in_loss is None else self.policy_in_loss.evaluations(num_steps))

    def build(self, context: MethodContext) -> Rats:
        """The method on the run's roles, with its gate."""
        return Rats(**context.inputs(), config=self, gate=build_gate(self.gate, context.temporal_stride))


@dataclass(frozen=True, kw_only=True)
class Rats(BaseMethod):
    """Everything that `rats_step` puts together; the guard may strengthen shaping."""

    config: RatsConfig
    gate: GateFn
    shaping_strength: float = 1.0

    def step(self, batch: PromptBatch) -> tuple[Tensor, LogRow]:
        """`rats_step`."""
        return rats_step(self, batch)

    def with_shaping(self, strength: float) -> Rats:
        """The same with its shaping this many times as strong."""
        return replace(self, shaping_strength=strength)


def rats_step(rats: Rats, batch: PromptBatch) -> tuple[Tensor, LogRow]:
    """Loss of one batch (a 0-d tensor with gradient to the student) and what the paper's training figure shows.

    Loss = -R_student + alpha * gate(R_teacher, R_student) * |student - teacher|^2 over horizons and latent frames.
    With `method.policy` the first term is the group-relative policy objective. A clip without a finite score adds 0.
    """
    config = rats.config
    teacher = rats.teacher.rollout(batch)
    student = student_rollout(rats, batch)
    clip = student.x0.view_as(student.x0)  # gradient from pixels comes back here, shaping's does not
    with torch.set_grad_enabled(config.uses_gradient):
        scores = score_clips(rats.reward, rats.student, clip, batch.prompts, batch.grad_frames)
    group = policy_group(rats, batch)
    kept = finite_clips(teacher.scores, scores, *(group.scores if group else ()))  # [B]
    block_gradient(clip, kept)
    r_teacher, r_student = mask_scores(teacher.scores, kept), mask_scores(scores, kept)

    by_horizon = shaping_by_horizon(student, teacher.trajectory, motion_weight=config.shaping.motion_weight)
    by_horizon = by_horizon * kept[:, None]  # [K, B, F]
    shaping = weigh_horizons(by_horizon, config.shaping.horizon_weights)  # [B, F]
    gate = rats.gate(r_teacher, r_student) * kept[:, None]  # [B, F] or [B, 1]
    rewards = group.rewards(kept) if group else r_student.clip  # [K, B] or [B]
    rewards = capped_reward(rewards, r_teacher.clip, config.reward_margin)
    reward_term = policy_loss(group, rewards).mean() if group else -rewards.mean()
    alpha = config.alpha * rats.shaping_strength
    shaping_term = (with_hidden_frames(gate, shaping.shape[1]) * shaping).mean()
    loss = config.reward_weight * reward_term + alpha * shaping_term

    row = _log(loss, r_teacher, r_student, gate, student.sigmas, by_horizon, kept, rewards)
    if row[SKIPPED] > 0:
        warn_skipped(batch.prompts, kept)
    return loss, row


def policy_group(rats: Rats, batch: PromptBatch) -> Group | None:
    """Noisy rollouts of the student from the shared noise; None without a policy objective."""
    if rats.config.policy_in_loss is None:
        return None
    sigmas = rats.student.sigmas(batch.num_steps, rats.shift)
    return sample_group(rats.student, rats.reward, batch, sigmas, rats.config.policy_in_loss)


def capped_reward(student: Tensor, teacher: Tensor, margin: float | None) -> Tensor:
    """The student's reward `[..., B]`, without gradient where it is already `margin` past the teacher's."""
    return student if margin is None else torch.minimum(student, teacher + margin)


def _log(
    loss: Tensor,
    teacher: RewardScores,
    student: RewardScores,
    gate: Tensor,
    sigmas: Sequence[float],
    by_horizon: Tensor,
    kept: Tensor,
    rewards: Tensor,
) -> LogRow:
    group = {"mean": rewards.mean(), "spread": rewards.std(dim=0, correction=0).mean()} if rewards.ndim > 1 else {}
    row = {
        "loss": loss,
        "reward/student": student.clip.mean(),
        "reward/teacher": teacher.clip.mean(),
        "reward/gap": (student.clip - teacher.clip).mean(),
        SKIPPED: (~kept).float().mean(),
        "gate/weight": gate.mean(),
        **{f"reward/policy_{name}": value for name, value in group.items()},
        **{f"reward/student/{name}": part.mean() for name, part in student.parts.items()},
        **{f"shaping/{s:.3f}": d.mean() for s, d in zip(sigmas, by_horizon, strict=True)},
        **{f"gate/frame{f}": column.mean() for f, column in enumerate(gate.unbind(dim=1)) if gate.shape[1] > 1},
    }
    return {name: float(value.detach()) for name, value in row.items()}
