"""Settings of a training, and the part of a run's settings that the engine reads."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from pydantic import Field

from rats_video.backbones.compute import ComputeConfig
from rats_video.config.fields import ClipConfig, Config, NonNegativeInt, NumClips, PositiveInt, SolverSteps
from rats_video.errors import UserError
from rats_video.methods.base import BaseMethodConfig, StepsConfig
from rats_video.methods.teacher import TeacherConfig
from rats_video.optim import OptimizerConfig, TrainStepsConfig
from rats_video.training.faults import FaultsConfig


class TrainingConfig(TrainStepsConfig):
    """The optimisation."""

    steps: PositiveInt = Field(150, description="updates of the student")
    batch_size: NumClips = Field(8, description="clips an update, over all processes")
    micro_batch_size: PositiveInt | None = Field(
        None, description="clips a process works on at a time; gradients add up, memory does not; null = all of its own"
    )
    optimizer: OptimizerConfig
    checkpoint_every: PositiveInt = Field(50, description="steps")
    max_skipped: NonNegativeInt = Field(
        16, description="clips whose reward is not a finite number that a run may leave out before it stops"
    )
    faults: FaultsConfig = FaultsConfig()
    keep_checkpoints: PositiveInt = Field(2, description="how many are kept, newest first")

    def num_micro_batches(self, clips: int) -> int:
        """Micro-batches into which a process divides its `clips` of an update.

        Raises:
            UserError: they would not be equal.
        """
        size = min(self.micro_batch_size or clips, clips)
        if clips % size:
            raise UserError(
                f"{size} does not divide the {clips} clips of a process", where="training.micro_batch_size",
                fix="use 1 or another divisor",
            )  # fmt: skip
        return clips // size


class RunSettings(Protocol):
    """The settings that the engine reads; `DistillConfig` has them."""

    @property
    def seed(self) -> int:
        """Seed of everything that the run draws."""
        ...

    @property
    def clip(self) -> ClipConfig:
        """Clip size."""
        ...

    @property
    def student(self) -> StepsConfig:
        """The student's step counts."""
        ...

    @property
    def teacher(self) -> TeacherConfig:
        """The many-step sampler."""
        ...

    @property
    def method(self) -> BaseMethodConfig:
        """The objective."""
        ...

    @property
    def compute(self) -> ComputeConfig:
        """Settings of memory and speed."""
        ...

    @property
    def training(self) -> TrainingConfig:
        """The optimisation."""
        ...

    @property
    def validation(self) -> ValidationConfig | None:
        """Clips shown while training."""
        ...

    @property
    def tracking(self) -> TrackingConfig:
        """Trackers that the log is also sent to."""
        ...

    def evaluations(self, num_steps: int, asked: float | None = None) -> float:
        """Network evaluations of an update at that many student steps; see `DistillConfig`."""
        ...

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """All settings as plain values."""
        ...


Tracker = Literal["tensorboard", "wandb", "trackio"]


class TrackingConfig(Config):
    """Where the log is also sent; nothing leaves the machine unless a tracker is named here."""

    trackers: tuple[Tracker, ...] = Field((), description="tensorboard (RUN/tensorboard), wandb, trackio, or several")
    project: str = Field("rats-video", min_length=1, description="of Weights & Biases and Trackio")
    name: str | None = Field(None, description="of the run there; null = the run's folder")
    every: PositiveInt = Field(1, description="steps between the rows that are sent; metrics.jsonl has all of them")


class ValidationConfig(Config):
    """The student's clips of fixed held-out prompts, from fixed noise, every few steps: RUN/validation/index.html."""

    every: PositiveInt = Field(100, description="steps; also before the first and after the last one")
    num_clips: NumClips = Field(4, description="held-out prompts, one clip each, the same every time")
    nfe: SolverSteps | None = Field(None, description="network evaluations; null = the first of student.num_steps")
