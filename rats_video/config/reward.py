"""Which reward judges clips. A new kind is a class here, a case in `build/reward.py` and one in `planning/judge.py`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, JsonValue, field_validator, model_validator

from rats_video.config.explain import KIND
from rats_video.config.published_rewards import (
    AestheticConfig,
    AestheticV25Config,
    ClipScoreConfig,
    HpsConfig,
    HPSv3Config,
    ImageRewardConfig,
    PickScoreConfig,
    SubjectConsistencyConfig,
    ViClipConfig,
    VideoAlignConfig,
)
from rats_video.config.reward_kind import BaseReward, RewardKind
from rats_video.config.schema import Config, PositiveFloat


class WordRewardConfig(BaseReward):
    """Words of the prompt that are shown, and quality: a small network of `rats-video train reward`."""

    per = "frame"
    source = "embedded, or rats-video train reward"

    kind: Literal["word"] = "word"
    path: str = Field(description="folder with config.json and model.safetensors, or the name of an embedded one")
    blind_to: tuple[str, ...] = Field((), description="words that do not count, e.g. to study what a flawed judge does")


class TemporalScorer(BaseReward):
    """A temporal measure: computed from pixels, whatever the prompt."""

    per = "frame"
    source = "no weights"
    folders = ()


class FlickerConfig(TemporalScorer):
    """Steadiness: 1 - mean change to the next frame, 0.9 to 1; motion costs too: never alone. Prompts are not read."""

    kind: Literal["flicker"]


class MotionSmoothnessConfig(TemporalScorer):
    """How well frames follow from their neighbours along the motion: about 0.95 to 1. Prompts are not read."""

    kind: Literal["motion_smoothness"]


class DynamicDegreeConfig(TemporalScorer):
    """Motion from frame to frame, as a share of the shorter side: 0 is still, 0.02 lively. Prompts are not read."""

    kind: Literal["dynamic_degree"]
    at_most: PositiveFloat | None = Field(None, description="motion beyond which more is no better; null = no end")


class SaturationConfig(TemporalScorer):
    """Penalty on colours stronger than `at_most`: 0 or below; the teacher's are the measure. Prompts are not read."""

    kind: Literal["saturation"]
    at_most: PositiveFloat = Field(description="mean chroma, 0 gray to 1 pure, beyond which more costs")


class CustomRewardConfig(RewardKind):
    """Whatever the user's own code scores, in its own range: a function, or a class, of any module."""

    per = "clip"
    source = "the user's module"
    folders = ()

    kind: Literal["custom"]
    target: str = Field(description="`package.module:Name`; modules of the current directory are found too")
    options: dict[str, JsonValue] = Field(
        {}, description="named arguments: of the class, or of every call of the function"
    )
    differentiable: bool = Field(default=True, description="where its own attribute `differentiable` does not say it")

    @field_validator("options")
    @classmethod
    def _can_be_written_down(cls, options: dict[str, Any]) -> dict[str, Any]:
        json.dumps(options, allow_nan=False)  # raises ValueError at infinity, and at integers of thousands of digits
        return options

    @field_validator("target")
    @classmethod
    def _is_module_and_name(cls, target: str) -> str:
        module, _, name = target.partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), name)):
            raise ValueError(f"must be package.module:Name, got {target!r}")
        return target


class LatentRewardConfig(BaseReward):
    """What another reward says of a sketch drawn from latents: the VAE decodes nothing for the loss.

    That reward judges the decoded clips themselves wherever clips are compared and evaluated.
    """

    per = "frame"
    source = "rats-video train reward --latent"

    kind: Literal["latent"]
    path: str = Field(description="folder with config.json and model.safetensors")


def _word_by_default(value: Any) -> Any:
    return {KIND: "word"} | value if isinstance(value, dict) else value


TemporalConfig = FlickerConfig | MotionSmoothnessConfig | DynamicDegreeConfig | SaturationConfig
SingleReward = (
    WordRewardConfig
    | PickScoreConfig
    | ClipScoreConfig
    | HpsConfig
    | AestheticConfig
    | AestheticV25Config
    | ImageRewardConfig
    | ViClipConfig
    | TemporalConfig
    | SubjectConsistencyConfig
    | VideoAlignConfig
    | HPSv3Config
    | CustomRewardConfig
)
"""A reward that may be a term of a sum."""


class TermConfig(Config):
    """A term of a sum: `weight * (score - mean) / spread`. `rats-video calibrate` measures all three."""

    weight: float = Field(1.0, allow_inf_nan=False, description="0 logs the score and leaves it out of the sum")
    mean: float = Field(0.0, allow_inf_nan=False, description="score that counts as 0")
    spread: PositiveFloat = Field(1.0, description="score difference that counts as 1")
    reward: Annotated[SingleReward, Field(discriminator="kind"), BeforeValidator(_word_by_default)]


class SumRewardConfig(BaseReward):
    """Any of the others together: the sum over terms of weight * (score - mean) / spread."""

    per = "frame"
    source = "its terms"
    folders = ()

    kind: Literal["sum"]
    terms: dict[Annotated[str, Field(pattern=r"^[\w-]+$")], TermConfig] = Field(
        min_length=1, description="named as you like; --set reward.terms.NAME.weight=2 reaches into one"
    )

    @model_validator(mode="after")
    def _some_term_counts(self) -> Self:
        if not any(term.weight for term in self.terms.values()):
            raise ValueError("every term has weight 0")
        return self


RewardConfig = Annotated[
    SingleReward | SumRewardConfig | LatentRewardConfig,
    Field(discriminator="kind"),
    BeforeValidator(_word_by_default),
]
"""A reward by its `kind`; without one it is a word reward."""


OneReward = SingleReward | LatentRewardConfig
"""A reward that is no sum of others."""


def reward_kinds() -> dict[str, type[RewardKind]]:
    """Every kind of reward and its configuration."""
    return {get_args(member.model_fields[KIND].annotation)[0]: member for member in get_args(get_args(RewardConfig)[0])}


def single_rewards(cfg: RewardConfig, where: str) -> dict[str, OneReward]:
    """The reward itself, or those of a sum's terms, by dotted key under `where`."""
    if isinstance(cfg, SumRewardConfig):
        return {f"{where}.terms.{name}.reward": term.reward for name, term in cfg.terms.items()}
    return {where: cfg}
