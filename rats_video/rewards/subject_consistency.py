"""Subject consistency of VBench: does what a clip shows stay the same? By a DINO in transformers' format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isqrt
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rats_video.errors import UserError
from rats_video.reading import read_sizes
from rats_video.rewards.base import RewardContext, WeightsFolder
from rats_video.rewards.files import load_transformers_model
from rats_video.rewards.frames import FrameReward, FrameRewardConfig, scored_frames
from rats_video.rewards.pixels import IMAGENET_MEAN, IMAGENET_STD, normalize, short_side_to
from rats_video.rewards.temporal import in_chunks
from rats_video.types import RewardScores


class SubjectConsistencyConfig(FrameRewardConfig):
    """Likeness of frames to the first and to the one before, by DINO: about 0.9 to 1; prompts are not read."""

    source = "facebook/dino-vitb16"

    kind: Literal["subject_consistency"]
    path: WeightsFolder = "models/dino-vitb16"

    def build(self, context: RewardContext) -> SubjectConsistency:
        """Load it; raises UserError if the folder does not hold a DINO, whole and in safetensors."""
        import transformers

        folder = self.folder(context.where, "path")
        try:
            config = read_sizes(folder / "config.json")
        except (OSError, ValueError) as error:
            fix = "give the folder of a hub download, e.g. of facebook/dino-vitb16"
            raise UserError("not a DINO: no readable config.json in it", where=str(folder), fix=fix) from error
        encoder = encoder_of(config, where=str(folder))
        kind, dtype = getattr(transformers, encoder.model), getattr(torch, self.dtype)
        model = load_transformers_model(kind, folder, config["model_type"], dtype, **encoder.making)
        return SubjectConsistency(model.to(context.device), self)

    def on_meta(self, context: RewardContext) -> SubjectConsistency:  # noqa: ARG002
        """The same without weights."""
        config = self.hub_config({"model_type": "vit"})  # transformers' own defaults are a ViT-B/16
        model = encoder_of(config, where=self.path).model
        return SubjectConsistency(self.empty_model(model, config), self)


_SIZE = 224  # pixels of the short side


@dataclass(frozen=True)
class Encoder:
    """A family of image encoders.

    Args:
        model: transformers' class.
        making: makes it without a pooling layer, which checkpoints of DINO lack.
        calling: lets it take frames of any shape.
    """

    model: str
    making: Mapping[str, bool] = field(default_factory=dict)
    calling: Mapping[str, bool] = field(default_factory=dict)


ENCODERS = {
    "vit": Encoder("ViTModel", {"add_pooling_layer": False}, {"interpolate_pos_encoding": True}),
    "dinov2": Encoder("Dinov2Model"),
}
"""By the model_type of config.json: DINO is a plain ViT."""


def encoder_of(config: Mapping[str, Any], *, where: str) -> Encoder:
    """The family of a config.json; raises UserError for another one."""
    kind = config.get("model_type")
    if kind not in ENCODERS:
        raise UserError(f"is a {kind!r} model, not a DINO ({' or '.join(ENCODERS)})", where=where)
    return ENCODERS[kind]


class SubjectConsistency(FrameReward):
    """Mean over the scored frames but the first of (cos to the one before + cos to the first) / 2; 1 is a still clip.

    VBench (arXiv 2311.17982), vbench/subject_consistency.py: DINO's class token, cosines below 0 count as 0. VBench has
    it from `facebook/dino-vitb16` and all frames. A frame's own score is its mean of the two; the first frame has the
    second's, and one that is not scored the nearest one's.

    Args:
        model: a `ViTModel` or `Dinov2Model`.
        cfg: which frames are scored, and how many at a time.
    """

    def __init__(self, model: Any, cfg: SubjectConsistencyConfig) -> None:
        super().__init__(cfg)
        self.model = model.requires_grad_(requires_grad=False).eval()
        self.model.pooler = None  # the class token is taken before it
        self._calling = dict(ENCODERS[model.config.model_type].calling)
        # transformers resamples positions by size: other places, and on frames that are not square other features.
        self.model.embeddings.interpolate_pos_encoding = partial(dino_positions, self.model.embeddings)

    def features(self, frames: Tensor) -> Tensor:
        """Unit features `[N, D]` of frames `[N, 3, height, width]` in [0, 1]."""
        pixels = dino_pixels(frames).to(self.model.dtype)
        return F.normalize(self.model(pixel_values=pixels, **self._calling).last_hidden_state[:, 0].float(), dim=-1)

    def forward(self, videos: Tensor, prompts: Sequence[str]) -> RewardScores:
        """Score `[B, T, 3, height, width]` in [0, 1]; raises UserError where fewer than two frames are scored."""
        batch, num_frames = videos.shape[:2]
        scored = scored_frames(num_frames, self.cfg.frames, prompts).to(videos.device)
        if scored.shape[1] < 2:
            raise UserError("subject consistency compares frames: one is too few", fix="score at least 2 frames")
        features = in_chunks(
            self.features, self.cfg.chunk, videos[torch.arange(batch, device=videos.device)[:, None], scored]
        )
        later = features[:, 1:]
        to_first, to_former = ((later * other).sum(dim=-1).relu() for other in (features[:, :1], features[:, :-1]))
        scores = (to_first + to_former) / 2
        distance = (torch.arange(num_frames, device=videos.device)[:, None] - scored[:, None, 1:]).abs()
        return RewardScores(clip=scores.mean(dim=1), frames=scores.gather(1, distance.argmin(dim=2)))


def dino_positions(embeddings: Any, tokens: Tensor, height: int, width: int) -> Tensor:
    """Position embeddings `[1, 1 + rows * columns, D]` for frames of another size than the model's.

    Resampled by a factor, to which a tenth of a patch is added, as its authors do (github facebookresearch/dino,
    vision_transformer.py, interpolate_pos_encoding; dinov2's alike).

    Args:
        embeddings: the model's, with `position_embeddings` `[1, 1 + side * side, D]`.
        tokens: `[N, 1 + rows * columns, D]`, of which only the number counts.
        height: of the frames, in pixels.
        width: of the frames, in pixels.
    """
    whole, patches = embeddings.position_embeddings[:, :1], embeddings.position_embeddings[:, 1:]
    if tokens.shape[1] == 1 + patches.shape[1] and height == width:
        return torch.cat([whole, patches], dim=1)
    side, patch = isqrt(patches.shape[1]), embeddings.patch_embeddings.projection.stride
    factors = tuple((pixels // size + 0.1) / side for pixels, size in zip((height, width), patch, strict=True))
    grid = patches.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resampled = F.interpolate(grid, scale_factor=factors, mode="bicubic").flatten(2).transpose(1, 2)
    return torch.cat([whole, resampled.to(whole.dtype)], dim=1)


def dino_pixels(frames: Tensor) -> Tensor:
    """Pixels as VBench gives them to DINO, of frames `[N, 3, height, width]`: short side 224, ImageNet's mean and std.

    Bilinear without antialiasing and without a crop (vbench/utils.py, dino_transform).
    """
    resized = F.interpolate(frames.float(), short_side_to(_SIZE, frames), mode="bilinear", align_corners=False)
    return normalize(resized, IMAGENET_MEAN, IMAGENET_STD)
