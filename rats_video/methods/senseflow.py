"""SenseFlow (arXiv 2506.00523): distribution matching that holds for large flow models.

To DMD2 (`methods/dmd2.py`) it adds implicit distribution alignment, which moves the fake score along with the student;
intra-segment guidance, which has each of the student's steps end where a step of the teacher and one of the student's
own from between would; a teacher whose guidance is drawn anew; and a discriminator of pixels (`methods/vision.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rats_video.config.fields import NonNegativeFloat
from rats_video.diffusion.flow import add_noise, euler_step
from rats_video.diffusion.rollout import rollout
from rats_video.methods.base import WITH_GRADIENT, BaseMethod, BaseMethodConfig, Critic, LogRow, StepsConfig
from rats_video.methods.context import MethodContext
from rats_video.methods.distribution_matching import (
    NAME,
    DistributionMatching,
    FakeScoreConfig,
    TrainsFakeScore,
    build_matching,
)
from rats_video.methods.draws import (
    DISCRIMINATOR,
    FAKE_SCORE,
    GUIDANCE,
    REAL,
    RENOISE,
    STUDENT_LEVEL,
    TRAJECTORY,
    draw_noise,
)
from rats_video.methods.finite import SKIPPED
from rats_video.methods.vision import VisionDiscriminator, VisionGanConfig, build_heads
from rats_video.optim import ema_update_
from rats_video.seeds import seeded
from rats_video.types import PromptBatch


class LogitNormalFakeScoreConfig(FakeScoreConfig):
    """A model of what the student makes now, at levels drawn as Stable Diffusion 3's are."""

    levels: tuple[float, float] = Field((0.001, 1.0), description="as of the others, all of them")
    density: Literal["uniform", "logit_normal"] = Field("logit_normal", description="as of the others")


class SenseFlowConfig(TrainsFakeScore, BaseMethodConfig):
    """Loss = distribution matching + isg_weight * intra-segment guidance + gan.weight * (1 - sigma)^2 * hinge loss.

    Each update learns from one step of the student, whose input is simulated, or is a noised clip of the teacher.
    """

    draws_levels: ClassVar[bool] = True

    kind: Literal["senseflow"]
    fake_score: LogitNormalFakeScoreConfig = LogitNormalFakeScoreConfig()
    ida: float | None = Field(
        0.97, ge=0, lt=1,
        description="implicit distribution alignment: after each update of the student the fake score keeps this much "
        "of its weights and takes the rest from the student's; null = off",
    )  # fmt: skip
    isg_weight: NonNegativeFloat = Field(1.0, description="of intra-segment guidance; 0 leaves it out")
    guidance: tuple[float, float] | None = Field(
        (1.0, 8.0),
        description="least and greatest scale of the teacher's guidance, drawn for each use of it; null is its own. A "
        "teacher without guidance (teacher.guidance_scale=1) stays without",
    )
    from_real: float = Field(
        0.5, ge=0, le=1, description="share of updates whose step begins at a clip of the teacher, noised"
    )
    gan: VisionGanConfig | None = VisionGanConfig()

    @model_validator(mode="after")
    def _guidance_rises(self) -> Self:
        if self.guidance is not None and not 0 < self.guidance[0] <= self.guidance[1]:
            raise ValueError(f"guidance {list(self.guidance)} must rise, above 0")
        return self

    @property
    def needs_euler(self) -> str | None:
        """Nothing: its steps are re-noised in training, however the student samples."""
        return None

    @property
    def uses_teacher(self) -> bool:
        """True if its clips are real ones."""
        return self.gan is not None or self.from_real > 0

    @property
    def pixel_gradient(self) -> bool:
        """True with a discriminator."""
        return self.gan is not None

    def simulates(self, steps: StepsConfig) -> bool:  # noqa: ARG002  # an Euler student too
        """True: each update is at one level."""
        return True

    def for_plan(self) -> Self:
        """Without starts at real clips: none is the longest."""
        return self.model_copy(update={"from_real": 0.0})

    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:  # noqa: ARG002
        """As `evaluations_of`, of a student whose every level learns."""
        return self._evaluations((num_steps - 1) / 2, teacher, guided)

    def evaluations_of(self, steps: StepsConfig, num_steps: int, teacher: float, guided: float) -> float:
        """A mean over the levels that the student is simulated to; from a real clip no call leads there."""
        levels = steps.gradient_steps(num_steps)
        return self._evaluations(sum(levels) / len(levels), teacher, guided)

    def _evaluations(self, level: float, teacher: float, guided: float) -> float:
        before = (1 - self.from_real) * level
        found = before + WITH_GRADIENT + self.fake_score.evaluations(before + 1, guided)
        return found + (guided + 1) * (self.isg_weight > 0) + teacher * self.uses_teacher

    def build(self, context: MethodContext) -> SenseFlow:
        """The method on the run's roles."""
        inputs, critic, gan = context.inputs(), context.critic, None
        matching = build_matching(self.fake_score, inputs, critic)
        if self.gan is not None:
            vision = context.vision(self.gan.vision)
            heads = context.place(build_heads(vision, self.gan, context.seed + 2))
            gan = VisionDiscriminator(vision, heads, self.gan, context.mean_of_tokens)
        if self.ida is not None:  # adapters start alike, or their factors' mean would be no adapter between the two
            ema_update_(critic.weights, inputs["student"].weights, decay=0.0)
        return SenseFlow(**inputs, config=self, matching=matching, gan=gan, seed=context.seed)


