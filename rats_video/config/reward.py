"""Which reward judges clips."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rats_video.config.explain import KIND
from rats_video.config.schema import Config, PositiveInt


class WordRewardConfig(Config):
    """A reward trained by `rats-video train reward`."""

    kind: Literal["word"] = "word"
    path: str = Field(description="folder with config.json and model.safetensors, or the name of an embedded one")
    blind_to: tuple[str, ...] = Field((), description="words that do not count, e.g. to study what a flawed judge does")


class ClipScorer(Config):
    """How a CLIP model looks at clips, frame by frame."""

    path: str = Field(description="folder of a CLIPModel as transformers saves it (safetensors)")
    tokenizer: str | None = Field(
        None, description="folder of its tokenizer, where `path` has none; all CLIP text models share one"
    )
    frames: PositiveInt | None = Field(
        None, description="score that many frames, evenly spaced from first to last; null = all"
    )
    chunk: PositiveInt = Field(8, description="frames a forward; they are recomputed in backward, so it bounds memory")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the model's weights")


class PickScoreConfig(ClipScorer):
    """PickScore (arXiv 2305.01569): exp(logit_scale) * cos(frame, prompt), about 18 to 24."""

    kind: Literal["pickscore"]


class ClipScoreConfig(ClipScorer):
    """CLIP score: cos(frame, prompt), about 0.2 to 0.35."""

    kind: Literal["clip_score"]


def _word_by_default(value: Any) -> Any:
    return {KIND: "word"} | value if isinstance(value, dict) else value


RewardConfig = Annotated[
    WordRewardConfig | PickScoreConfig | ClipScoreConfig, Field(discriminator="kind"), BeforeValidator(_word_by_default)
]
"""A reward by its `kind`; without one it is a word reward."""
