"""The teacher: a many-step sampler whose trajectory and reward the student is measured against."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from rats_video.condition import Condition
from rats_video.config.fields import Config, NonNegativeInt, PositiveFloat, PositiveInt, SolverSteps
from rats_video.config.guidance import AudioVideoGuidance
from rats_video.diffusion.guidance import GuidanceScale, guided, scale_of
from rats_video.diffusion.rollout import rollout
from rats_video.methods.horizon import at_horizons, match_horizons, match_levels
from rats_video.methods.scoring import score_clips
from rats_video.optim import ema_update_
from rats_video.timing import phase
from rats_video.types import Backbone, Guide, PromptBatch, Reward, RewardScores, Trajectory, guided_calls

NegativePrompt = Annotated[
    str, Field(description="what guidance leads away from; empty, as the stock pipelines have it, is no prompt")
]


GuidanceScale2 = Annotated[
    PositiveFloat | None,
    Field(description="of the second expert (Wan 2.2 A14B's low noise); null = guidance_scale for both"),
]
Further = Annotated[
    AudioVideoGuidance | None,
    Field(
        description="what LTX-2 is guided by beside the text; null is the text alone, at one scale",
        exclude_if=lambda further: further is None,
    ),
]
Asked = Annotated[
    float,
    Field(
        gt=0, le=1,
        description="share of clips that it is rolled out for; their shaping weighs 1 / share, so the mean is kept",
    ),
]  # fmt: skip
AskedBy = Annotated[
    Literal["clip", "update"],
    Field(description="it is asked about some clips of each update, or about all of some updates"),
]

AskedFollows = Annotated[
    Literal["gate"] | None,
    Field(
        description="gate: `asked` is the share while the gate is 1, and falls with its average; null = it stays",
        exclude_if=lambda follows: follows is None,
    ),
]
AskedLeast = Annotated[
    float, Field(gt=0, le=1, description="share below which it does not fall", exclude_if=lambda least: least == _LEAST)
]
_LEAST = 0.05


class FrozenTeacherConfig(Config):
    """The base model, sampled with many steps."""

    kind: Literal["frozen"]
    num_steps: SolverSteps = Field(48, description="solver steps; a multiple of the student's, so that horizons nest")
    guidance_scale: PositiveFloat = Field(3.0, description="of classifier-free guidance; 1 is off and halves its calls")
    guidance_scale_2: GuidanceScale2 = None
    further_guidance: Further = None
    negative_prompt: NegativePrompt = ""
    reuse: PositiveInt = Field(1, description="student updates served by one teacher rollout")
    asked: Asked = 1.0
    asked_by: AskedBy = "clip"
    asked_follows: AskedFollows = None
    asked_least: AskedLeast = _LEAST
    cache: str | None = Field(None, description="folder where rollouts are stored and found again by later runs")

    @property
    def calls_per_step(self) -> int:
        """Network evaluations of one guided call."""
        return guided_calls(self.guidance_scale, self.further_guidance)

    def guided_share(self, steps: int) -> float:  # noqa: ARG002  # it never fades
        """The share of a run of `steps` updates in which it is guided."""
        return float(self.guidance_scale != 1.0)


class EmaTeacherConfig(Config):
    """The running average of the student's weights, sampled with many steps (as published)."""

    kind: Literal["ema"]
    decay: float = Field(0.99, ge=0, lt=1, description="share of the average that an update keeps")
    num_steps: SolverSteps = Field(48, description="solver steps; a multiple of the student's, so that horizons nest")
    guidance_scale: PositiveFloat = Field(1.0, description="at the start")
    guidance_scale_2: GuidanceScale2 = None
    guidance_end: PositiveFloat = Field(1.0, description="at guidance_fade_steps: the student absorbs guidance itself")
    guidance_fade_steps: NonNegativeInt = Field(0, description="updates from guidance_scale to guidance_end")
    further_guidance: Further = None
    negative_prompt: NegativePrompt = ""
    reuse: PositiveInt = Field(1, description="student updates served by one teacher rollout")
    asked: Asked = 1.0
    asked_by: AskedBy = "clip"
    asked_follows: AskedFollows = None
    asked_least: AskedLeast = _LEAST

    @property
    def calls_per_step(self) -> int:
        """Network evaluations of one guided call, while guidance lasts."""
        return guided_calls(
            self.guidance_scale if self.guidance_scale != 1.0 else self.guidance_end, self.further_guidance
        )

    def guided_share(self, steps: int) -> float:
        """The share of a run of `steps` updates in which it is guided: guidance may fade to none."""
        if self.guidance_end != 1.0:
            return 1.0
        return min(1.0, self.guidance_fade_steps / steps) if self.guidance_scale != 1.0 else 0.0


TeacherConfig = Annotated[FrozenTeacherConfig | EmaTeacherConfig, Field(discriminator="kind")]


@dataclass(frozen=True)
class TeacherRollout:
    """A teacher rollout as the student sees it: latents at the student's noise levels, and the clip's scores.

    `seconds` is the time it took, if it was made for a cache.
    """

    trajectory: Trajectory
    scores: RewardScores
    seconds: float = 0.0


class RolloutCache(Protocol):
    """Rollouts of a teacher that never changes, found again by batch."""

    def load(self, batch: PromptBatch) -> TeacherRollout | None:
        """The stored rollout, or None."""
        ...

    def save(self, batch: PromptBatch, rollout: TeacherRollout) -> None:
        """Keep a rollout."""
        ...


