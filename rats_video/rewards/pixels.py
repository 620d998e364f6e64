"""Frames as image encoders take them, differentiable: resized, cropped and normalised."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

Pixels = Callable[[Tensor, int], Tensor]
"""`(frames [N, 3, height, width] in [0, 1], size) -> [N, 3, size, size]`, what an image encoder takes."""

# Of the training images: red, green, blue.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def clip_pixels(frames: Tensor, size: int) -> Tensor:
    """Pixels as CLIP's image processor makes them of frames `[N, 3, height, width]` in [0, 1]: `[N, 3, size, size]`.

    Short side to `size` (bicubic, antialiased), centre crop, CLIP's mean and standard deviation.
    """
    return normalize(centre_square(frames, size), CLIP_MEAN, CLIP_STD)


def centre_square(frames: Tensor, size: int, *, half: Callable[[float], int] = math.floor) -> Tensor:
    """Frames `[N, 3, height, width]` with their short side brought to `size` and cropped: `[N, 3, size, size]`.

    Args:
        frames: in [0, 1].
        size: in pixels.
        half: rounds half pixels of an odd margin: transformers rounds them down, torchvision as `round`.
    """
    height, width = frames.shape[-2:]
    short = min(height, width)
    target = (int(size * height / short), int(size * width / short))
    top, left = (half((side - size) / 2) for side in target)
    return resize_bicubic(frames, target)[..., top : top + size, left : left + size]


def resize_bicubic(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Frames `[N, 3, height, width]` in [0, 1] at another size, still in [0, 1] and in float32.

    Antialiased, as image processors do it. Bicubic overshoots [0, 1]: the result is clamped straight-through, so that
    those pixels keep their gradient.
    """
    resized = F.interpolate(frames.float(), size, mode="bicubic", antialias=True)
    return resized + (resized.clamp(0, 1) - resized).detach()


def normalize(frames: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """`(frames - mean) / std`, channel by channel, of frames `[N, 3, height, width]`."""
    return (frames - frames.new_tensor(mean).view(3, 1, 1)) / frames.new_tensor(std).view(3, 1, 1)
