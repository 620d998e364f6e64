"""Settings of `evaluate`."""

from __future__ import annotations

from pydantic import Field

from rats_video.config.fields import Config, NumClips, PositiveFloat, SolverSteps
from rats_video.evaluation.features import FeaturesConfig
from rats_video.methods.teacher import GuidanceScale2


class DiversityConfig(Config):
    """More clips of the same prompts from other noise: does a prompt still give more than one clip?"""

    prompts: NumClips = Field(16, description="of the held-out prompts that are evaluated, the first ones")
    clips: int = Field(2, ge=2, le=1000, description="of each; the first is there anyway")


class EvaluationConfig(Config):
    """`evaluate`."""

    nfe: tuple[SolverSteps, ...] = Field(
        (3, 4, 5, 8), description="network evaluations a clip of the student and the base, one arm each"
    )
    num_clips: NumClips = Field(64, description="clips of each arm, of the held-out prompts in turns")
    batch_size: NumClips = Field(32, description="clips sampled at a time")
    teacher_steps: SolverSteps = Field(50, description="solver steps of the teacher, as it is judged and shown")
    guidance_scale: PositiveFloat = Field(3.0, description="of that teacher; 1 is off")
    guidance_scale_2: GuidanceScale2 = None
    features: FeaturesConfig | None = Field(
        None, description="in what Frechet distances are taken; null leaves them out"
    )
    diversity: DiversityConfig | None = Field(DiversityConfig(), description="null leaves it out")
    latency_clips: int = Field(3, ge=0, le=1000, description="clips sampled alone to time each arm; 0 leaves it out")
