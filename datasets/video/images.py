"""Pictures as videos of one frame: the formats of photographs, upright, in eight bits a channel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from rats_video.datasets.video.files import MOST_FRAME_PIXELS, Unreadable
from rats_video.errors import first_line

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"))
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # whatever its name: others start programs (EPS), or move
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}  # which Pillow turns into RGB without loss
_DEEP = {"I;16", "I;16B", "I;16L", "I"}  # gray of sixteen bits, of which Pillow would cut off the upper ones


class Picture:
    """A picture with the properties of `datasets.video.reader.open_video`.

    Args:
        pixels: `[height, width, 3]` RGB.
    """

    timestamps: ClassVar[NDArray[np.float64]] = np.zeros(1)
    num_frames, fps = 1, 0.0

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self.height, self.width = pixels.shape[:2]
        self._pixels = pixels

    def frames(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """`[K, height, width, 3]`, K times the picture."""
        return np.stack([self._pixels for _ in indices])


@contextmanager
def open_image(path: Path) -> Iterator[Picture]:
    """Open a picture: upright by its orientation flag, alpha on white, gray in three channels, sixteen bits in eight.

    Raises:
        Unreadable: it is none, is damaged, moves, is too large or holds numbers of another kind.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.height * image.width > MOST_FRAME_PIXELS:
                raise Unreadable("its frames are too large", f"{image.width} x {image.height}")
            if image.format in {"PNG", "WEBP"} and getattr(image, "is_animated", False):
                raise Unreadable("is a moving picture: make a video of it")
            if image.mode not in _MODES | _DEEP:
                raise Unreadable("holds no pixels of eight or sixteen bits", image.mode)
            upright = ImageOps.exif_transpose(image)
            if image.mode in _DEEP:
                upright = Image.fromarray((np.asarray(upright) >> 8).clip(0, 255).astype(np.uint8))
            if upright.has_transparency_data:
                seen = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
            pixels = np.asarray(upright.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unreadable("damaged", first_line(error)) from error
    yield Picture(pixels)
