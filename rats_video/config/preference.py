"""Configuration of `rats-video train reward --data`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rats_video.config.reward import MotionSmoothnessConfig, RewardConfig
from rats_video.config.schema import (
    Config,
    NonNegativeFloat,
    NonNegativeInt,
    NumClips,
    OptimizerConfig,
    PositiveInt,
    Seed,
)


class PreferenceTrainConfig(Config):
    """Root of `train reward --data`: a reward of prepared clips, from pairs of which one is the better.

    Sources are split three ways, none in two parts: to train on, to choose the best weights by, to validate on.
    """

    seed: Seed = 0
    data: str | None = Field(None, description="folder of clips that `rats-video prepare` wrote, as --data says")
    preferences: str | None = Field(
        None,
        description="JSONL of preferred and rejected clips; null learns from damaged copies, as --preferences says",
    )
    model: str = Field("tiny-wan", description="pipeline whose VAE made the latents, to decode them with")
    encoder: Literal["frames", "volume"] = "frames"
    width: PositiveInt = Field(128, description="feature channels")
    num_words: NonNegativeInt = Field(64, description="most frequent words of the captions that are scored; 0 for none")
    word_count: PositiveInt = Field(8, description="clips that a word must be said of")
    quality_weight: NonNegativeFloat = Field(1.0, description="of log P(the better one) in the score, beside the words")
    num_pairs: NumClips = Field(2000, description="pairs, or clips to damage, that are used at most")
    validation_pairs: NumClips = Field(
        200, description="pairs, or clips to damage, to validate on, if there are enough"
    )
    validation_share: Annotated[float, Field(gt=0, le=0.5)] = Field(
        0.2, description="of all pairs that is enough; likewise what the best weights are chosen by, of the others"
    )
    batch_size: NumClips = Field(12, description="pairs a step")
    steps: PositiveInt = 2000
    look_every: PositiveInt = Field(
        50, description="steps between looks at the pairs that the best weights are chosen by"
    )
    word_weight: NonNegativeFloat = Field(1.0, description="of the words beside the preferences")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.05,
        description="share of the pairs taken to be the other way round; keeps log-odds, and so the score, bounded",
    )
    optimizer: OptimizerConfig
    baseline: RewardConfig | None = Field(
        MotionSmoothnessConfig(kind="motion_smoothness"),
        description="a reward whose accuracy is shown beside this one's",
    )
