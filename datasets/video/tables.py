"""Tables that say which videos there are and what they show: CSV, TSV, JSON, JSON lines, pairs of text files."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rats_video.errors import UserError, first_line
from rats_video.reading import read_text

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
IN_FOLDER = tuple(f"metadata{suffix}" for suffix in SUFFIXES)
LISTS = ("videos.txt", "video.txt")
LISTS_OF_CAPTIONS = ("captions.txt", "caption.txt", "prompts.txt", "prompt.txt")
COLUMNS = {  # of Hugging Face's VideoFolder, finetrainers, LTX-Video-Trainer, VideoX-Fun, musubi-tuner
    "file": ("file_name", "video", "path", "video_path", "media_path", "file_path", "video_file"),
    "caption": ("caption", "text", "prompt"),
    "start": ("start", "start_time", "start_seconds"),
    "end": ("end", "end_time", "end_seconds"),
}
MOST_TABLE = 2**30  # bytes


@dataclass(frozen=True)
class VideoRow:
    """One line of a table.

    Args:
        file: as it is written; empty where there is none.
        caption: None where there is none.
        start: seconds.
        end: seconds; None for the video's end.
        problem: why it cannot be used; empty if it can.
    """

    file: str
    caption: str | None
    start: float = 0.0
    end: float | None = None
    problem: str = ""


def read_table(path: Path) -> list[VideoRow]:
    """The rows of a table, in its order.

    Raises:
        UserError: it cannot be read, is damaged at some line, or names neither files nor captions.
    """
    text = read_utf8(path)
    try:
        match path.suffix.lower():
            case ".jsonl":
                items = [_object(line, f"line {number}") for number, line in _numbered(text)]
            case ".json":
                items = [_object(item, f"item {number}") for number, item in enumerate(_list(text), 1)]
            case suffix:
                items = list(_csv(text, "\t" if suffix == ".tsv" else ","))
    except (ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"cannot read it: {first_line(error)}", where=str(path)) from error
    names = {name for item in items for name in item}
    used = {use: next((name for name in known if name in names), None) for use, known in COLUMNS.items()}
    if used["file"] is None and used["caption"] is None:
        columns = " or ".join(f"{use} ({', '.join(COLUMNS[use])})" for use in ("file", "caption"))
        raise UserError(f"has no column of the names looked for: {columns}", where=str(path))
    return [_row(item, used) for item in items]


def read_lists(videos: Path, captions: Path) -> list[VideoRow]:
    """Rows of two text files that belong together line by line."""
    files, texts = ([line.strip() for line in read_utf8(path).strip().split("\n")] for path in (videos, captions))
    if len(files) != len(texts):
        raise UserError(
            f"{len(texts)} captions for {len(files)} videos in {videos.name}", where=str(captions),
            fix="write one caption a line, in the order of the videos",
        )  # fmt: skip
    return [VideoRow(file, text or None) for file, text in zip(files, texts, strict=True)]


def read_utf8(path: Path) -> str:
    """Text that may begin with a byte order mark; raises UserError."""
    try:
        return read_text(path, MOST_TABLE).removeprefix("\ufeff")
    except (OSError, ValueError) as error:
        reason = (error.strerror or "it cannot be opened") if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read it: {reason}", where=str(path)) from error


def _numbered(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is no JSON: {first_line(error)}") from error


def _list(text: str) -> list[Any]:
    found = json.loads(text)
    if not isinstance(found, list):
        raise ValueError("it is no list of objects")  # noqa: TRY004  # a mistake in a file, like the others
    return found


def _object(item: Any, place: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise ValueError(f"{place} is no JSON object")  # noqa: TRY004  # a mistake in a file, like the others
    return {str(name).strip().lower(): value for name, value in item.items()}


def _csv(text: str, delimiter: str) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            yield {(name or "").strip().lower(): value for name, value in row.items()}
    except csv.Error as error:
        raise ValueError(f"line {reader.reader.line_num}: {first_line(error)}") from error


def _row(item: dict[str, Any], used: dict[str, str | None]) -> VideoRow:
    found = {use: item.get(name) if name else None for use, name in used.items()}
    file, caption = (found[use] if isinstance(found[use], str) else None for use in ("file", "caption"))
    if item.get(""):  # what a CSV has beyond its last column
        return VideoRow(file or "", None, problem="more fields than columns: put captions with commas in quotes")
    try:
        start, end = _seconds(found["start"]), _seconds(found["end"])
    except ValueError:
        start, end = math.nan, None
    begin = start or 0.0
    is_span = math.isfinite(begin) and begin >= 0 and (end is None or (math.isfinite(end) and end > begin))
    return VideoRow(
        (file or "").strip(), caption, begin, end, "" if is_span else "start and end are no span of seconds"
    )


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
