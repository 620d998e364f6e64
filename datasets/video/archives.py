"""Videos and images in WebDataset's tar archives, addressed by offset and size: nothing is extracted."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rats_video.datasets.tables import COLUMNS, text_of
from rats_video.errors import first_line
from rats_video.reading import check_plain_file

MOST_CAPTION = 2**20  # bytes
_BLOCK = 512


class DamagedArchive(Exception):  # noqa: N818  # no error of ours: what a file is
    """No tar archive, a compressed one, or one that is cut off; the message is one clause."""


@dataclass(frozen=True)
class Member:
    """A video or image in an archive: its name there, where its bytes are, and its caption."""

    name: str
    offset: int
    size: int
    caption: str | None


def index_archive(path: Path, suffixes: frozenset[str]) -> list[Member]:
    """The videos and images of an archive, with the captions under the same key, `KEY.txt` or `KEY.json`.

    Only headers and captions are read.

    Args:
        path: of the archive, not compressed.
        suffixes: of videos and images, as ".mp4".

    Raises:
        DamagedArchive: it is none, or is cut off.
        OSError: it cannot be read.
    """
    check_plain_file(path)
    videos: list[tarfile.TarInfo] = []
    texts: dict[str, tarfile.TarInfo] = {}
    for member in _members(path):
        suffix = os.path.splitext(member.name)[1].lower()  # noqa: PTH122  # a million Paths take their time
        if suffix in suffixes:
            videos.append(member)
        elif suffix in {".txt", ".json"} and member.size <= MOST_CAPTION:
            texts[key_of(member.name) + suffix] = member
    with path.open("rb") as file:

        def content(member: tarfile.TarInfo | None) -> bytes | None:
            return None if member is None else os.pread(file.fileno(), member.size, member.offset_data)

        return [
            Member(
                video.name, video.offset_data, video.size,
                _caption(*(content(texts.get(key_of(video.name) + suffix)) for suffix in (".txt", ".json"))),
            )
            for video in videos
        ]  # fmt: skip


def key_of(name: str) -> str:
    """The name that the files of one sample share: the path up to the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    size, end = path.stat().st_size, 0
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would keep them all
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK * member.isreg()
                if end > size:
                    raise DamagedArchive("is cut off")
                if member.isreg() and not member.issparse() and not os.path.basename(member.name).startswith("."):  # noqa: PTH119
                    yield member
    except tarfile.TarError as error:
        raise DamagedArchive(f"is no tar archive that can be read: {first_line(error)}") from error
    with path.open("rb") as file:  # where a header is damaged, tarfile takes that for the end
        if os.pread(file.fileno(), _BLOCK, end).strip(b"\0"):
            raise DamagedArchive("is damaged after some of its members")


def _caption(text: bytes | None, table: bytes | None) -> str | None:
    try:
        if text is not None:
            return text.decode()
        found: Any = json.loads(table) if table is not None else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    return next(filter(None, (text_of(found.get(name)) for name in COLUMNS["caption"])), None)
