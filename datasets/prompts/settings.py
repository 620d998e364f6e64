"""Settings of a run's prompts."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rats_video.config.fields import Config


class ShapesPromptsConfig(Config):
    """Captions of the synthetic shapes, with their fixed split."""

    kind: Literal["shapes"] = "shapes"
    first_frame: bool = Field(default=False, description="clips start from a rendered first frame: image to video")
    paths: int = Field(0, ge=0, le=64, description="prompts of each caption, each with a motion path; 0: captions only")


class FilePromptsConfig(Config):
    """Lists as docs/prompts.md describes them: a packaged name (`video-train`, `video-heldout`) or a path."""

    kind: Literal["file"]
    train: str = Field(description="prompts to train on")
    heldout: str | None = Field(None, description="prompts for evaluation, none of them in the training file")
    heldout_share: float | None = Field(
        None, gt=0, lt=1, description="instead: share of `train` kept for evaluation, each prompt by its own hash"
    )
    first_frame: bool = Field(
        default=False, description="clips start from the pictures of the column `image`, and end at `last_image`'s"
    )

    @model_validator(mode="after")
    def _is_split_one_way(self) -> Self:
        if (self.heldout is None) == (self.heldout_share is None):
            raise ValueError("give either `heldout`, a file, or `heldout_share`")
        return self


class PreparedPromptsConfig(Config):
    """Captions of clips that `prepare` has stored, split as they are; `compute.cache_text` takes their text as well."""

    kind: Literal["prepared"]
    path: str = Field(description="folder of the cache")
    first_frame: bool = Field(default=False, description="clips start from the first frames of the cache's own")


PromptsConfig = Annotated[ShapesPromptsConfig | FilePromptsConfig | PreparedPromptsConfig, Field(discriminator="kind")]
