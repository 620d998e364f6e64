"""Distribution matching distillation, DMD2 (arXiv 2405.14867), the core of SenseFlow and AdvDMD.

The matched clips come from noise, as when the student is used (DMD2's backward simulation, section 4.5). A student
that re-noises (`student.sampler`) trains as DMD2's do: it is rolled out without gradient to one of its noise levels,
drawn for each batch, and the clean clip that it predicts there has the gradient of that one call. An Euler student's
early predictions are never shown: its clip is that of the whole rollout, with gradient through all steps. Either way
`student.grad_steps` narrows the steps that learn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rats_video.condition import Condition
from rats_video.config.fields import Config, NonNegativeFloat, PositiveFloat
from rats_video.diffusion.flow import add_noise
from rats_video.diffusion.rollout import rollout
from rats_video.methods.base import WITH_GRADIENT, BaseMethod, BaseMethodConfig, Critic, LogRow, StepsConfig
from rats_video.methods.context import MethodContext
from rats_video.methods.discriminator import Discriminator, GanConfig, build_head
from rats_video.methods.distribution_matching import (
    NAME,
    DistributionMatching,
    FakeScoreConfig,
    TrainsFakeScore,
    build_matching,
)
from rats_video.methods.draws import DISCRIMINATOR, FAKE_SCORE, REAL, RENOISE, STUDENT_LEVEL, draw_noise
from rats_video.methods.finite import SKIPPED
from rats_video.methods.policy import Group, PolicyConfig, policy_loss, sample_rollouts
from rats_video.methods.real_data import RealSource
from rats_video.methods.student import score_student_clip, step_noise
from rats_video.optim import ema_update_
from rats_video.seeds import seeded
from rats_video.types import PromptBatch, RewardScores


class AdversarialRewardConfig(Config):
    """The discriminator's logit as a reward that noisy rollouts are compared by (AdvDMD, arXiv 2604.28126).

    As we read it: the discriminator knows clips at all levels of noise and learns along with the student, so that its
    reward is no fixed one to be hacked. AdvDMD's schedule, more of the policy as training goes on, is not in it.
    """

    weight: PositiveFloat = Field(0.1, description="of the policy gradient in the loss")
    policy: PolicyConfig = PolicyConfig()


class Dmd2Config(TrainsFakeScore, BaseMethodConfig):
    """Loss = distribution matching (- reward_weight * R_student) (+ gan.weight * gan), on the student's last clip.

    With `adversarial_reward` a policy gradient joins them.
    """

    draws_levels: ClassVar[bool] = True

    kind: Literal["dmd2"]
    fake_score: FakeScoreConfig = FakeScoreConfig()
    reward_weight: NonNegativeFloat = Field(0.0, description="of the reward's own gradient beside it; 0 leaves it out")
    gan: GanConfig | None = None
    adversarial_reward: AdversarialRewardConfig | None = None
    ida: float | None = Field(
        None, ge=0, lt=1,
        description="implicit distribution alignment (SenseFlow, arXiv 2506.00523): after each update of the student "
        "the fake score keeps this much of its weights and takes the rest from the student's, e.g. 0.97",
    )  # fmt: skip
    data_forcing: float = Field(
        0.0, ge=0, le=1,
        description="share of updates (0.5 is published) on clips of `real_data`, noised to a level of the student: "
        "it goes on from there, and the teacher is asked about the real clip (Data-Forcing, arXiv 2606.18478, eq. 10)",
    )  # fmt: skip

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Self:
        if self.data_forcing and self.real_data is None:
            raise ValueError("data_forcing needs real_data, a cache; its weight may be 0")
        if self.adversarial_reward is not None and self.gan is None:
            raise ValueError("adversarial_reward is the logit of a discriminator: it needs gan")
        return self

    @property
    def uses_gradient(self) -> bool:
        """True with a weight on the reward."""
        return self.reward_weight > 0

    @property
    def uses_teacher(self) -> bool:
        """True if its rollouts are the discriminator's real clips."""
        return self.gan is not None and self.real_data is None

    @property
    def needs_euler(self) -> str | None:
        """The policy of an adversarial reward, unless its steps are those of a re-noising student."""
        return None if self.adversarial_reward is None else self.adversarial_reward.policy.needs_euler

    def simulates(self, steps: StepsConfig) -> bool:
        """True of a student that re-noises."""
        return steps.sampler == "renoise"

    def for_plan(self) -> Self:
        """Without starts at real clips."""
        return self.model_copy(update={"data_forcing": 0.0})

    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:
        """Rollouts for student and fake score, its updates, the gradient; a mean if some begin at real clips."""
        share = 1 - self.data_forcing * (1 - (num_steps + 1) / 2 / num_steps)  # of a rollout's steps that are made
        return self._evaluations(num_steps, share * student, share * num_steps, teacher, guided)

    def evaluations_of(self, steps: StepsConfig, num_steps: int, teacher: float, guided: float) -> float:
        """Of a student that re-noises, the mean over the levels that it is simulated to; from real clips one call."""
        if steps.sampler == "euler":
            return super().evaluations_of(steps, num_steps, teacher, guided)
        levels = steps.gradient_steps(num_steps)
        calls = 1 + (1 - self.data_forcing) * sum(levels) / len(levels)
        return self._evaluations(num_steps, calls + WITH_GRADIENT - 1, calls, teacher, guided)

    def _evaluations(self, num_steps: int, student: float, sample: float, teacher: float, guided: float) -> float:
        found = student + self.fake_score.evaluations(sample, guided)
        if self.gan is not None:
            found += WITH_GRADIENT * (self.fake_score.rounds + 1) + teacher * self.uses_teacher
        if self.adversarial_reward is not None:
            policy = self.adversarial_reward.policy
            found += policy.evaluations(num_steps) + policy.samples
        return found

    def build(self, context: MethodContext) -> Dmd2:
        """Distribution matching, with the discriminator and real clips that the settings ask for."""
        inputs = context.inputs()
        critic, gan, clips = context.critic, None, None
        matching = build_matching(self.fake_score, inputs, critic)
        if self.gan is not None:
            features, width = context.critic_features()
            head = context.place(build_head(width, context.seed + 2))
            gan = Discriminator(features, head, self.gan, context.mean_of_tokens)
        if self.ida is not None:  # adapters start alike, or their factors' mean would be no adapter between the two
            ema_update_(critic.weights, inputs["student"].weights, decay=0.0)
        if self.real_data is not None and (self.data_forcing or self.gan):
            clips = lru_cache(maxsize=1)(context.clips(self.real_data))  # each round asks for them
        return Dmd2(**inputs, config=self, matching=matching, gan=gan, clips=clips, seed=context.seed)