@dataclass(frozen=True)
class OneStep:
    """A step of the student.

    Args:
        latents: its input `[B, C, F, H, W]`, data.
        level: its index in the grid.
        x0: the clip that it predicts, with gradient.
    """

    latents: Tensor
    level: int
    x0: Tensor


@dataclass(frozen=True, kw_only=True)
class SenseFlow(BaseMethod):
    """Loss = distribution matching, intra-segment guidance and the discriminator's, of one step of the student.

    Args:
        matching: teacher and fake score.
        gan: the discriminator, if there is one.
        seed: of what is drawn once for a whole batch.
        known: real frames of the batch at work.
    """

    config: SenseFlowConfig
    matching: DistributionMatching
    gan: VisionDiscriminator | None = None
    seed: int = 0
    known: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)

    def step(self, batch: PromptBatch) -> tuple[Tensor, LogRow]:
        """Loss of one batch, and what to log of it."""
        made = self.one_step(batch, STUDENT_LEVEL)
        loss = self.matching.loss(made.x0, batch, guidance=self.draw_guidance(batch, 0)).mean()
        row = {"matching/loss": loss}
        if self.config.isg_weight > 0:
            row["isg/loss"] = self.isg_loss(made, batch)
            loss = loss + self.config.isg_weight * row["isg/loss"]
        if self.gan is not None:
            frames, real = self.frames(self.gan, made.x0, batch), self.real_frames(self.gan, batch)
            logits = self.gan(frames, real, batch, DISCRIMINATOR)
            own = self.time_weight(made, batch) * self.gan.generator_loss(logits).mean()
            row |= {"gan/loss": own, "gan/student": logits.mean()}
            loss = loss + self.gan.cfg.weight * own
        return loss, {SKIPPED: 0.0} | {name: float(each.detach()) for name, each in (row | {"loss": loss}).items()}

    def one_step(self, batch: PromptBatch, *stream: int) -> OneStep:
        """One step at a level that is the same for all clips and processes: re-noised to, or of a noised real clip."""
        sigmas, text = self.student.sigmas(batch.num_steps, self.shift), batch.condition(self.student)
        generator = seeded(self.seed, RENOISE, batch.index, *stream)
        levels = self.student_config.gradient_steps(batch.num_steps)
        level = levels[int(torch.randint(len(levels), (), generator=generator))]
        noise, first = batch.noise if stream == (STUDENT_LEVEL,) else draw_noise(batch, *stream, 2), 0
        if float(torch.rand((), generator=seeded(self.seed, REAL, batch.index, *stream))) < self.config.from_real:
            real, first = self.teacher.rollout(batch).trajectory.x0, level
            noise = add_noise(real, noise, sigmas[level].to(real).expand(len(real)))
        path = rollout(
            self.student.velocity, noise, torch.cat([sigmas[first : level + 1], sigmas[-1:]]), text,
            keep=(level - first,), grad_steps=(level - first,), fresh=partial(draw_noise, batch, RENOISE, *stream),
        )  # fmt: skip
        return OneStep(path.latents[0], level, path.x0)

    def isg_loss(self, made: OneStep, batch: PromptBatch) -> Tensor:
        """Intra-segment guidance (section 4.2), 0-d: where the step lands, against the way by a level within it.

        The teacher leads from the step's level to that one, the student without gradient from there to the step's end:
        that is the target. The distance is the published code's, `sqrt(d^2 + 1e-6) - 1e-3`; in the paper it is d^2.
        """
        sigma, end = self.student.sigmas(batch.num_steps, self.shift)[made.level : made.level + 2].to(made.x0).unbind()
        u = torch.rand((), generator=seeded(self.seed, TRAJECTORY, batch.index)).to(sigma)
        middle = end + (sigma - end) * (MARGIN + (1 - 2 * MARGIN) * u)
        text, rows = batch.condition(self.student), (len(made.latents),)
        with torch.no_grad():
            guidance = self.draw_guidance(batch, 1)
            slope = self.teacher.velocity(made.latents, sigma.expand(rows), text, guidance)
            between = euler_step(made.latents, slope, sigma, middle)
            slope = self.student.velocity(between, middle.expand(rows), text)
            target = euler_step(between, slope, middle, end)
        landed = euler_step(made.latents, (made.latents - made.x0) / sigma, sigma, end)
        return ((landed - target).square() + CHARBONNIER**2).sqrt().mean() - CHARBONNIER

    def draw_guidance(self, batch: PromptBatch, use: int) -> float | None:
        """The teacher's scale, the same for all clips of a batch; None is its own."""
        if self.config.guidance is None:
            return None
        low, high = self.config.guidance
        return low + (high - low) * float(torch.rand((), generator=seeded(self.seed, GUIDANCE, batch.index, use)))

    def time_weight(self, made: OneStep, batch: PromptBatch) -> float:
        """`(1 - sigma)^2` of the step's level."""
        return float((1 - self.student.sigmas(batch.num_steps, self.shift)[made.level]) ** 2)

    def frames(self, gan: VisionDiscriminator, x0: Tensor, batch: PromptBatch) -> Tensor:
        """Those of the student's clips that are judged, `[B, N, 3, height, width]` in [0, 1]."""
        return gan.seen(self.student.decode(x0, batch.grad_frames))

    @torch.no_grad()
    def real_frames(self, gan: VisionDiscriminator, batch: PromptBatch) -> Tensor:
        """The same of the teacher's clips of the batch's prompts, decoded once for all rounds and updates of it."""
        key = (batch.index, batch.micro_batch)
        if key not in self.known:
            for old in [each for each in self.known if each[0] != batch.index]:
                del self.known[old]
            self.known[key] = gan.seen(self.teacher.backbone.decode(self.teacher.rollout(batch).trajectory.x0))
        return self.known[key]

    @property
    def critics(self) -> Mapping[str, Critic]:
        """The fake score, with the discriminator's heads where there is one."""
        weights, cfg = dict(self.matching.fake.weights), self.config.fake_score
        if self.gan is not None:
            weights |= {f"discriminator.{name}": weight for name, weight in self.gan.heads.named_parameters()}
        return {NAME: Critic(weights, self.fake_score_loss, cfg.optimizer, cfg.rounds)}

    def fake_score_loss(self, batch: PromptBatch, index: int) -> tuple[Tensor, LogRow]:
        """Flow matching on the clips of a step from new noise; the discriminator learns from the same clips."""
        with torch.no_grad():
            made = self.one_step(batch, FAKE_SCORE, index)
        flow, row = self.matching.fake_loss(made.x0, batch.condition(self.student), batch, index)
        if self.gan is None:
            return flow, row
        with torch.no_grad():
            frames, real = self.frames(self.gan, made.x0, batch), self.real_frames(self.gan, batch)
        logit, truth = (
            self.gan(each, real, batch, DISCRIMINATOR, index, side) for side, each in enumerate((frames, real))
        )
        own = self.gan.mean_of_processes(self.gan.discriminator_loss(logit, truth).mean())
        own = self.time_weight(made, batch) * own
        parts = {"flow": flow, "gan": own, "real": truth.mean(), "student": logit.mean(), "loss": flow + own}
        return flow + own, {name: float(each.detach()) for name, each in parts.items()}

    def update_ema(self, updates: int, *, resumed: bool = False) -> None:
        """Implicit distribution alignment moves the fake score (section 4.1)."""
        super().update_ema(updates, resumed=resumed)
        if self.config.ida is not None and not resumed:
            ema_update_(self.matching.fake.weights, self.student.weights, self.config.ida)


MARGIN = 0.05
"""Of a step's length, that the level within it keeps from both ends: 20 of 1000 where four steps share them."""

CHARBONNIER = 1e-3
