"""Which clips a folder holds, and of what: `manifest.json` once all are there, JSON lines on the way."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import Field, TypeAdapter

from rats_video.config.fields import Config, NonNegativeInt, PositiveInt
from rats_video.errors import UserError
from rats_video.files import write_json
from rats_video.inference.video import is_whole_png

MANIFEST = "manifest.json"
_JOURNALS = "manifest.part-*.jsonl"
_FIX = "add --overwrite, or give another --output"


class SampledClip(Config):
    """One clip of a folder: how it was made, with everything its pixels depend on."""

    file: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*\.(mp4|png)$")
    prompt: str
    nfe: PositiveInt
    num_steps: PositiveInt
    seed: NonNegativeInt
    noise: NonNegativeInt = Field(description="its starting noise is the seed's of this number")
    index: NonNegativeInt = Field(description="its place in the list")
    id: str | None = None
    image: str | None = Field(None, description="digest of the picture that it starts from")
    last_image: str | None = Field(None, description="of the one that it ends at")
    student: str = Field(description="digest of the student's weights and card")
    seconds: float


def read_clips(folder: Path) -> dict[int, SampledClip]:
    """The clips by index that the folder's manifest and journals tell of; the last word counts.

    A journal's last line may be cut off, by a kill in the middle of it; it is left out.

    Raises:
        UserError: one of them is damaged in another way.
    """
    found: dict[int, SampledClip] = {}
    for path in (folder / MANIFEST, *sorted(folder.glob(_JOURNALS))):
        if path.is_file():
            try:
                text = path.read_text(encoding="utf-8")
                rows = (
                    TypeAdapter(list[SampledClip]).validate_json(text)
                    if path.name == MANIFEST
                    else [SampledClip.model_validate_json(line) for line in text.split("\n")[:-1]]
                )
            except (OSError, ValueError) as error:
                raise UserError("is damaged, or not of this version", where=str(path), fix=_FIX) from error
            found |= {row.index: row for row in rows}
    return found


def is_whole(path: Path, num_frames: int) -> bool:
    """True if a clip's file is there with all its frames; of an mp4 told from its packets, without decoding."""
    import av

    if path.suffix == ".png":
        return is_whole_png(path)
    try:
        with av.open(str(path)) as container:
            packets = [packet.size for packet in container.demux(video=0) if packet.size and not packet.is_corrupt]
    except (av.error.FFmpegError, OSError, IndexError):  # IndexError: no video in it
        return False
    return len(packets) == num_frames


def clear(folder: Path) -> None:
    """Remove the folder's manifest, and the clips it tells of; no other file."""
    try:
        clips = read_clips(folder)
    except UserError:  # then it tells of none
        clips = {}
    for path in (*(folder / clip.file for clip in clips.values()), folder / MANIFEST, *folder.glob(_JOURNALS)):
        path.unlink(missing_ok=True)


def write_manifest(folder: Path, clips: Iterable[SampledClip]) -> None:
    """Write all clips in order into the manifest, in place of the journals."""
    rows = [clip.model_dump(exclude_none=True) for clip in sorted(clips, key=lambda clip: clip.index)]
    write_json(folder / MANIFEST, rows)
    for journal in folder.glob(_JOURNALS):
        journal.unlink()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other commands out of a folder; the lock ends with the process, however it ends.

    Raises:
        UserError: another command has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                fix = "wait for it, or give another --output"
                raise UserError("another command samples into this folder", where=str(folder), fix=fix) from error
        yield
    finally:
        os.close(descriptor)


class Journal:
    """Context in which clips are noted one by one as they are ready: a line each, however many there are."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / _JOURNALS.replace("*", str(rank))

    def __enter__(self) -> Self:
        self._file = self._path.open("ab")
        self._file.truncate(self._path.read_bytes().rfind(b"\n") + 1)  # a kill may have cut its last line off
        return self

    def add(self, clip: SampledClip) -> None:
        """Note a clip whose file is there."""
        self._file.write(clip.model_dump_json(exclude_none=True).encode() + b"\n")
        self._file.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._file.tell():
            self._path.unlink(missing_ok=True)
        self._file.close()
