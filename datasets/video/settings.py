"""Configuration of `rats-video prepare`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rats_video.config.fields import (
    MOST_PIXELS,
    Config,
    NonNegativeFloat,
    NumClips,
    NumFrames,
    PositiveFloat,
    PositiveInt,
    Seed,
)

Dtype = Literal["float32", "bfloat16", "float16"]


class BucketConfig(Config):
    """One size of prepared clips; a clip goes where its aspect is nearest, there to the longest it can fill.

    An image goes to a bucket of one frame; where none is listed, to the height and width of any.
    """

    num_frames: NumFrames = Field(description="1 + a multiple of the VAE's temporal stride")
    height: PositiveInt = Field(description="pixels")
    width: PositiveInt = Field(description="pixels")

    @model_validator(mode="after")
    def _fits_somewhere(self) -> Self:
        if self.num_frames * self.height * self.width > MOST_PIXELS:
            raise ValueError(f"{self.num_frames} frames of {self.height} x {self.width} are over {MOST_PIXELS} pixels")
        return self


class CutConfig(Config):
    """Which spans of a video become clips."""

    scene_threshold: PositiveFloat | None = Field(
        0.3, description="change between neighbouring frames, 0 to 1, above which a new scene begins; null ignores cuts"
    )
    spans: Literal["first", "middle", "all"] = Field(
        "all", description="of each scene: its first clip, the one in its middle, or one after the other"
    )
    max_clips: PositiveInt | None = Field(None, description="most clips of one video; null for no limit")
    margin_seconds: NonNegativeFloat = Field(0.0, description="left out at both sides of a cut, where scenes may fade")
    min_side: PositiveInt | None = Field(None, description="skip videos whose shorter side has fewer pixels")
    allow_upscale: bool = Field(default=True, description="take videos smaller than the bucket; false skips them")


class PrepareConfig(Config):
    """Root of `prepare`."""

    seed: Seed = 0
    model: str = Field(description="pipeline folder or embedded name, whose VAE and text encoder are used")
    fps: PositiveFloat = Field(8.0, description="frames a second of the clips")
    buckets: tuple[BucketConfig, ...] = Field(min_length=1, description="the sizes that clips are brought to")
    fit: Literal["crop", "pad", "stretch"] = Field(
        "crop", description="how another aspect becomes the bucket's: centre crop, black bars, or distortion"
    )
    cut: CutConfig = CutConfig()
    missing_caption: Literal["skip", "empty"] = Field(
        "skip", description="what happens to a video without caption: it is skipped, or taken with the empty one"
    )
    heldout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.05, description="share of the sources kept for validation, chosen by their content's hash"
    )
    num_shapes: NumClips = Field(1024, description="clips rendered where SOURCE is `shapes`")
    dtype: Dtype = Field("bfloat16", description="of the stored latents and text")
    compute_dtype: Dtype = Field("float32", description="of the VAE and the text encoder")
    batch_size: NumClips = Field(4, description="clips encoded at a time")
    shard_clips: NumClips = Field(256, description="clips a shard at most")
    workers: PositiveInt = Field(
        2, description="processes that read videos, beside each one that encodes; two at least"
    )
    timeout_seconds: PositiveFloat = Field(
        120.0, description="after which looking through a video, or reading some of its clips, is given up"
    )

    @property
    def of_images(self) -> PrepareConfig:
        """The same for images: buckets of one frame, those that are listed, or else one of every size."""
        single = [bucket for bucket in self.buckets if bucket.num_frames == 1]
        sizes = [bucket.model_copy(update={"num_frames": 1}) for bucket in single or self.buckets]
        return self.model_copy(update={"buckets": tuple(dict.fromkeys(sizes))})
