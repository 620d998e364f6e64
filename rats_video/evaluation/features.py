"""A few numbers for a clip: the networks by whose features sets of clips are compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from rats_video.config.fields import Config
from rats_video.evaluation.i3d import I3dFeaturesConfig
from rats_video.rewards.files import load_transformers_model
from rats_video.rewards.pixels import IMAGENET_MEAN, IMAGENET_STD, normalize
from rats_video.rewards.word import WordReward


class ShapesFeaturesConfig(Config):
    """Log-odds of a word reward that ships with the package (19 numbers): sees the shapes' words and damages alone."""

    kind: Literal["shapes"]
    path: str = Field("shapes-reward-heldout", description="folder of a word reward, or the name of an embedded one")


class VideoMaeFeaturesConfig(Config):
    """Mean token of a VideoMAE (768 numbers for the base model): more for motion than I3D (arXiv 2404.12391)."""

    kind: Literal["videomae"]
    path: str = Field("models/videomae-base", description="folder of a hub download")


class DinoFeaturesConfig(Config):
    """Class token of a DINOv2 (1024 numbers for the large model), for images (arXiv 2306.04675)."""

    kind: Literal["dinov2"]
    path: str = Field("models/dinov2-large", description="folder of a hub download")


FeaturesConfig = Annotated[
    ShapesFeaturesConfig | I3dFeaturesConfig | VideoMaeFeaturesConfig | DinoFeaturesConfig, Field(discriminator="kind")
]


_LOG_ODDS = 10.0  # those of a clear clip are about as large: features of order 1 suit the kernel
_DINO_SIZE = 224
_CELLS = (8, 16, 16)  # frames, height and width that pixels are averaged to


class WordFeatures(nn.Module):
    """A word reward's log-odds of each word and of being undamaged, in units of ten: D = 19 for the shapes.

    It sees what its words name (speed, colour, shape, direction, background) and the corruptions that it was trained on
    (datasets/shapes/corruptions.py). It is blind to all else: place, size and exact hue of a shape, and detail finer
    than two pixels. 64 clips suffice to estimate the covariance of so few numbers.
    """

    def __init__(self, reward: WordReward) -> None:
        super().__init__()
        self.reward = reward

    def forward(self, videos: Tensor) -> Tensor:
        """Encode."""
        clip: Tensor = self.reward.logits(videos)[0]
        return clip / _LOG_ODDS


class VideoMae(nn.Module):
    """Mean of VideoMAE's last tokens, D = 768 for the base model (arXiv 2203.12602).

    Features learnt without labels weigh motion more than I3D's do (arXiv 2404.12391). The paper uses a ViT-g fine-tuned
    on Something-Something v2, which transformers lacks: the idea is the same, the figures are not comparable. Nor does
    its code (github songweige/content-debiased-fvd) normalise pixels, as VideoMAE was trained with and as here.

    Args:
        model: transformers' `VideoMAEModel`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.requires_grad_(requires_grad=False).eval()

    def forward(self, videos: Tensor) -> Tensor:
        """Encode as many frames as it was trained with, spread over the clip and resized to its square, bilinear."""
        config = self.model.config
        index = torch.linspace(0, videos.shape[1] - 1, config.num_frames, device=videos.device).round().long()
        frames = videos[:, index].float().flatten(0, 1)
        size = (config.image_size, config.image_size)
        frames = F.interpolate(frames, size, mode="bilinear", align_corners=False, antialias=True)
        pixels = normalize(frames, IMAGENET_MEAN, IMAGENET_STD).unflatten(0, (len(videos), len(index)))
        tokens: Tensor = self.model(pixel_values=pixels).last_hidden_state
        return tokens.mean(dim=1)

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> VideoMae:
        """Load frozen; raises UserError if the folder does not hold a VideoMAE, whole and in safetensors."""
        from transformers import VideoMAEModel

        return cls(load_transformers_model(VideoMAEModel, folder, "videomae", torch.float32).to(device))


class Dino(nn.Module):
    """DINOv2's class token, a mean over frames: D = 1024 for the large model.

    Frechet distances in it follow what people call real, where those in Inception's do not (arXiv 2306.04675, whose
    code resizes as here: bicubic to 224 x 224).

    Args:
        model: transformers' `Dinov2Model`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.requires_grad_(requires_grad=False).eval()

    def forward(self, videos: Tensor) -> Tensor:
        """Encode every frame."""
        frames = videos.float().flatten(0, 1)
        frames = F.interpolate(frames, (_DINO_SIZE,) * 2, mode="bicubic", align_corners=False, antialias=True)
        tokens: Tensor = self.model(pixel_values=normalize(frames.clamp(0, 1), IMAGENET_MEAN, IMAGENET_STD))[0]
        by_frame: Tensor = tokens[:, 0].unflatten(0, videos.shape[:2])
        return by_frame.mean(dim=1)

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Dino:
        """Load frozen; raises UserError if the folder does not hold a DINOv2, whole and in safetensors."""
        from transformers import Dinov2Model

        return cls(load_transformers_model(Dinov2Model, folder, "dinov2", torch.float32).to(device))


def pixel_features(videos: Tensor) -> Tensor:
    """The clip in coarse cells, `[B, D]`; the distance of two clips is the root mean square distance of their cells.

    A cell is an eighth of the frames and a sixteenth of each side: grain averages out, positions do not.
    """
    cells = F.adaptive_avg_pool3d(videos.float().transpose(1, 2), _CELLS).flatten(1)
    return cells / math.sqrt(cells.shape[1])