class TeacherSampler:
    """Rolls the teacher out without gradient.

    Args:
        backbone: the teacher's own model: the base for a frozen teacher, a twin of the student for an EMA one.
        reward: scores the decoded clips.
        cfg: its settings.
        shift: of the sigma grid, the student's own.
        predictions: True if its rollouts also have the clean clips predicted at the student's noise levels.
        cache: of a frozen teacher's rollouts, if there is one.
    """

    def __init__(
        self,
        backbone: Backbone,
        reward: Reward,
        cfg: FrozenTeacherConfig | EmaTeacherConfig,
        shift: float,
        cache: RolloutCache | None = None,
        *,
        predictions: bool = False,
    ) -> None:
        self.backbone, self.cfg, self._predictions = backbone, cfg, predictions
        self._reward, self._shift, self._cache = reward, shift, cache
        self._negative = backbone.encode_text([cfg.negative_prompt])
        self._index = -1
        self._rollouts: dict[int, TeacherRollout] = {}  # of this batch, by micro-batch
        self._trajectories: dict[int, Trajectory] = {}  # likewise
        self._updates = 0
        self._saved_seconds = 0.0

    @property
    def guidance_scale(self) -> GuidanceScale:
        """The current scale: an EMA teacher's fades as the student absorbs guidance into its own weights."""
        cfg = self.cfg
        first, second = cfg.guidance_scale, cfg.guidance_scale_2
        if isinstance(cfg, EmaTeacherConfig):
            progress = min(1.0, self._updates / max(1, cfg.guidance_fade_steps))
            first += progress * (cfg.guidance_end - first)
            second = None if second is None else second + progress * (cfg.guidance_end - second)
        return scale_of(self.backbone, first, second)

    @property
    def guide(self) -> Guide:
        """How it is guided."""
        return self.backbone.guidance(self.cfg.further_guidance)

    @phase("teacher")
    @torch.no_grad()
    def rollout(self, batch: PromptBatch) -> TeacherRollout:
        """The rollout for a batch; one rollout serves all the updates that see the same batch."""
        self._forget_other_batches(batch.index)
        if batch.micro_batch in self._rollouts:
            return self._rollouts[batch.micro_batch]
        if self._cache is None:
            made = self._scored_rollout(batch)
        elif (found := self._cache.load(batch)) is not None:
            made = found
            self._saved_seconds += found.seconds
        else:
            began = time.perf_counter()
            made = self._scored_rollout(batch)
            if batch.noise.is_cuda:
                torch.cuda.synchronize()
            made = replace(made, seconds=time.perf_counter() - began)
            self._cache.save(batch, made)
        self._rollouts[batch.micro_batch] = made
        return made

    def take_saved_seconds(self) -> dict[str, float]:
        """To log: the seconds that rollouts found in the cache since the last call had taken to make, if any were."""
        saved, self._saved_seconds = self._saved_seconds, 0.0
        return {"saved_seconds": saved} if saved else {}

    @torch.no_grad()
    def trajectory(self, batch: PromptBatch) -> Trajectory:
        """Every point of the rollout for a batch, its noise first; never scored and never cached."""
        self._forget_other_batches(batch.index)
        if batch.micro_batch not in self._trajectories:
            sigmas = self.backbone.sigmas(self.cfg.num_steps, self._shift)
            self._trajectories[batch.micro_batch] = self._rollout(batch, sigmas, keep=range(len(sigmas)))
        return self._trajectories[batch.micro_batch]

    def _forget_other_batches(self, index: int) -> None:
        if index != self._index:
            self._index, self._rollouts, self._trajectories = index, {}, {}

    @phase("teacher")
    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition, guidance: float | None = None) -> Tensor:
        """The teacher's guided velocity `[B, C, F, H, W]` at noise levels `[B]`: two evaluations a clip, or one.

        A `guidance` scale takes the place of a guided teacher's own.
        """
        if self.guidance_scale == 1.0:
            return self.backbone.velocity(latents, sigma, condition)
        guiding = guided(self.backbone.velocity, self._negative, guidance or self.guidance_scale, self.guide)
        return guiding(latents, sigma, condition)

    def _scored_rollout(self, batch: PromptBatch) -> TeacherRollout:
        sigmas = self.backbone.sigmas(self.cfg.num_steps, self._shift)
        student = self.backbone.sigmas(batch.num_steps, self._shift)
        horizons = match_horizons(student, sigmas)
        called = match_levels(student[:-1], sigmas[:-1]) if self._predictions else None
        path = self._rollout(batch, sigmas, horizons.keep, () if called is None else called.keep)
        scores = score_clips(self._reward, self.backbone, path.x0, batch.prompts)
        seen = at_horizons(path, horizons.sigmas)
        if called is not None and path.predictions is not None:
            seen = replace(seen, predictions=at_horizons(path.predictions, called.sigmas))
        return TeacherRollout(seen, scores)

    def _rollout(
        self, batch: PromptBatch, sigmas: Tensor, keep: Collection[int], predict: Collection[int] = ()
    ) -> Trajectory:
        return rollout(
            self.backbone.velocity,
            batch.noise,
            sigmas,
            batch.condition(self.backbone),
            negative=self._negative,
            guidance_scale=self.guidance_scale,
            guide=self.guide,
            keep=keep,
            predict=predict,
        )

    def update_ema(self, student: Backbone, updates: int, *, resumed: bool = False) -> None:
        """Called after the student's `updates`-th update: moves an EMA teacher, not a frozen one.

        With `resumed` it only sets the counter: the average came with the checkpoint, or the step was skipped.
        """
        self._updates = updates
        if isinstance(self.cfg, EmaTeacherConfig) and not resumed:
            ema_update_(self.backbone.weights, student.weights, self.cfg.decay)
