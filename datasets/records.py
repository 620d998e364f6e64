"""What travels between the parts of `prepare`: a source video, a clip cut from it, a reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rats_video.config.prepare import BucketConfig


@dataclass(frozen=True)
class SourceVideo:
    """One video that a user has.

    Args:
        name: what it is called in messages and records: its path below SOURCE, or `ARCHIVE.tar/MEMBER`.
        path: the file; the archive of a member.
        caption: None where the user gave none.
        start: seconds where the user's span begins, if a table says so.
        end: seconds where it ends; None for the video's end.
        member: offset and size in bytes of an archive's member; None for a file of its own.
    """

    name: str
    path: Path
    caption: str | None = None
    start: float = 0.0
    end: float | None = None
    member: tuple[int, int] | None = None


@dataclass(frozen=True)
class CutClip:
    """A clip as the VAE will see it.

    Args:
        frames: `[T, 3, height, width]` uint8, of the bucket's size.
        bucket: that size.
        start: seconds into the source of the first frame.
        end: seconds where the last frame's time is over.
        scene: which scene of the source, from 0.
    """

    frames: Tensor
    bucket: BucketConfig
    start: float
    end: float
    scene: int = 0


@dataclass(frozen=True)
class Skipped:
    """A source, or a span of it, that gave no clip; `reason` is one clause, equal for equal causes, to be counted."""

    name: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class ReadSource:
    """What one source gave.

    Args:
        source: it.
        digest: SHA-256 of its bytes; empty where they could not be read.
        clips: in order of time.
        skipped: why it gave none, or why some spans gave none.
    """

    source: SourceVideo
    digest: str
    clips: tuple[CutClip, ...] = ()
    skipped: tuple[Skipped, ...] = ()
