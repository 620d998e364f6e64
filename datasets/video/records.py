"""Records that the parts of `prepare` exchange: a source video, a clip cut from it, a reason why there is none."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from rats_video.datasets.prepared.cache import Skipped
from rats_video.datasets.video.settings import BucketConfig, PrepareConfig


@dataclass(frozen=True)
class SourceVideo:
    """One video or image that a user has, or what stands for one: a rendered clip, a prompt alone.

    Args:
        name: what it is called in messages and records: its path below SOURCE, or `ARCHIVE.tar/MEMBER`.
        path: the file; the archive of a member.
        caption: None where the user gave none.
        start: seconds where the user's span begins, if a table says so.
        end: seconds where it ends; None for the video's end.
        member: offset and size in bytes of an archive's member; None for a file of its own.
        kind: a `shape` is rendered, and a `prompt` has only its caption: neither has a file.
        index: which of the shapes or prompts.
        looked_for: where its caption was looked for, as a clause for messages.
    """

    name: str
    path: Path
    caption: str | None = None
    start: float = 0.0
    end: float | None = None
    member: tuple[int, int] | None = None
    kind: Literal["video", "image", "shape", "prompt"] = "video"
    index: int = 0
    looked_for: str = ""

    @property
    def has_file(self) -> bool:
        """True if there is something to read."""
        return self.kind in {"video", "image"}


@dataclass(frozen=True)
class CutClip:
    """A clip as the VAE will see it.

    Args:
        frames: `[T, 3, height, width]` uint8, of the bucket's size.
        bucket: that size.
        start: seconds into the source of the first frame.
        end: seconds where the last frame's time is over.
        scene: which scene of the source, from 0.
        repeated: frames that are their predecessor once more, where the source shows fewer a second.
    """

    frames: Tensor
    bucket: BucketConfig
    start: float
    end: float
    scene: int = 0
    repeated: int = 0


@dataclass(frozen=True)
class ReadSource:
    """The result of one source.

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


def split_of(digest: str, cfg: PrepareConfig) -> Literal["train", "heldout"]:
    """The split of all clips of a source: by its content alone, so that no copy of it is in the other split."""
    drawn = int(hashlib.sha256(f"{cfg.seed} {digest}".encode()).hexdigest()[:16], 16) / 2**64
    return "heldout" if drawn < cfg.heldout else "train"
