"""Configuration of what is seen of a training while it runs; none of it changes the weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rats_video.config.schema import Config, NumClips, PositiveInt, SolverSteps

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
