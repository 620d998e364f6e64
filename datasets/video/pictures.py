"""Pictures that videos start from: found, read and fitted to a clip."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rats_video.datasets.video.clips import fit_frames
from rats_video.datasets.video.files import Unreadable
from rats_video.datasets.video.images import open_image
from rats_video.datasets.video.isolated import IsolatedPool
from rats_video.datasets.video.isolated_worker import Failure
from rats_video.datasets.video.settings import BucketConfig
from rats_video.errors import UserError
from rats_video.types import ClipSpec

_PHOTOGRAPH = "give a photograph: png, jpg, webp, bmp, tiff"
_SECONDS = 20.0  # that a stranger's picture may take, the start of its process included


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
    return fit_picture(_decode(path, where), clip)


def check_picture(path: Path, *, where: str) -> None:
    """Refuse a picture that `read_picture` could not read; raises UserError."""
    _decode(path, where)


def read_sent_picture(sent: bytes, clip: ClipSpec) -> Tensor:
    """As `read_picture`, of a file's bytes from a stranger: decoded in a process of its own, which may crash or hang.

    Raises:
        UserError: they are no picture, or it cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="rats-video-") as folder:
        path = Path(folder) / "picture"
        path.write_bytes(sent)
        with IsolatedPool(_pixels, workers=1, timeout_seconds=_SECONDS) as pool:
            ((_, outcome),) = pool.imap([path])
    if isinstance(outcome, Failure):
        raise UserError(f"the picture: {outcome.reason}", fix=_PHOTOGRAPH)
    return fit_picture(outcome, clip)


def fit_picture(pixels: NDArray[np.uint8], clip: ClipSpec) -> Tensor:
    """Pixels `[height, width, 3]` of any size as `read_picture` fits them: `[3, height, width]` in [0, 1]."""
    size = BucketConfig(num_frames=1, height=clip.height, width=clip.width)
    return fit_frames(pixels[None], size, "crop")[0] / 255


def _decode(path: Path, where: str) -> NDArray[np.uint8]:
    try:
        return _pixels(path)
    except Unreadable as error:
        if not path.exists():
            raise UserError(f"no such picture: {path}", where=where) from error
        raise UserError(f"{path}: {error}", where=where, fix=_PHOTOGRAPH) from error


def _pixels(path: Path) -> NDArray[np.uint8]:
    with open_image(path) as picture:
        pixels: NDArray[np.uint8] = picture.frames([0])[0]
        return pixels


def picture_digest(path: Path) -> str:
    """16 hex digits of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
