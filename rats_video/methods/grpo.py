"""Group-relative policy gradient on a noisy sampler, for rewards with or without gradient.

DanceGRPO (arXiv 2505.07818) and Flow-GRPO (arXiv 2505.05470): K noisy rollouts of a prompt are compared with one
another, and the steps of those that scored above their group's mean become likelier. The noisy sampler exists in
training alone: the student is evaluated, exported and used by Euler steps without noise, as every method's here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rats_video.config.fields import NonNegativeFloat
from rats_video.methods.base import BaseMethod, BaseMethodConfig, LogRow
from rats_video.methods.context import MethodContext
from rats_video.methods.finite import SKIPPED, warn_skipped
from rats_video.methods.policy import Group, PolicyConfig, policy_loss, sample_group
from rats_video.types import PromptBatch


class GrpoConfig(BaseMethodConfig):
    """Loss = -advantage * log-likelihood of noisy steps + kl_weight * divergence from the base's (GRPO)."""

    least_steps: ClassVar[int] = 2

    kind: Literal["grpo"]
    policy: PolicyConfig = PolicyConfig()
    kl_weight: NonNegativeFloat = Field(
        0.0, description="pull towards the base model's steps, in Kullback-Leibler divergence a latent number"
    )

    @property
    def needs_euler(self) -> str | None:
        """The policy, unless its steps are those of a re-noising student."""
        return self.policy.needs_euler

    def needs_other_noise(self, share: float) -> str | None:
        """The policy, unless its steps are those of the sampler."""
        return self.policy.needs_other_noise(share)

    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:  # noqa: ARG002
        """The group's rollouts, and a call of the base at each trained step."""
        base = self.policy.samples * self.policy.num_trained(num_steps) if self.kl_weight > 0 else 0
        return self.policy.evaluations(num_steps) + base

    def build(self, context: MethodContext) -> Grpo:
        """The method on the run's roles."""
        return Grpo(**context.inputs(), config=self)


@dataclass(frozen=True, kw_only=True)
class Grpo(BaseMethod):
    """Loss = -mean over the group of advantage * log-likelihood, + kl_weight * KL(student's steps | base's steps).

    Flow-GRPO's objective (its section on GRPO on flow matching) for the one update that each group serves: the
    likelihood ratio to the policy that drew it is 1 and its clipping never acts. The base is the teacher's own network
    without guidance.
    """

    config: GrpoConfig

    def step(self, batch: PromptBatch) -> tuple[Tensor, LogRow]:
        """Loss of one batch, and what to log of it."""
        sigmas = self.student.sigmas(batch.num_steps, self.shift)
        base = self.teacher.backbone.velocity if self.config.kl_weight > 0 else None
        group = sample_group(self.student, self.reward, batch, sigmas, self.config.policy, reference=base)
        loss = policy_loss(group, group.rewards(group.kept)).mean()
        row = group_row(group, batch)
        if base is not None:
            divergence = (group.divergence * group.kept).mean()
            loss = loss + self.config.kl_weight * divergence
            row["policy/divergence"] = float(divergence.detach())
        return loss, {"loss": float(loss.detach()), **row}


def group_row(group: Group, batch: PromptBatch) -> LogRow:
    """The log row of a group: means over the noisy rollouts, whose rewards the student's own need not match."""
    kept = group.kept
    if not bool(kept.all()):
        warn_skipped(batch.prompts, kept)
    rewards = group.rewards(kept).detach()
    names = group.scores[0].parts
    parts = {name: torch.stack([scores.parts[name] for scores in group.scores])[:, kept] for name in names}
    return {
        "reward/student": float(rewards.mean()),
        "reward/policy_spread": float(rewards.std(dim=0, correction=0).mean()),
        SKIPPED: float((~kept).float().mean()),
        **{f"reward/student/{name}": float(part.detach().sum()) / rewards.numel() for name, part in parts.items()},
    }
