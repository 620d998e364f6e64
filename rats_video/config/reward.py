"""Which reward judges clips. A new kind is a class here, a case in `build/reward.py` and one in `planning/judge.py`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from rats_video.config.explain import KIND
from rats_video.config.schema import Config, PositiveFloat, PositiveInt


class RewardKind(Config):
    """What `rats-video rewards list` tells of a kind; the first line of its docstring says what it scores.

    Attributes:
        per: what one score is given to.
        source: where its weights come from.
        folders: the keys that name folders of weights.
    """

    per: ClassVar[Literal["frame", "clip"]]
    source: ClassVar[str]
    folders: ClassVar[tuple[str, ...]] = ("path",)


class BaseReward(RewardKind):
    """One that ships with the package.

    Attributes:
        differentiable: whether gradient reaches the pixels; otherwise it cannot be a direct loss.
    """

    differentiable: ClassVar[bool] = True


class WordRewardConfig(BaseReward):
    """Words of the prompt that are shown, and quality: a small network of `rats-video train reward`."""

    per = "frame"
    source = "embedded, or rats-video train reward"

    kind: Literal["word"] = "word"
    path: str = Field(description="folder with config.json and model.safetensors, or the name of an embedded one")
    blind_to: tuple[str, ...] = Field((), description="words that do not count, e.g. to study what a flawed judge does")


class WindowFrames(Config):
    """Frames in a row at a place drawn from the prompt: each prompt has one window, in every batch and every run."""

    kind: Literal["window"]
    count: PositiveInt = Field(description="frames in a row; all where a clip has no more")


class EndFrames(Config):
    """The first, the middle and the last frame."""

    kind: Literal["ends"]


def _frame_choice(value: Any) -> Any:
    return value.get(KIND) if isinstance(value, dict) else getattr(value, KIND, "evenly")


FrameChoice = Annotated[
    Annotated[PositiveInt | None, Tag("evenly")]
    | Annotated[WindowFrames, Tag("window")]
    | Annotated[EndFrames, Tag("ends")],
    Discriminator(_frame_choice),
]
"""Which frames of a clip are scored: a number of evenly spaced ones, all (null), or another choice by its `kind`."""


class FrameScorer(BaseReward):
    """How a reward for single frames looks at clips."""

    per = "frame"

    path: str = Field(description="folder of the model, in safetensors")
    frames: FrameChoice = Field(
        None, description="score that many, evenly spaced from first to last; null = all; or {kind: window or ends}"
    )
    chunk: PositiveInt = Field(8, description="frames a forward; they are recomputed in backward, so it bounds memory")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the model's weights")


class ClipScorer(FrameScorer):
    """A CLIP model as transformers saves it."""

    tokenizer: str | None = Field(
        None, description="folder of its tokenizer, where `path` has none; all CLIP text models share one"
    )


class PickScoreConfig(ClipScorer):
    """People's preference and fit to the prompt (arXiv 2305.01569): exp(logit_scale) * cos(frame, prompt), 18 to 24."""

    source = "yuvalkirstain/PickScore_v1"

    kind: Literal["pickscore"]
    path: str = "models/PickScore_v1"


class ClipScoreConfig(ClipScorer):
    """Fit to the prompt (CLIP score): cos(frame, prompt), about 0.2 to 0.35."""

    source = "openai/clip-vit-large-patch14"

    kind: Literal["clip_score"]
    path: str = "models/clip-vit-large-patch14"


class HpsConfig(ClipScorer):
    """People's preference, HPSv2.1 (arXiv 2306.09341): cos(frame, prompt), about 0.2 to 0.35."""

    source = "xswu/HPSv2: HPS_v2.1_compressed.pt, converted"

    kind: Literal["hpsv2"]
    path: str = "models/HPSv2.1"
    tokenizer: str | None = "models/clip-vit-large-patch14"


