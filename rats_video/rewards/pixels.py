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
    """Pixels as OpenAI's CLIP takes them, of frames `[N, 3, height, width]` in [0, 1]: `[N, 3, size, size]`.

    Short side to `size` (bicubic, antialiased), centre crop, CLIP's mean and standard deviation (github openai/CLIP,
    clip/clip.py, by torchvision).
    """
    return normalize(centre_square(frames, size), CLIP_MEAN, CLIP_STD)


def processor_pixels(frames: Tensor, size: int) -> Tensor:
    """The same as transformers' image processor does it: it cuts half a pixel of an odd margin elsewhere."""
    return normalize(centre_square(frames, size, half=math.floor), CLIP_MEAN, CLIP_STD)


def centre_square(frames: Tensor, size: int, *, half: Callable[[float], int] = round, antialias: bool = True) -> Tensor:
    """Frames `[N, 3, height, width]` with their short side brought to `size` and cropped: `[N, 3, size, size]`.

    Args:
        frames: in [0, 1].
        size: in pixels.
        half: rounds half pixels of an odd margin: torchvision to even, as `round` does, transformers down.
        antialias: see `resize_bicubic`.
    """
    target = short_side_to(size, frames)
    top, left = (half((side - size) / 2) for side in target)
    return resize_bicubic(frames, target, antialias=antialias)[..., top : top + size, left : left + size]


def short_side_to(size: int, frames: Tensor) -> tuple[int, int]:
    """Height and width that frames `[..., height, width]` get, as in torchvision, when their short side gets `size`."""
    height, width = frames.shape[-2:]
    short = min(height, width)
    return int(size * height / short), int(size * width / short)


def resize_bicubic(frames: Tensor, size: tuple[int, int], *, antialias: bool = True) -> Tensor:
    """Frames `[N, 3, height, width]` in [0, 1] at another size, still in [0, 1] and in float32.

    Bicubic overshoots [0, 1]: the result is clamped straight-through, so that those pixels keep their gradient.

    Args:
        frames: in [0, 1].
        size: height and width.
        antialias: as image processors do it.
    """
    resized = F.interpolate(frames.float(), size, mode="bicubic", antialias=antialias)
    return resized + (resized.clamp(0, 1) - resized).detach()


def rounded(frames: Tensor) -> Tensor:
    """Frames in [0, 1] in whole steps of 1/255, as 8-bit images have them; gradient passes straight through."""
    return frames + ((frames * 255).round() / 255 - frames).detach()


def normalize(frames: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """`(frames - mean) / std`, channel by channel, of frames `[N, 3, height, width]`."""
    return (frames - frames.new_tensor(mean).view(3, 1, 1)) / frames.new_tensor(std).view(3, 1, 1)
