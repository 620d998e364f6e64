"""Pictures that videos start from: found, read and fitted to a clip."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from rats_video.datasets.video.clips import fit_frames
from rats_video.datasets.video.files import Unreadable
from rats_video.datasets.video.images import open_image
from rats_video.datasets.video.settings import BucketConfig
from rats_video.errors import UserError
from rats_video.types import ClipSpec


def find_picture(name: str, folder: Path, *, where: str) -> Path:
    """The file that a list in `folder` names.

    Raises:
        UserError: it is a URL, or lies outside the list's folder, by `..` or by a link.
    """
    if "://" in name:
        raise UserError(f"{name!r} is a URL", where=where, fix="download it beside the list, and name the file")
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        fix = "copy it beside the list"
        raise UserError(f"{name!r} lies outside the folder of the list", where=where, fix=fix)
    return path


def read_picture(path: Path, clip: ClipSpec, *, where: str) -> Tensor:
    """A picture `[3, height, width]` in [0, 1] of a clip's size: scaled to cover it, equal parts cut off two sides.

    It is upright (by EXIF), alpha lies on white, other than eight bits and RGB are converted: see `open_image`.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    size = BucketConfig(num_frames=1, height=clip.height, width=clip.width)
    try:
        with open_image(path) as picture:
            return fit_frames(picture.frames([0]), size, "crop")[0] / 255
    except Unreadable as error:
        if not path.exists():
            raise UserError(f"no such picture: {path}", where=where) from error
        raise UserError(f"{path}: {error}", where=where, fix="give a photograph: png, jpg, webp, bmp, tiff") from error


def picture_digest(path: Path) -> str:
    """16 hex digits of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
