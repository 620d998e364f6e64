"""Rewards whose weights others have published."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from rats_video.config.explain import KIND
from rats_video.config.reward_kind import BaseReward
from rats_video.config.schema import Config, PositiveFloat, PositiveInt


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


class SubjectConsistencyConfig(FrameScorer):
    """Likeness of frames to the first and to the one before, by DINO: about 0.9 to 1; prompts are not read."""

    source = "facebook/dino-vitb16"

    kind: Literal["subject_consistency"]
    path: str = "models/dino-vitb16"


class Qwen2VLScorer(BaseReward):
    """How a reward that is a Qwen2-VL looks at pixels."""

    path: str = Field(description="folder of the reward's weights, in safetensors")
    chunk: PositiveInt = Field(1, description="clips or frames a forward; they are recomputed in backward")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="of the model's weights; its head is float32")
    round_pixels: bool = Field(
        False,  # noqa: FBT003
        description="round resized frames to whole steps of 1/255, as in the published code; gradient passes through",
    )


class VideoAlignWeights(Config):
    """How much each part counts in a clip's score."""

    vq: float = Field(1.0, description="visual quality")
    mq: float = Field(1.0, description="motion quality")
    ta: float = Field(1.0, description="text alignment")


class VideoAlignConfig(Qwen2VLScorer):
    """Visual and motion quality and fit to the prompt (VideoReward, arXiv 2501.13918): each about N(0, 1), and summed.

    The first two do not depend on the prompt. Two frames a second are looked at, at least 4.
    """

    per = "clip"
    source = "KlingTeam/VideoReward"

    kind: Literal["video_align"]
    path: str = "models/VideoReward"
    fps: PositiveFloat | None = Field(None, description="frames a second of the clips; null = of the run's clip")
    weights: VideoAlignWeights = VideoAlignWeights()


class HPSv3Config(Qwen2VLScorer, FrameScorer):
    """People's preference and fit to the prompt (HPSv3, arXiv 2508.03789): mean of a normal distribution, 0 to 15."""

    per = "frame"
    source = "MizzenAI/HPSv3"

    kind: Literal["hpsv3"]
    path: str = "models/HPSv3"
    tokenizer: str = Field("models/Qwen2-VL-7B-Instruct", description="folder of the tokenizer of Qwen2-VL")
    frames: FrameChoice = Field(
        4, description="score that many, evenly spaced from first to last; null = all; or {kind: window or ends}"
    )
