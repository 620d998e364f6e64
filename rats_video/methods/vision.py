"""A discriminator of pixels on frozen vision features (SenseFlow, arXiv 2506.00523, section 4.3; StyleGAN-T's heads).

Frames go through a network that never learns. On the features of each of its layers stands a small head, whose map is
multiplied with what the prompt and a real clip of the same prompt say: it asks if the frame is as real as that one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from rats_video.config.fields import Config, NonNegativeFloat, NonNegativeInt, PositiveInt
from rats_video.methods.draws import draw_uniform
from rats_video.types import PromptBatch


class DinoClipConfig(Config):
    """Frames as a DINOv2 sees them, prompts as a CLIP reads them: SenseFlow's choice."""

    kind: Literal["dino_clip"]
    path: str = Field("models/dinov2-large", description="folder of a hub download, facebook/dinov2-large")
    clip: str = Field(
        "models/clip-vit-large-patch14", description="folder of a hub download, openai/clip-vit-large-patch14"
    )
    layers: tuple[NonNegativeInt, ...] = Field(
        (0, 3, 6, 9, 11, 15, 20, 24), min_length=1, description="whose output a head sees; 0 is the embedded patches"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the frozen weights")


class WordVisionConfig(Config):
    """A word reward's convolutions and vocabulary: for the embedded model, whose clips are too small for a DINOv2."""

    kind: Literal["word"]
    path: str = Field("shapes-reward", description="folder of a word reward of frames, or the name of an embedded one")


VisionConfig = Annotated[DinoClipConfig | WordVisionConfig, Field(discriminator="kind")]


class VisionGanConfig(Config):
    """A discriminator on frozen vision features. Real are the teacher's clips of the same prompts."""

    vision: VisionConfig = Field(DinoClipConfig(kind="dino_clip"), description="the frozen networks it judges by")
    weight: NonNegativeFloat = Field(2.0, description="of the hinge loss in the student's, times (1 - sigma)^2")
    frames: PositiveInt = Field(2, description="of each clip that it sees, evenly spaced from first to last")
    halvings: int = Field(3, ge=0, le=3, description="how often a head halves its map before it judges")
    augment: bool = Field(default=True, description="change colour and place of judged frames and cut a part out")


class VisionFeatures(Protocol):
    """Frozen networks that see frames and read prompts."""

    @property
    def widths(self) -> Sequence[int]:
        """D of each map of features."""
        ...

    @property
    def text_width(self) -> int:
        """D of a prompt's features."""
        ...

    def maps(self, frames: Tensor) -> tuple[Tensor, ...]:
        """Of frames `[N, 3, height, width]` in [0, 1] the maps `[N, D, rows, columns]`; gradient reaches the frames."""
        ...

    def text(self, prompts: Sequence[str]) -> Tensor:
        """`[B, D]` of B prompts, without gradient."""
        ...


class SpectralConv(nn.Conv2d):
    """A circular convolution whose weight is divided by its largest singular value.

    That is found by power iteration from a fixed start, anew in each call: torch's own keeps the last iterate, a state
    that would be neither in a checkpoint nor the same in split processes.
    """

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, size, stride, padding=size // 2, padding_mode="circular")

    def forward(self, features: Tensor) -> Tensor:
        """Convolve `[N, D, rows, columns]`."""
        weight = self.weight / largest_singular_value(self.weight.flatten(1))
        found: Tensor = self._conv_forward(features, weight, self.bias)
        return found


POWER_ITERATIONS = 8


def largest_singular_value(matrix: Tensor) -> Tensor:
    """0-d, with gradient to the matrix; what `POWER_ITERATIONS` find, which is never above the true one."""
    with torch.no_grad():
        left = torch.linspace(0.5, 1.5, len(matrix), device=matrix.device, dtype=matrix.dtype)
        for _ in range(POWER_ITERATIONS):
            right = F.normalize(matrix.T @ left, dim=0)
            left = F.normalize(matrix @ right, dim=0)
    return left @ matrix @ right


def block(width: int, size: int) -> nn.Sequential:
    """A convolution, normalised by groups of channels: a clip's logit does not depend on the clips beside it."""
    return nn.Sequential(SpectralConv(width, width, size), nn.GroupNorm(math.gcd(8, width), width), nn.LeakyReLU(0.2))


class Residual(nn.Module):
    """`(x + block(x)) / sqrt(2)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = block(width, 3)

    def forward(self, features: Tensor) -> Tensor:
        """Add and scale."""
        found: Tensor = (features + self.block(features)) / math.sqrt(2)
        return found


COMPARED = 64
"""Channels in which a head compares a frame with text and real frame."""


def trunk(width: int, halvings: int) -> nn.Sequential:
    """Features `[N, width, rows, columns]` to `[N, COMPARED, ...]`, halved that often."""
    layers: list[nn.Module] = [block(width, 1)]
    for place in range(3):
        if place < halvings:
            layers.append(SpectralConv(width, width, 3, stride=2))
        if place < 2:
            layers.append(Residual(width))
    return nn.Sequential(*layers, SpectralConv(width, COMPARED, 1))


class VisionHead(nn.Module):
    """Logits `[N, places]` of one map of features, given text and the same map of real frames."""

    def __init__(self, width: int, text_width: int, halvings: int) -> None:
        super().__init__()
        self.judged, self.real = trunk(width, halvings), trunk(width, halvings)
        self.text = nn.Linear(text_width, COMPARED)

    def forward(self, features: Tensor, text: Tensor, real: Tensor) -> Tensor:
        """Above 0: real."""
        wanted = self.text(text)[:, :, None, None] + self.real(real)
        found: Tensor = (self.judged(features) * wanted).sum(dim=1).flatten(1) / math.sqrt(COMPARED)
        return found


class VisionHeads(nn.Module):
    """One head a map: logits `[N, places]` of all."""

    def __init__(self, vision: VisionFeatures, halvings: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(VisionHead(width, vision.text_width, halvings) for width in vision.widths)

    def forward(self, judged: Sequence[Tensor], text: Tensor, real: Sequence[Tensor]) -> Tensor:
        """Above 0: real."""
        found = [head(*maps[:1], text, *maps[1:]) for head, *maps in zip(self.heads, judged, real, strict=True)]
        return torch.cat(found, dim=1)


@dataclass(frozen=True)
class VisionDiscriminator:
    """The hinge loss on frozen features.

    Args:
        vision: never learns.
        heads: what learns.
        cfg: its settings.
        mean_of_processes: of a loss that all processes which share each clip find alike: each passes on its share of
            the gradient to the heads.
    """

    vision: VisionFeatures
    heads: VisionHeads
    cfg: VisionGanConfig
    mean_of_processes: Callable[[Tensor], Tensor] = lambda found: found

    def seen(self, videos: Tensor) -> Tensor:
        """The frames of clips `[B, T, 3, height, width]` that it looks at."""
        last = videos.shape[1] - 1
        return videos[:, torch.linspace(0, last, min(self.cfg.frames, last + 1)).round().long().to(videos.device)]

    def __call__(self, frames: Tensor, real: Tensor, batch: PromptBatch, *stream: int) -> Tensor:
        """Logits `[B, places]`.

        Args:
            frames: `[B, N, 3, height, width]` in [0, 1], which are judged.
            real: as many of clips of the same prompts, which they are compared with.
            batch: of these clips; augmentations are drawn by its seeds.
            stream: tells draws apart.
        """
        if self.cfg.augment:
            frames = augment(frames, [draw_uniform(batch, *stream, 10 + i) for i in range(7)])
        here, there = (self.vision.maps(each.flatten(0, 1).float()) for each in (frames, real))
        text = self.vision.text(batch.prompts).to(here[0]).repeat_interleave(frames.shape[1], dim=0)
        found: Tensor = self.heads(here, text, there)
        return found.view(len(frames), -1)

    @staticmethod
    def discriminator_loss(student: Tensor, real: Tensor) -> Tensor:
        """`[B]`: means over places of `relu(1 + logit of the student's) + relu(1 - logit of the real)`."""
        return F.relu(1 + student).mean(dim=1) + F.relu(1 - real).mean(dim=1)

    @staticmethod
    def generator_loss(student: Tensor) -> Tensor:
        """`[B]`: mean over places of `-logit`."""
        return -student.mean(dim=1)


def build_heads(vision: VisionFeatures, cfg: VisionGanConfig, seed: int) -> VisionHeads:
    """New heads, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return VisionHeads(vision, cfg.halvings)


def augment(videos: Tensor, drawn: Sequence[Tensor]) -> Tensor:
    """Clips `[B, T, 3, height, width]` in [0, 1] in other colours, shifted, with a hole (arXiv 2006.10738).

    Args:
        videos: all frames of a clip are changed alike.
        drawn: seven times `[B]` uniform in [0, 1): brightness, saturation, contrast, and y and x of shift and hole.
    """
    brightness, saturation, contrast = (each.to(videos).view(-1, 1, 1, 1, 1) for each in drawn[:3])
    pixels = videos * 2 - 1 + brightness - 0.5
    pixels = _spread(pixels, 2 * saturation, (2,))
    pixels = _spread(pixels, contrast + 0.5, (2, 3, 4))
    size = videos.shape[3:]
    places = torch.stack([each.double() for each in drawn[3:]]).tolist()
    rows = [_moved(clip, size, *numbers) for clip, *numbers in zip(pixels, *places, strict=True)]
    return (torch.stack(rows) + 1) / 2


def _spread(pixels: Tensor, by: Tensor, dim: tuple[int, ...]) -> Tensor:
    mean = pixels.mean(dim=dim, keepdim=True)
    return mean + (pixels - mean) * by


def _moved(clip: Tensor, size: Sequence[int], *places: float) -> Tensor:
    """One clip `[T, 3, height, width]` shifted by up to an eighth, 0 behind it, and a hole of half its size in it."""
    most = [round(side / 8) for side in size]
    shift = [int(at * (2 * side + 1)) for at, side in zip(places[:2], most, strict=True)]
    padded = F.pad(clip, (most[1], most[1], most[0], most[0]))
    clip = padded[..., shift[0] : shift[0] + size[0], shift[1] : shift[1] + size[1]]
    away = [
        (torch.arange(side, device=clip.device) - at * side).abs() for at, side in zip(places[2:], size, strict=True)
    ]
    hole = (away[0] < size[0] / 4)[:, None] & (away[1] < size[1] / 4)
    return clip * ~hole
