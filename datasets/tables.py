"""Tables of users, whatever program wrote them: CSV, TSV, JSON and JSON lines, read alike wherever a list is taken."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rats_video.errors import UserError, first_line
from rats_video.reading import read_text

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")  # in any case
# Of Hugging Face's folders, finetrainers, LTX-Video-Trainer, VideoX-Fun, musubi-tuner, Open-Sora-Plan and VBench.
COLUMNS = {
    "file": (
        "file_name", "video", "path", "video_path", "media_path", "file_path", "video_file", "image", "image_path",
        "image_file",
    ),
    "caption": ("caption", "text", "prompt", "cap", "prompt_en"),
    "start": ("start", "start_time", "start_seconds"),
    "end": ("end", "end_time", "end_seconds"),
}  # fmt: skip
BEYOND = ""
"""The column of what a row of a CSV has beyond its header."""
MOST_TABLE = 2**30  # bytes
_SHOWN = 12  # columns


@dataclass(frozen=True)
class TableRow:
    """One row.

    Args:
        where: file and line, for messages.
        cells: by column in lower case; None where one is empty.
    """

    where: str
    cells: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """The rows of a table, in its order; of a CSV without empty ones."""

    path: Path
    rows: tuple[TableRow, ...]

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Every column that a row has, in the order they first come."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.cells if name != BEYOND))

    def column(self, use: str) -> str | None:
        """The column that serves a use of `COLUMNS`: the first of its names that any row has."""
        return next((name for name in COLUMNS[use] if name in self.columns), None)

    def missing(self, *uses: str) -> str:
        """The clause that says which columns were looked for, and which were found."""
        wanted = " or ".join(f"{use} ({', '.join(COLUMNS[use])})" for use in uses)
        more = ", ..." if len(self.columns) > _SHOWN else ""
        return f"no column {wanted} among its columns: {', '.join(self.columns[:_SHOWN])}{more}"


def read_table(path: Path) -> Table:
    """The table in a file whose suffix is one of `SUFFIXES`.

    CSV may be divided by commas, semicolons or tabs; JSON is a list of objects or texts, or an object that holds one.

    Raises:
        UserError: it cannot be read, or is damaged at some line.
    """
    text, suffix = read_utf8(path), path.suffix.lower()
    if suffix == ".json":
        items: Iterator[tuple[str, Any]] = _json_items(path, text)
    elif suffix in {".jsonl", ".ndjson"}:
        items = _json_lines(path, text)
    else:
        items = _csv_rows(path, text, "\t,;" if suffix == ".tsv" else ",;\t")
    return Table(path, tuple(table_row(item, where) for where, item in items))


def read_utf8(path: Path, most: int = MOST_TABLE) -> str:
    """Text that may begin with a byte order mark; raises UserError."""
    try:
        return read_text(path, most).removeprefix("\ufeff")  # which spreadsheets write first
    except (OSError, ValueError) as error:
        reason = (error.strerror or "it cannot be opened") if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read it: {reason}", where=str(path)) from error


def parse_json(text: str, where: str) -> Any:
    """The content of a piece of JSON; raises UserError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError("is no JSON: it is nested too deeply", where=where) from None
    except ValueError as error:
        raise UserError(f"is no JSON: {first_line(error)}", where=where) from error


def table_row(item: Any, where: str) -> TableRow:
    """A row of an object, or of a text, which is its prompt; raises UserError where it is neither."""
    if isinstance(item, str):
        return TableRow(where, {"prompt": item})
    if not isinstance(item, dict):
        raise UserError("is no JSON object", where=where, fix='like {"prompt": "a red circle", "seed": 7}')
    return TableRow(where, {str(name or BEYOND).strip().lower(): cell for name, cell in item.items()})


def text_of(cell: Any) -> str | None:
    """A cell's text, or that of the first of several: some tables hold a list of captions; None where there is none."""
    if isinstance(cell, list):
        cell = next(iter(cell), None)
    return cell if isinstance(cell, str) else None


def _json_items(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    found = parse_json(text, str(path))
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        found = lists[0] if len(lists) == 1 else None
    if not isinstance(found, list):
        raise UserError("holds no list of objects", where=str(path), fix='like [{"prompt": "a red circle"}]')
    for number, item in enumerate(found, 1):
        yield f"{path}, entry {number}", item


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a caption may hold what Unicode calls one
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse_json(line, where)


def _csv_rows(path: Path, text: str, delimiters: str) -> Iterator[tuple[str, Any]]:
    """Rows divided by the mark that the header has most of; of equal ones the first."""
    header = text.partition("\n")[0]
    delimiter = max(delimiters, key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        for row in reader:
            beyond = "".join(row.pop(None, ()))  # where DictReader puts the rest
            cells = {name: cell or None for name, cell in {**row, BEYOND: beyond}.items()}
            if any(cells.values()):
                yield f"{path}, line {reader.line_num}", cells
    except csv.Error as error:
        where = f"{path}, line {reader.reader.line_num}"
        raise UserError(f"is damaged: {first_line(error)}", where=where) from error
