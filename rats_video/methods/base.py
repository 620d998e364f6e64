"""Base classes of methods and their settings, the protocol that the training loop sees, and functions they share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from rats_video.config.fields import Config, NonNegativeFloat, NonNegativeInt, PositiveInt, SolverSteps
from rats_video.methods.real_data import RealData, RealDataConfig
from rats_video.methods.teacher import TeacherSampler
from rats_video.optim import OptimizerConfig
from rats_video.types import Backbone, PromptBatch, Reward, SamplerKind


class StepsConfig(Config):
    """The student's sampler, its step counts, and which of its steps carry gradient."""

    num_steps: tuple[SolverSteps, ...] = Field((4,), min_length=1, description="NFE trained for; several take turns")
    grad_steps: PositiveInt | tuple[NonNegativeInt, ...] | None = Field(
        None, description="how many of the last steps carry gradient, or which (0 is the first); null = all"
    )
    sampler: SamplerKind = Field(
        "euler", description="how it steps; renoise draws its noise anew (diffusers' LCM), cps most of it (RTDMD)"
    )

    @model_validator(mode="after")
    def _every_nfe_learns(self) -> Self:
        for num_steps in self.num_steps:
            if isinstance(self.grad_steps, tuple) and not self.gradient_steps(num_steps):
                raise ValueError(
                    f"no step of {num_steps} (0 to {num_steps - 1}) is in grad_steps {list(self.grad_steps)}"
                )
        return self

    def gradient_steps(self, num_steps: int) -> tuple[int, ...]:
        """The steps, of `num_steps` solver steps, that carry gradient."""
        match self.grad_steps:
            case None:
                return tuple(range(num_steps))
            case int(last):
                return tuple(range(max(0, num_steps - last), num_steps))
            case chosen:
                return tuple(step for step in chosen if step < num_steps)

    def most_gradient_steps(self, num_steps: int) -> int:
        """How many of them one update has in memory: of a student that re-noises one."""
        return 1 if self.sampler == "renoise" else len(self.gradient_steps(num_steps))


WITH_GRADIENT = 3
"""Network evaluations that one with its backward pass counts as."""


class BaseMethodConfig(Config):
    """Keys of every method, and questions that the run asks of it."""

    draws_levels: ClassVar[bool] = False
    """True if the model is called at noise levels that each clip draws for itself."""

    least_steps: ClassVar[int] = 1
    """Solver steps without which nothing would be learned."""

    uses_trajectory: ClassVar[bool] = False
    """True if the loss needs every point of the teacher's rollouts."""

    can_strengthen_shaping: ClassVar[bool] = False
    """True if the guard may strengthen the loss's shaping."""

    drift_weight: NonNegativeFloat = Field(
        0.0, description="pull of the weights towards where they started: half this times the squared distance"
    )
    real_data: RealDataConfig | None = Field(None, description="flow matching on real clips beside it; null = none")

    @property
    def critic_rounds(self) -> int:
        """Updates of that role before each one of the student."""
        return 0

    @property
    def critic_optimizer(self) -> OptimizerConfig | None:
        """Of the role that learns beside the student; None where there is none."""
        return None

    @property
    def uses_gradient(self) -> bool:
        """True if the reward's own gradient is in the loss."""
        return False

    @property
    def pixel_gradient(self) -> bool:
        """True if gradient comes to the student through decoded pixels: the reward's, or a discriminator's."""
        return self.uses_gradient

    @property
    def uses_teacher(self) -> bool:
        """True if the loss needs teacher rollouts."""
        return False

    @property
    def needs_euler(self) -> str | None:
        """What a re-noising student does not go with, as a clause; None if nothing."""
        return "learns from points of an Euler trajectory"

    @property
    def needs_every_teacher(self) -> str | None:
        """What of it needs the teacher's rollout of every clip, if anything."""
        return "the loss" if self.uses_teacher or self.uses_trajectory else None

    @property
    def compares_predictions(self) -> bool:
        """True if teacher and student are compared by the clean clips that their calls predict."""
        return False

    @property
    def policy_samples(self) -> int:
        """Further rollouts of the student, a clip and update, decoded and scored beside its own."""
        return 0

    @property
    def further_rewards(self) -> Mapping[str, tuple[Any, float]]:
        """Rewards in the loss beside the run's: settings, of a type that methods do not see, and weights."""
        return {}

    def needs_other_noise(self, share: float) -> str | None:  # noqa: ARG002
        """What a student that draws a share in (0, 1) of its noise anew does not go with, as a clause, if anything."""
        return "knows no such sampler"

    def simulates(self, steps: StepsConfig) -> bool:  # noqa: ARG002
        """True if an update learns from one step alone, whose input is simulated without gradient."""
        return False

    def for_plan(self) -> Self:
        """The settings without what a plan does not see: a reward's parts, and starts at real clips."""
        return self

    def check_horizons(self, num_steps: int) -> None:
        """Raise UserError if teacher and student cannot be compared at that many student steps."""

    @abstractmethod
    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:
        """Network evaluations a clip and update; one with gradient counts `WITH_GRADIENT`.

        Args:
            num_steps: the student's.
            student: evaluations of its rollout with the gradient that `student.grad_steps` asks for.
            teacher: evaluations of a teacher rollout.
            guided: evaluations of one call of the guided teacher.
        """

    def evaluations_of(self, steps: StepsConfig, num_steps: int, teacher: float, guided: float) -> float:
        """The same of a run's student, as its `steps` say."""
        student = num_steps + (WITH_GRADIENT - 1) * len(steps.gradient_steps(num_steps))
        return self.evaluations(num_steps, student, teacher, guided)


