"""One RATS step (arXiv 2604.14910): read it beside the paper's method figure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from rats_video.config.fields import NonNegativeFloat
from rats_video.diffusion.causal import with_hidden_frames
from rats_video.methods.base import BaseMethod, BaseMethodConfig, LogRow
from rats_video.methods.context import MethodContext
from rats_video.methods.finite import ASKED, SKIPPED, block_gradient, finite_clips, mask_scores, warn_skipped
from rats_video.methods.gate import GateConfig, GateFn, build_gate, gate_parts
from rats_video.methods.policy import Group, PolicyConfig, policy_loss, sample_group
from rats_video.methods.rats_log import log_of_parts, log_of_step, log_of_teacher
from rats_video.methods.scoring import score_clips
from rats_video.methods.shaping import ShapingConfig, sampled_frames, shaping_of_parts, weigh_horizons
from rats_video.methods.student import student_rollout
from rats_video.methods.teacher import TeacherRollout
from rats_video.types import PromptBatch, RewardScores, Rows, Trajectory

Judged = tuple[Trajectory, RewardScores]
"""The clips of a role: how they came about, and their scores."""


class RatsConfig(BaseMethodConfig):
    """Loss = -reward_weight * R_student + alpha * gate * shaping (+ real_data.weight * real_data)."""

    kind: Literal["rats"] = "rats"
    reward_weight: NonNegativeFloat = Field(1.0, description="of the reward in the loss; 0 leaves it out")
    alpha: NonNegativeFloat = Field(1.0, description="of shaping in the loss, before the gate")
    gate: GateConfig = Field(description="how the weight of shaping follows the rewards")
    motion_gate: GateConfig | None = Field(
        None,
        description="a gate of shaping's motion term alone, e.g. one that a motion reward drives; null = the same",
        exclude_if=lambda gate: gate is None,
    )
    shaping: ShapingConfig = ShapingConfig()
    reward_margin: NonNegativeFloat | None = Field(
        None, description="cap the student's reward at the teacher's plus this; null leaves it uncapped, as published"
    )
    policy: PolicyConfig | None = Field(
        None, description="raise the reward by a policy gradient, as one without gradient needs; null = the direct one"
    )

    can_strengthen_shaping: ClassVar[bool] = True

    @property
    def uses_gradient(self) -> bool:
        """True unless the policy objective raises the reward."""
        return self.reward_weight > 0 and self.policy is None

    @property
    def uses_teacher(self) -> bool:
        """True: the gate compares with it."""
        return True

    @property
    def needs_every_teacher(self) -> str | None:
        """The cap on the student's reward."""
        return None if self.reward_margin is None else "method.reward_margin"

    @property
    def compares_predictions(self) -> bool:
        """True if shaping does."""
        return self.shaping.space == "x0"

    @property
    def policy_in_loss(self) -> PolicyConfig | None:
        """The policy objective's settings, if it is in the loss."""
        return self.policy if self.reward_weight > 0 else None

    @property
    def policy_samples(self) -> int:
        """The group's rollouts."""
        return 0 if self.policy_in_loss is None else self.policy_in_loss.samples

    def for_plan(self) -> Self:
        """Without the parts of the reward that its gates go by."""
        gates = {name: gate for name in ("gate", "motion_gate") if (gate := getattr(self, name)) is not None}
        return self.model_copy(update={name: gate.model_copy(update={"part": None}) for name, gate in gates.items()})

    def check_horizons(self, num_steps: int) -> None:
        """Raise UserError if its weights do not fit that many steps."""
        self.shaping.check_horizons(num_steps)

    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:  # noqa: ARG002
        """A rollout of each, and the policy's noisy ones."""
        return teacher + student + (0 if self.policy_in_loss is None else self.policy_in_loss.evaluations(num_steps))

    def build(self, context: MethodContext) -> Rats:
        """The method on the run's roles, with its gate."""
        gate, motion = self.gate, self.motion_gate
        stride = context.temporal_stride
        return Rats(
            **context.inputs(), config=self, gate=build_gate(gate, stride),
            motion_gate=None if motion is None else build_gate(motion, stride),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Rats(BaseMethod):
    """Everything that `rats_step` puts together; the guard may strengthen shaping."""

    config: RatsConfig
    gate: GateFn
    motion_gate: GateFn | None = None
    shaping_strength: float = 1.0

    @property
    def gated(self) -> dict[str, tuple[GateFn, ShapingConfig]]:
        """The terms of shaping, each with its gate, by their prefix in the log: one, or appearance and motion apart."""
        shaping = self.config.shaping
        if self.motion_gate is None:
            return {"": (self.gate, shaping)}
        return {
            "": (self.gate, shaping.model_copy(update={"motion_weight": 0.0})),
            "motion/": (self.motion_gate, shaping.model_copy(update={"appearance_weight": 0.0})),
        }

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

    As published, the teacher is asked about all B clips. Where `teacher.asked` is less, it is about A of them, whose
    second term weighs 1 / asked: the loss has the same mean over draws (Horvitz and Thompson, 1952).
    """
    config, clips = rats.config, len(batch.prompts)
    asked = rows_of(batch)  # [A]
    teacher = rats.teacher.rollout(batch.of_asked) if batch.asked_rows else None
    student = student_rollout(rats, batch, predictions=config.compares_predictions)
    clip = student.x0.view_as(student.x0)  # gradient from pixels comes back here, shaping's does not
    with torch.set_grad_enabled(config.uses_gradient):
        scores = score_clips(rats.reward, rats.student, clip, batch.prompts, batch.grad_frames)
    group = policy_group(rats, batch)
    if teacher is None:  # asked about no clip: the student's own, of which there are none
        teacher = TeacherRollout(student.take(asked), scores.take(asked))
    kept = finite_clips(scores, *(group.scores if group else ()))  # [B]
    kept[asked] &= finite_clips(teacher.scores)
    block_gradient(clip, kept)
    r_student, kept_asked = mask_scores(scores, kept), kept[asked, None]
    r_teacher, r_asked = mask_scores(teacher.scores, kept[asked]), r_student.take(asked)

    pairs = (student.take(asked), r_asked), (teacher.trajectory, r_teacher)
    shaping_term, shaping_row = gated_shaping(rats, batch, *pairs, kept_asked)
    rewards = group.rewards(kept) if group else r_student.clip  # [K, B] or [B]
    rewards = capped_reward(rewards, r_teacher.clip, config.reward_margin)
    reward_term = policy_loss(group, rewards).mean() if group else -rewards.mean()
    alpha = config.alpha * rats.shaping_strength / batch.asked_share
    loss = config.reward_weight * reward_term + alpha * shaping_term

    row = log_of_step(loss, r_student, kept, rewards)
    row |= log_of_teacher(r_teacher, r_asked, clips) | shaping_row
    if batch.asked is not None:
        row[ASKED] = float(kept_asked.sum()) / clips
    if row[SKIPPED] > 0:
        warn_skipped(batch.prompts, kept)
    return loss, row


def rows_of(batch: PromptBatch) -> Rows:
    """The clips whose teacher is asked: all of them, without a copy, or by their indices `[A]`."""
    if batch.asked is None:
        return slice(None)
    return torch.tensor(batch.asked_rows, dtype=torch.long, device=batch.noise.device)


def gated_shaping(
    rats: Rats, batch: PromptBatch, student: Judged, teacher: Judged, kept: Tensor
) -> tuple[Tensor, LogRow]:
    """The mean over all B clips and their sampled frames of gate times shaping, a 0-d tensor, and what to log of it.

    Args:
        rats: with the gates, and the shaping that each weighs.
        batch: B clips, of which A were asked about.
        student: what it made of those A, and the scores.
        teacher: the same of the teacher.
        kept: `[A, 1]`, the clips that count.
    """
    total, clips = torch.zeros((), device=kept.device), len(batch.prompts)
    row: dict[str, float] = {}
    (ours, r_student), (theirs, r_teacher) = student, teacher
    for prefix, (gate, config) in rats.gated.items():
        parts = shaping_of_parts(rats.student.split, ours, theirs, config)
        parts = {part: by_horizon * kept for part, by_horizon in parts.items()}  # [K, A, F] each
        gates = gate_parts(gate, r_teacher, r_student, parts)
        gates = {part: weight * kept for part, weight in gates.items()}  # [A, F] or [A, 1] each
        terms, frames = [], {part: sampled_frames(part, batch.given) for part in parts}
        for part, by_horizon in parts.items():
            shaping = weigh_horizons(by_horizon, config.horizon_weights)  # [A, F]
            gated = (with_hidden_frames(gates[part], shaping.shape[1]) * shaping)[:, frames[part]]
            terms.append(gated.sum() / (clips * gated.shape[1]))
        total = total + torch.stack(terms).mean()
        row |= log_of_parts(prefix, gates, parts, frames, ours.sigmas, clips)
    return total, row


def policy_group(rats: Rats, batch: PromptBatch) -> Group | None:
    """Noisy rollouts of the student from the shared noise; None without a policy objective."""
    if rats.config.policy_in_loss is None:
        return None
    sigmas = rats.student.sigmas(batch.num_steps, rats.shift)
    return sample_group(rats.student, rats.reward, batch, sigmas, rats.config.policy_in_loss)


def capped_reward(student: Tensor, teacher: Tensor, margin: float | None) -> Tensor:
    """The student's reward `[..., B]`, without gradient where it is already `margin` past the teacher's."""
    return student if margin is None else torch.minimum(student, teacher + margin)
