"""What the training loop knows of a method, RATS or a rival, and what methods share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from rats_video.config.distill import StudentConfig
from rats_video.config.schema import OptimizerConfig
from rats_video.diffusion.rollout import rollout
from rats_video.distill.finite import SKIPPED, finite_clips, only, shield, warn_skipped
from rats_video.distill.judge import judge
from rats_video.distill.real_data import RealData
from rats_video.distill.teacher import TeacherSampler
from rats_video.types import Backbone, PromptBatch, Reward, RewardScores, Trajectory

Row = dict[str, float]
"""What is logged of a batch: `loss` and `reward/skipped` always, the rest by `group/name`."""


@dataclass(frozen=True)
class Companion:
    """A network that learns beside the student, before each of its updates: DMD's fake score, a discriminator.

    Args:
        weights: what of it trains; they go into every checkpoint, with their optimizer's state.
        loss: `(batch, round) -> 0-d tensor with gradient to the weights, row to log` of the batch that the student is
            about to learn from. What it draws is a pure function of the batch's seeds and the round.
        optimizer: its own.
        rounds: updates before each one of the student.
    """

    weights: Mapping[str, nn.Parameter]
    loss: Callable[[PromptBatch, int], tuple[Tensor, Row]]
    optimizer: OptimizerConfig
    rounds: int = 1


class Method(Protocol):
    """An objective: the loss of a batch, and who else learns. `rats_video/rivals/` has one file for each rival."""

    @property
    def student(self) -> Backbone:
        """Who is trained."""
        ...

    @property
    def teacher(self) -> TeacherSampler:
        """The many-step sampler, whether or not the loss asks for its rollouts."""
        ...

    @property
    def reward(self) -> Reward:
        """What is trained on, or only logged."""
        ...

    @property
    def student_config(self) -> StudentConfig:
        """Its step counts, and which steps carry gradient."""
        ...

    @property
    def shift(self) -> float:
        """Of the sigma grid."""
        ...

    @property
    def real_data(self) -> RealData | None:
        """Real clips that the loop adds a term for."""
        ...

    @property
    def companions(self) -> Mapping[str, Companion]:
        """Networks that learn beside the student, by the name of their files in a checkpoint."""
        ...

    def step(self, batch: PromptBatch) -> tuple[Tensor, Row]:
        """Loss of one batch, a 0-d tensor with gradient to the student, and what to log of it."""
        ...

    def follow(self, updates: int, *, resumed: bool = False) -> None:
        """After the student's `updates`-th update: what moves after it does.

        `resumed` only tells how many updates are done: what moves came with the checkpoint, or the step is left out.
        """
        ...


class TeacherAndStudent:
    """What holds of a method where nobody else learns."""

    student: Backbone
    teacher: TeacherSampler

    @property
    def companions(self) -> Mapping[str, Companion]:
        """None."""
        return {}

    def follow(self, updates: int, *, resumed: bool = False) -> None:
        """An EMA teacher moves after the student."""
        self.teacher.follow(self.student, updates, resumed=resumed)


@dataclass(frozen=True)
class Players(TeacherAndStudent):
    """Who takes part in every method; a rival is a subclass that has a `step`."""

    student: Backbone
    teacher: TeacherSampler
    reward: Reward
    student_config: StudentConfig
    shift: float
    real_data: RealData | None = None


def student_path(
    players: Method | Players, batch: PromptBatch, grad_steps: Collection[int] | None = None
) -> Trajectory:
    """The student's own few-step trajectory from the shared noise, kept at every noise level below 1.

    `grad_steps` carry gradient; None takes those of the configuration.
    """
    if grad_steps is None:
        grad_steps = players.student_config.gradient_steps(batch.num_steps)
    return rollout(
        players.student.velocity,
        batch.noise,
        players.student.sigmas(batch.num_steps, players.shift),
        players.student.encode_text(batch.prompts),
        keep=range(1, batch.num_steps + 1),
        grad_steps=grad_steps,
    )


def judged_clip(
    players: Method | Players, batch: PromptBatch, x0: Tensor, *, with_gradient: bool
) -> tuple[RewardScores, Row]:
    """The reward of clean latents `[B, C, F, H, W]`, and its part of the row.

    A clip whose score is not finite scores 0, passes no gradient on and is counted.
    """
    clip = x0.view_as(x0)  # gradient from pixels comes back here, no other does
    with torch.set_grad_enabled(with_gradient):
        scores = judge(players.reward, players.student, clip, batch.prompts, batch.grad_frames)
    kept = finite_clips(scores)
    shield(clip, kept)
    scores = only(scores, kept)
    if not bool(kept.all()):
        warn_skipped(batch.prompts, kept)
    row = {"reward/student": scores.clip, SKIPPED: (~kept).float()}
    row |= {f"reward/student/{name}": part for name, part in scores.parts.items()}
    return scores, {name: float(value.detach().mean()) for name, value in row.items()}