LogRow = dict[str, float]
"""Numbers logged of a batch: `loss` and `reward/skipped` always, the rest by `group/name`."""


@dataclass(frozen=True)
class Critic:
    """A network that learns beside the student, before each of its updates: DMD's fake score, a discriminator.

    Args:
        weights: its trained weights; they go into every checkpoint, with their optimizer's state.
        loss: `(batch, round) -> 0-d tensor with gradient to the weights, row to log` of the batch that the student is
            about to learn from. What it draws is a pure function of the batch's seeds and the round.
        optimizer: its own.
        rounds: updates before each one of the student.
        until: index of the first batch in which it learns no more; None = it always learns.
    """

    weights: Mapping[str, nn.Parameter]
    loss: Callable[[PromptBatch, int], tuple[Tensor, LogRow]]
    optimizer: OptimizerConfig
    rounds: int = 1
    until: int | None = None


class Method(Protocol):
    """An objective: the loss of a batch, and the networks that learn. `rats_video/methods/` has one file a kind."""

    @property
    def student(self) -> Backbone:
        """The model being trained."""
        ...

    @property
    def teacher(self) -> TeacherSampler:
        """The many-step sampler, even if the loss does not use its rollouts."""
        ...

    @property
    def reward(self) -> Reward:
        """The reward in the loss, or one that is only logged."""
        ...

    @property
    def student_config(self) -> StepsConfig:
        """The student's step counts, and which steps carry gradient."""
        ...

    @property
    def shift(self) -> float:
        """Shift of the sigma grid."""
        ...

    @property
    def real_data(self) -> RealData | None:
        """Real clips that the loop adds a term for."""
        ...

    @property
    def critics(self) -> Mapping[str, Critic]:
        """Networks that learn beside the student, by the name of their files in a checkpoint."""
        ...

    def step(self, batch: PromptBatch) -> tuple[Tensor, LogRow]:
        """Loss of one batch, a 0-d tensor with gradient to the student, and what to log of it."""
        ...

    def update_ema(self, updates: int, *, resumed: bool = False) -> None:
        """Called after each student update; updates the averages of its weights.

        With `resumed` it only sets the counter: the averages came with the checkpoint, or the step was skipped.
        """
        ...

    def with_shaping(self, strength: float) -> Method:
        """The method with its shaping this many times as strong; itself if it has none."""
        ...


@dataclass(frozen=True)
class BaseMethod:
    """The fields of every method; a kind is a subclass that has a `step`."""

    student: Backbone
    teacher: TeacherSampler
    reward: Reward
    student_config: StepsConfig
    shift: float
    real_data: RealData | None = None

    @property
    def critics(self) -> Mapping[str, Critic]:
        """None."""
        return {}

    def update_ema(self, updates: int, *, resumed: bool = False) -> None:
        """Update an EMA teacher."""
        self.teacher.update_ema(self.student, updates, resumed=resumed)

    def with_shaping(self, strength: float) -> Self:  # noqa: ARG002  # nothing to strengthen
        """Itself."""
        return self
