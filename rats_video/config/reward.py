"""Which reward judges clips. A new kind is a class here, a case in `build/reward.py` and one in `planning/judge.py`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from rats_video.config.explain import KIND
from rats_video.config.schema import Config, PositiveInt


class BaseReward(Config):
    """What `rats-video rewards list` tells of a kind; the first line of its docstring says what it scores.

    Attributes:
        per: what one score is given to.
        differentiable: whether gradient reaches the pixels; otherwise it cannot be a direct loss.
        source: where its weights come from.
    """

    per: ClassVar[Literal["frame", "clip"]]
    differentiable: ClassVar[bool] = True
    source: ClassVar[str]


class WordRewardConfig(BaseReward):
    """Words of the prompt that are shown, and quality: a small network of `rats-video train reward`."""

    per = "frame"
    source = "embedded, or rats-video train reward"

    kind: Literal["word"] = "word"
    path: str = Field(description="folder with config.json and model.safetensors, or the name of an embedded one")
    blind_to: tuple[str, ...] = Field((), description="words that do not count, e.g. to study what a flawed judge does")


class FrameScorer(BaseReward):
    """How a reward for single frames looks at clips."""

    per = "frame"

    path: str = Field(description="folder of the model, in safetensors")
    frames: PositiveInt | None = Field(
        None, description="score that many frames, evenly spaced from first to last; null = all"
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


RewardConfig = Annotated[
    WordRewardConfig | PickScoreConfig | ClipScoreConfig | LatentRewardConfig,
    Field(discriminator="kind"),
    BeforeValidator(_word_by_default),
]
"""A reward by its `kind`; without one it is a word reward."""
