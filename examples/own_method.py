"""A method of your own: ReFL as published, the reward of the clip that one late step, drawn at random, predicts.

export RATS_VIDEO_TRUST_CODE=1
rats-video distill --config tiny --set 'method={kind: custom, target: "examples.own_method:LateStep"}' --output runs/own
"""

from dataclasses import dataclass

import torch

from rats_video.diffusion.rollout import rollout
from rats_video.methods.base import BaseMethod
from rats_video.methods.student import score_student_clip
from rats_video.seeds import seeded


@dataclass(frozen=True, kw_only=True)
class LateStep(BaseMethod):
    """Loss = -weight * R of the clip predicted from a point of the student's path (arXiv 2304.05977, algorithm 1)."""

    weight: float = 1.0
    uses_gradient = True

    @staticmethod
    def evaluations(num_steps, student, teacher, guided):
        """The mean number of steps before the one that carries gradient, and that one, which counts three."""
        return (num_steps // 2 + num_steps - 1) / 2 + 3

    def step(self, batch):
        """Loss of one batch, and what to log of it."""
        sigmas, text = self.student.sigmas(batch.num_steps, self.shift), self.student.encode_text(batch.prompts)
        step = int(torch.randint(batch.num_steps // 2, batch.num_steps, (), generator=seeded(batch.index)))
        latents = rollout(self.student.velocity, batch.noise, sigmas[: step + 1], text).x0
        sigma = sigmas[step].to(latents).expand(len(latents))
        x0 = latents - sigma.view(-1, 1, 1, 1, 1) * self.student.velocity(latents, sigma, text)
        scores, row = score_student_clip(self, batch, x0, with_gradient=True)
        return -self.weight * scores.clip.mean(), row