class AestheticScorer(FrameScorer):
    """How beautiful frames are, whatever the prompt."""

    folders = ("path", "head")

    path: str = Field(description="folder of the image encoder, in safetensors")
    head: str = Field(description="folder of the network that scores its features, in safetensors")


class AestheticConfig(AestheticScorer):
    """How beautiful a frame is, LAION aesthetic v2: 1 to 10, about 4.5 to 6.5; prompts are not read."""

    source = "openai/clip-vit-large-patch14; sac+logos+ava1-l14-linearMSE.pth, converted"

    kind: Literal["aesthetic"]
    path: str = "models/clip-vit-large-patch14"
    head: str = "models/aesthetic-v2"


class AestheticV25Config(AestheticScorer):
    """How beautiful a frame is, aesthetic predictor v2.5: 1 to 10, about 3 to 7; prompts are not read."""

    source = "google/siglip-so400m-patch14-384; aesthetic_predictor_v2_5.pth, converted"

    kind: Literal["aesthetic_v25"]
    path: str = "models/siglip-so400m-patch14-384"
    head: str = "models/aesthetic-v2-5"


class ImageRewardConfig(FrameScorer):
    """How much people like a frame for its prompt (ImageReward, arXiv 2304.05977): about -2 to 2, 0 on average."""

    source = "THUDM/ImageReward, converted to safetensors"

    kind: Literal["image_reward"]
    path: str = "models/ImageReward"
    tokenizer: str = Field("models/bert-base-uncased", description="folder of the tokenizer of BERT, uncased")


class ViClipConfig(BaseReward):
    """Fit of the whole clip to the prompt (ViCLIP, arXiv 2307.06942): cos(clip, prompt), about 0.1 to 0.35."""

    per = "clip"
    source = "OpenGVLab/ViCLIP-L-14-hf"

    kind: Literal["viclip"]
    path: str = Field("models/ViCLIP-L-14-hf", description="folder of the model, in safetensors")
    tokenizer: str = Field("models/clip-vit-large-patch14", description="folder of CLIP's tokenizer")
    chunk: PositiveInt = Field(2, description="clips a forward; they are recomputed in backward, so it bounds memory")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the model's weights")


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


class SubjectConsistencyConfig(FrameScorer):
    """Likeness of frames to the first and to the one before, by DINO: about 0.9 to 1; prompts are not read."""

    source = "facebook/dino-vitb16"

    kind: Literal["subject_consistency"]
    path: str = "models/dino-vitb16"


class CustomRewardConfig(RewardKind):
    """Whatever the user's own code scores, in its own range: a function, or a class, of any module."""

    per = "clip"
    source = "the user's module"
    folders = ()

    kind: Literal["custom"]
    target: str = Field(description="`package.module:Name`; modules of the current directory are found too")
    options: dict[str, Any] = Field({}, description="named arguments: of the class, or of every call of the function")
    differentiable: bool = Field(default=True, description="where its own attribute `differentiable` does not say it")

    @field_validator("target")
    @classmethod
    def _is_module_and_name(cls, target: str) -> str:
        module, _, name = target.partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), name)):
            raise ValueError(f"must be package.module:Name, got {target!r}")
        return target


class LatentRewardConfig(BaseReward):
    """What another reward would say of the decoded clip, read from its latents: nothing is decoded for the loss.

    The reward that it imitates judges pixels wherever clips are compared and evaluated.
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
    | CustomRewardConfig
)
"""A reward that is no sum of others."""


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


def reward_kinds() -> dict[str, type[RewardKind]]:
    """Every kind of reward and its configuration."""
    return {get_args(member.model_fields[KIND].annotation)[0]: member for member in get_args(get_args(RewardConfig)[0])}


def single_rewards(cfg: RewardConfig, where: str) -> dict[str, SingleReward | LatentRewardConfig]:
    """The reward itself, or those of a sum's terms, by dotted key under `where`."""
    if isinstance(cfg, SumRewardConfig):
        return {f"{where}.terms.{name}.reward": term.reward for name, term in cfg.terms.items()}
    return {where: cfg}