@dataclass(frozen=True)
class GeneratedClips:
    """The student's clips of a text, and the real clips that it began at, if any; `[B, C, F, H, W]`."""

    x0: Tensor
    text: Condition
    real: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Dmd2(BaseMethod):
    """Loss = distribution matching, with the terms that the settings add.

    Args:
        matching: teacher and fake score.
        gan: the discriminator, if there is one.
        clips: `index of a batch -> real clips, text`, of this process's rows, where real clips are used.
        seed: of what is drawn once for a whole batch.
    """

    config: Dmd2Config
    matching: DistributionMatching
    gan: Discriminator | None = None
    clips: RealSource | None = None
    seed: int = 0

    def step(self, batch: PromptBatch) -> tuple[Tensor, LogRow]:
        """Loss of one batch, and what to log of it."""
        made = self.generate(batch, STUDENT_LEVEL)
        loss = self.matching.loss(made.x0, batch, condition=made.text, teacher_at=made.real).mean()
        row = {"matching/loss": float(loss.detach()), SKIPPED: 0.0}
        if self.gan is not None:
            logit = self.logit(self.gan, made, batch)
            loss = loss + self.gan.cfg.weight * self.gan.generator_loss(logit)
            row["gan/student"] = float(logit.detach().mean())
            if self.config.adversarial_reward is not None:
                policy = self.policy_term(self.gan, batch, self.config.adversarial_reward.policy)
                loss = loss + self.config.adversarial_reward.weight * policy
                row["policy/loss"] = float(policy.detach())
        if self.config.reward_weight > 0 and made.real is None:  # real clips' captions are not at hand
            scores, scored = score_student_clip(self, batch, made.x0, with_gradient=True)
            loss, row = loss - self.config.reward_weight * scores.clip.mean(), row | scored
        return loss, {"loss": float(loss.detach()), **row}

    @property
    def critics(self) -> Mapping[str, Critic]:
        """The fake score, with the discriminator's head where there is one."""
        weights = dict(self.matching.fake.weights)
        if self.gan is not None:
            weights |= {f"discriminator.{name}": weight for name, weight in self.gan.head.named_parameters()}
        cfg = self.config.fake_score
        return {NAME: Critic(weights, self.fake_score_loss, cfg.optimizer, cfg.rounds)}

    def fake_score_loss(self, batch: PromptBatch, index: int) -> tuple[Tensor, LogRow]:
        """Flow matching on clips that the student makes of new noise in a round; the discriminator learns along."""
        with torch.no_grad():
            made = self.generate(batch, FAKE_SCORE, index)
        if self.gan is None:
            return self.matching.fake_loss(made.x0, made.text, batch, index)
        latents, noise, sigma = self.matching.renoise(made.x0, batch, FAKE_SCORE, index)
        velocity, student = self.gan(latents, sigma, made.text)
        real, text = self.real_clips(batch)
        _, logit = self.gan(add_noise(real, draw_noise(batch, DISCRIMINATOR, index), sigma), sigma, text)
        flow, own = (
            self.matching.flow_error(velocity, made.x0, noise).mean(),
            self.gan.discriminator_loss(student, logit),
        )
        loss = flow + self.gan.cfg.fake_score_weight * own
        row = {"loss": loss, "flow": flow, "gan": own, "real": logit.mean(), "student": student.mean()}
        return loss, {name: float(value.detach()) for name, value in row.items()}

    def generate(self, batch: PromptBatch, *stream: int) -> GeneratedClips:
        """The student's clips: of the batch's own noise in its own step, of new noise in a round of the fake score.

        With data forcing, a share of the batches begins at real clips noised to one of the student's levels.
        """
        sigmas, grad_steps = self.steps(batch, *stream)
        forced, place = torch.rand(2, generator=seeded(self.seed, REAL, batch.index)).tolist()
        noise = batch.noise if stream == (STUDENT_LEVEL,) else draw_noise(batch, *stream, 2)
        fresh, real = step_noise(self.student_config, batch, *stream), None
        if forced >= self.config.data_forcing:
            first, text = 0, batch.condition(self.student)
        else:
            real, text = self.real_clips(batch)
            # One step that carries gradient is always left.
            first = grad_steps[0] if fresh is not None else int(place * (grad_steps[-1] + 1))
            noise = add_noise(real, noise, sigmas[first].to(real).expand(len(real)))
        left = [step - first for step in grad_steps if step >= first]
        path = rollout(self.student.velocity, noise, sigmas[first:], text, grad_steps=left, fresh=fresh)
        return GeneratedClips(path.x0, text, real)

    def steps(self, batch: PromptBatch, *stream: int) -> tuple[Tensor, Sequence[int]]:
        """Noise levels of the rollout that makes a clip, and its steps that carry gradient.

        A student that re-noises goes to one level, the same for all clips and processes, and from there to 0 at once.
        """
        sigmas = self.student.sigmas(batch.num_steps, self.shift)
        grad_steps = self.student_config.gradient_steps(batch.num_steps)
        if self.student_config.sampler == "euler":
            return sigmas, grad_steps
        generator = seeded(self.seed, RENOISE, batch.index, *stream)
        level = grad_steps[int(torch.randint(len(grad_steps), (), generator=generator))]
        return torch.cat([sigmas[: level + 1], sigmas[-1:]]), (level,)

    def logit(self, gan: Discriminator, made: GeneratedClips, batch: PromptBatch) -> Tensor:
        """Logits `[B]` of a batch's clips, noised; level and noise are the same for all clips of a prompt."""
        latents, _, sigma = self.matching.renoise(made.x0, batch, DISCRIMINATOR)
        return gan(latents, sigma, made.text)[1]

    def policy_term(self, gan: Discriminator, batch: PromptBatch, policy: PolicyConfig) -> Tensor:
        """Noisy rollouts of each prompt, the more real ones made likelier: 0-d, with gradient to the student."""
        sigmas, text = self.student.sigmas(batch.num_steps, self.shift), batch.condition(self.student)
        paths = sample_rollouts(self.student, batch, sigmas, policy)
        with torch.no_grad():
            logits = torch.stack([self.logit(gan, GeneratedClips(path.x0, text), batch) for path in paths])
        return policy_loss(Group(paths, tuple(map(RewardScores, logits)), policy), logits).mean()

    def real_clips(self, batch: PromptBatch) -> tuple[Tensor, Condition]:
        """Clips `[B, C, F, H, W]` that count as real, and their text: of the cache, or the teacher's rollouts."""
        if self.clips is None:
            return self.teacher.rollout(batch).trajectory.x0, batch.condition(self.student)
        latents, text = self.clips(batch.index)
        rows = slice(batch.micro_batch * len(batch.prompts), (batch.micro_batch + 1) * len(batch.prompts))
        where = self.student.device
        return latents[rows].to(where), text.map(lambda part: part[rows].to(where))

    def update_ema(self, updates: int, *, resumed: bool = False) -> None:
        """Update an EMA teacher; implicit distribution alignment moves the fake score (SenseFlow, section 4.1)."""
        super().update_ema(updates, resumed=resumed)
        if self.config.ida is not None and not resumed:
            ema_update_(self.matching.fake.weights, self.student.weights, self.config.ida)
