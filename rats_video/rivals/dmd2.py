"""Distribution matching distillation, DMD2 (arXiv 2405.14867), the core of SenseFlow and AdvDMD.

What the student is judged on is what it makes when used: its whole Euler rollout from noise (DMD2's backward
simulation, section 4.4). Gradient goes back through the steps that `student.grad_steps` names, all unless it is set.
DMD2 takes the x0 prediction of one step instead, since its students draw noise anew between steps, so that each
prediction is a clip that the next step starts from; an Euler student's early predictions are never shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rats_video.config.dmd2 import Dmd2Method
from rats_video.config.policy import PolicyConfig
from rats_video.diffusion.flow import add_noise
from rats_video.diffusion.rollout import rollout
from rats_video.distill.distribution import NAME, DistributionMatching
from rats_video.distill.draws import DISCRIMINATOR, FAKE_SCORE, REAL, STUDENT_LEVEL, draw_noise
from rats_video.distill.ema import update_ema
from rats_video.distill.finite import SKIPPED
from rats_video.distill.method import Companion, Players, Row, judged_clip
from rats_video.distill.policy import Group, noisy_paths, policy_loss
from rats_video.distill.real_data import RealSource
from rats_video.rivals.discriminator import Discriminator
from rats_video.seeds import seeded
from rats_video.types import PromptBatch, RewardScores, TextCondition


@dataclass(frozen=True)
class Clips:
    """What the student made of a text, and the real clips that it began at, if it did; `[B, C, F, H, W]`."""

    x0: Tensor
    text: TextCondition
    real: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Dmd2(Players):
    """Loss = distribution matching, with whatever the method asks for beside it.

    Args:
        matching: teacher and fake score.
        gan: the discriminator, if there is one.
        clips: `index of a batch -> real clips, text`, of this process's rows, where real clips are used.
        seed: of what is drawn once for a whole batch.
    """

    method: Dmd2Method
    matching: DistributionMatching
    gan: Discriminator | None = None
    clips: RealSource | None = None
    seed: int = 0

    def step(self, batch: PromptBatch) -> tuple[Tensor, Row]:
        """Loss of one batch, and what to log of it."""
        made = self.make(batch, STUDENT_LEVEL)
        loss = self.matching.loss(made.x0, batch, text=made.text, teacher_at=made.real).mean()
        row = {"matching/loss": float(loss.detach()), SKIPPED: 0.0}
        if self.gan is not None:
            logit = self.logit(self.gan, made, batch)
            loss = loss + self.gan.cfg.weight * self.gan.student_loss(logit)
            row["gan/student"] = float(logit.detach().mean())
            if self.method.adversarial_reward is not None:
                policy = self.policy_term(self.gan, batch, self.method.adversarial_reward.policy)
                loss = loss + self.method.adversarial_reward.weight * policy
                row["policy/loss"] = float(policy.detach())
        if self.method.reward_weight > 0 and made.real is None:  # real clips' captions are not at hand
            scores, judged = judged_clip(self, batch, made.x0, with_gradient=True)
            loss, row = loss - self.method.reward_weight * scores.clip.mean(), row | judged
        return loss, {"loss": float(loss.detach()), **row}

    @property
    def companions(self) -> Mapping[str, Companion]:
        """The fake score, with the discriminator's head where there is one."""
        weights = dict(self.matching.fake.weights)
        if self.gan is not None:
            weights |= {f"discriminator.{name}": weight for name, weight in self.gan.head.named_parameters()}
        cfg = self.method.fake_score
        return {NAME: Companion(weights, self.fake_score_loss, cfg.optimizer, cfg.rounds)}

    def fake_score_loss(self, batch: PromptBatch, index: int) -> tuple[Tensor, Row]:
        """Flow matching on clips that the student makes of new noise in a round; the discriminator learns along."""
        with torch.no_grad():
            made = self.make(batch, FAKE_SCORE, index)
        if self.gan is None:
            return self.matching.fake_loss(made.x0, made.text, batch, index)
        latents, noise, sigma = self.matching.noised(made.x0, batch, FAKE_SCORE, index)
        velocity, student = self.gan(latents, sigma, made.text)
        real, text = self.real_clips(batch)
        _, logit = self.gan(add_noise(real, draw_noise(batch, DISCRIMINATOR, index), sigma), sigma, text)
        flow, own = self.matching.flow_error(velocity, made.x0, noise).mean(), self.gan.own_loss(student, logit)
        loss = flow + self.gan.cfg.fake_score_weight * own
        row = {"loss": loss, "flow": flow, "gan": own, "real": logit.mean(), "student": student.mean()}
        return loss, {name: float(value.detach()) for name, value in row.items()}

    def make(self, batch: PromptBatch, *stream: int) -> Clips:
        """The student's clips: of the batch's own noise in its own step, of new noise in a round of the fake score.

        With data forcing, a share of the batches begins at real clips noised to one of the student's levels.
        """
        sigmas = self.student.sigmas(batch.num_steps, self.shift)
        grad_steps = self.student_config.gradient_steps(batch.num_steps)
        generator = seeded(self.seed, REAL, batch.index)
        forced, place = torch.rand(2, generator=generator).tolist()
        noise = batch.noise if stream == (STUDENT_LEVEL,) else draw_noise(batch, *stream, 2)
        if forced >= self.method.data_forcing:
            text = self.student.encode_text(batch.prompts)
            return Clips(rollout(self.student.velocity, noise, sigmas, text, grad_steps=grad_steps).x0, text)
        real, text = self.real_clips(batch)
        first = int(place * (grad_steps[-1] + 1))  # one step that carries gradient is always left
        start = add_noise(real, noise, sigmas[first].to(real).expand(len(real)))
        left = [step - first for step in grad_steps if step >= first]
        return Clips(rollout(self.student.velocity, start, sigmas[first:], text, grad_steps=left).x0, text, real)

    def logit(self, gan: Discriminator, made: Clips, batch: PromptBatch) -> Tensor:
        """Of clips of a batch `[B]`, noised to a level and with noise that are the same for all clips of a prompt."""
        latents, _, sigma = self.matching.noised(made.x0, batch, DISCRIMINATOR)
        return gan(latents, sigma, made.text)[1]

    def policy_term(self, gan: Discriminator, batch: PromptBatch, policy: PolicyConfig) -> Tensor:
        """Noisy rollouts of each prompt, the more real ones made likelier: 0-d, with gradient to the student."""
        sigmas, text = self.student.sigmas(batch.num_steps, self.shift), self.student.encode_text(batch.prompts)
        paths = noisy_paths(self.student, batch, sigmas, policy)
        with torch.no_grad():
            logits = torch.stack([self.logit(gan, Clips(path.x0, text), batch) for path in paths])
        return policy_loss(Group(paths, tuple(map(RewardScores, logits)), policy), logits).mean()

    def real_clips(self, batch: PromptBatch) -> tuple[Tensor, TextCondition]:
        """Clips `[B, C, F, H, W]` that count as real, and their text: a part's own of the cache, or the teacher's."""
        if self.clips is None:
            return self.teacher.guide(batch).trajectory.x0, self.student.encode_text(batch.prompts)
        latents, text = self.clips(batch.index)
        rows = slice(batch.part * len(batch.prompts), (batch.part + 1) * len(batch.prompts))
        where = self.student.device
        return latents[rows].to(where), text.map(lambda part: part[rows].to(where))

    def follow(self, updates: int, *, resumed: bool = False) -> None:
        """With implicit distribution alignment the fake score moves towards the student (SenseFlow, section 4.1)."""
        super().follow(updates, resumed=resumed)
        if self.method.ida is not None and not resumed:
            update_ema(self.matching.fake.weights, self.student.weights, self.method.ida)
