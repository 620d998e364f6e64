"""Lists that say which videos there are and what they show: tables, and pairs of text files."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rats_video.datasets.tables import BEYOND, COLUMNS, SUFFIXES, Table, read_utf8, text_of
from rats_video.errors import UserError

IN_FOLDER = tuple(f"metadata{suffix}" for suffix in SUFFIXES)
LISTS = ("videos.txt", "video.txt")
LISTS_OF_CAPTIONS = ("captions.txt", "caption.txt", "prompts.txt", "prompt.txt")


@dataclass(frozen=True)
class FileRow:
    """A video or image that a list names.

    Args:
        file: as it is written; empty where there is none.
        caption: None where there is none.
        start: seconds.
        end: seconds; None for the video's end.
        problem: why it cannot be used; empty if it can.
        looked_for: where its caption was looked for, as a clause for messages.
    """

    file: str
    caption: str | None
    start: float = 0.0
    end: float | None = None
    problem: str = ""
    looked_for: str = ""


def file_rows(table: Table) -> list[FileRow]:
    """The rows of a table of videos or images."""
    used = {use: table.column(use) for use in COLUMNS}
    looked_for = f"column {used['caption']} is empty" if used["caption"] else table.missing("caption")
    return [replace(_row(row.cells, used), looked_for=looked_for) for row in table.rows]


def read_lists(videos: Path, captions: Path) -> list[FileRow]:
    """Rows of two text files that belong together line by line."""
    files, texts = ([line.strip() for line in read_utf8(path).strip().split("\n")] for path in (videos, captions))
    if len(files) != len(texts):
        raise UserError(
            f"{len(texts)} captions for {len(files)} videos in {videos.name}", where=str(captions),
            fix="write one caption a line, in the order of the videos",
        )  # fmt: skip
    return [FileRow(file, text or None) for file, text in zip(files, texts, strict=True)]


def _row(item: dict[str, Any], used: dict[str, str | None]) -> FileRow:
    found = {use: item.get(name) if name else None for use, name in used.items()}
    file, caption = (text_of(found[use]) for use in ("file", "caption"))
    if item.get(BEYOND):
        return FileRow(file or "", None, problem="more fields than columns: put captions with commas in quotes")
    try:
        start, end = _seconds(found["start"]), _seconds(found["end"])
    except ValueError:
        start, end = math.nan, None
    begin = start or 0.0
    is_span = math.isfinite(begin) and begin >= 0 and (end is None or (math.isfinite(end) and end > begin))
    return FileRow((file or "").strip(), caption, begin, end, "" if is_span else "start and end are no span of seconds")


def _seconds(value: Any) -> float | None:
    """Seconds of a number or `1:02:03.5`; None if empty."""
    if value is None or value == "":
        return None
    if isinstance(value, bool | list | dict):
        raise ValueError("no time")  # noqa: TRY004  # a mistake in a file, like the others
    seconds = 0.0
    for part in str(value).split(":"):
        seconds = 60 * seconds + float(part)
    return seconds
