"""Lists of prompts as docs/prompts.md describes them: what a row may say, and the files that hold rows."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, Field, ValidationError, field_validator

from rats_video.config.explain import explain
from rats_video.config.fields import Config
from rats_video.datasets.tables import (
    BEYOND,
    COLUMNS,
    SUFFIXES,
    Table,
    TableRow,
    parse_json,
    read_table,
    read_utf8,
    table_row,
    text_of,
)
from rats_video.errors import CONTROLS, UserError, warn
from rats_video.reading import MOST_TEXT

T = TypeVar("T")
MOST_PROMPTS = 2**20  # in a file
MOST_CHARACTERS = 10_000  # in a prompt; tokenizers that read 512 tokens take minutes over a megabyte
_MAX_SEED = 2**63 - 1
TEXT_SUFFIXES = (".txt", "")
VBENCH = "prompt_en"
"""The column of `VBench_full_info.json`; its scorer compares prompts with file names, so their spaces stay."""
_EXAMPLE = reprlib.Repr()
_EXAMPLE.maxstring = 60
_COMMENT = re.compile("^#")
_FLAG = re.compile(r"\s--[a-z]{1,12}(\s|$)")  # kohya-ss's `--w 832 --h 480`, Midjourney's `--ar 16:9`
_HEADERS = {"prompt", "prompts", "prompt_en", "caption", "captions", "file_name"}  # no prompt is one of these words
_KNOWN = _HEADERS | {"seed", "nfe", "id", "image", "last_image", "dimension", *itertools.chain(*COLUMNS.values())}


class PromptRow(Config):
    """A row of a prompt list; what is left out is as the command's options say."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    prompt: str = Field(min_length=1, max_length=MOST_CHARACTERS, description="what the video shows")
    seed: int | None = Field(None, ge=0, le=_MAX_SEED, description="its own: the noise is then that seed's first")
    nfe: int | None = Field(None, ge=1, le=1000, description="network evaluations")
    id: str | None = Field(None, max_length=200, description="any name; the manifest repeats it")
    image: str | None = Field(None, min_length=1, max_length=1024, description="the picture that it starts from")
    last_image: str | None = Field(None, min_length=1, max_length=1024, description="the one that it ends at")
    dimension: tuple[str, ...] = Field((), description="what it tests, in VBench's words; a list, or words and commas")

    @field_validator("dimension", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def read_rows(path: Path) -> list[PromptRow]:
    """The rows of a table (`rats_video.datasets.tables`), or of a text file that holds one prompt a line.

    Empty lines are skipped. Of a table of videos or images, and of VBench's `VBench_full_info.json`, the other columns
    are not looked at; anywhere else an unknown column is a mistake.

    Raises:
        UserError: the file is unreadable, empty or of no known kind, or a row is wrong; says which.
    """
    if is_table(path):
        table = read_table(path)
        return _within_bounds(table_rows(table, is_strict=_is_list(table)), path)
    return [PromptRow.model_construct(prompt=prompt) for prompt in read_prompts(path)]


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of `read_rows`, in order, as often as they are there; of a million lines no rows are made."""
    if is_table(path):
        return tuple(row.prompt for row in read_rows(path))
    return tuple(_within_bounds(_text_lines(path), path))


def place_of(prompt: str, path: Path) -> str:
    """The line of a list that holds a prompt, as a message names it; empty if none does."""
    if is_table(path):
        table = read_table(path)
        rows = zip(table.rows, table_rows(table, is_strict=_is_list(table)), strict=True)
        return next((row.where for row, read in rows if read.prompt == prompt), "")
    lines = enumerate(read_utf8(path, MOST_TEXT).splitlines(), 1)
    return next((f"{path}, line {number}" for number, line in lines if line.strip() == prompt), "")


def _is_list(table: Table) -> bool:
    """True but for a table of videos, whose other columns are its own affair: a prompt may have an image."""
    file = table.column("file")
    return file is None or (file == "image" and "prompt" in table.columns)


def is_table(path: Path) -> bool:
    """True for the suffix of a table, false for that of a text file; raises UserError for any other."""
    suffix = path.suffix.lower()
    if suffix not in {*SUFFIXES, *TEXT_SUFFIXES}:
        raise UserError(
            f"{path.suffix} is the suffix of no list of prompts", where=str(path),
            fix=f"name it .txt where it holds one prompt a line; a table is {', '.join(SUFFIXES)}",
        )  # fmt: skip
    return suffix in SUFFIXES


def table_rows(table: Table, *, is_strict: bool) -> Iterator[PromptRow]:
    """The rows of a table as prompts; raises UserError where one is wrong, or `is_strict` and has an unknown column."""
    return (_table_row(row, is_strict=is_strict) for row in table.rows)


def json_row(line: str, where: str) -> PromptRow:
    """A row written as a JSON object; raises UserError where it is none."""
    return _table_row(table_row(parse_json(line, where), where), is_strict=True)


def _table_row(row: TableRow, *, is_strict: bool) -> PromptRow:
    cells = {name: cell for name, cell in row.cells.items() if cell is not None}
    if BEYOND in cells:
        raise UserError("more fields than columns", where=row.where, fix="put prompts with commas in quotes")
    named = [name for name in COLUMNS["caption"] if name in cells]
    if VBENCH in named or not is_strict:
        cells = {name: cells[name] for name in (*named[:1], "dimension", "image") if name in cells}
    elif len(named) > 1:
        raise UserError(f"has two prompts, {' and '.join(named)}", where=row.where, fix="keep one of them")
    prompt = {"prompt": cells.pop(named[0])} if named else {}
    return as_row(prompt | cells, row.where, strip=VBENCH not in named)


def as_row(content: Mapping[str, Any], where: str, *, strip: bool = True) -> PromptRow:
    """A row of these cells; raises UserError where one is wrong."""
    tree = dict(content)
    if (prompt := text_of(tree.get("prompt"))) is not None:
        tree["prompt"] = prompt.strip() if strip else prompt
    try:
        return PromptRow(**tree)
    except ValidationError as error:
        raise explain(error, PromptRow, tree, [(where, tree)]) from error


def check_plain(prompt: str, *, where: str) -> None:
    """Refuse a prompt that is no text a person wrote: control characters, stray bytes, a book on one line."""
    if found := CONTROLS.search(prompt):
        raise UserError(f"holds the control character {found[0]!a}", where=where, fix="save it as plain UTF-8 text")
    if len(prompt) > MOST_CHARACTERS:
        raise UserError(f"a prompt of {len(prompt)} characters; models read {MOST_CHARACTERS} at most", where=where)


def _within_bounds(found: Iterable[T], path: Path) -> list[T]:
    listed = list(itertools.islice(found, MOST_PROMPTS + 1))
    if not listed:
        raise UserError("no prompt in it", where=str(path), fix="write one prompt a line, or one row a prompt")
    if len(listed) > MOST_PROMPTS:
        raise UserError(f"more than {MOST_PROMPTS} prompts", where=str(path), fix="split it")
    return listed


def _text_lines(path: Path) -> Iterator[str]:
    lines = [line.strip() for line in read_utf8(path, MOST_TEXT).splitlines()]
    _check_text([line for line in lines if line], str(path))
    for number, line in enumerate(lines, 1):
        if line:
            check_plain(line, where=f"{path}, line {number}")
            yield line


def _check_text(lines: Sequence[str], where: str) -> None:
    """Refuse a table in a text file's name, and warn of what other programs would not take for a prompt."""
    if lines and (kind := _kind_of_table(lines)):
        raise UserError(
            f"its first line, {_EXAMPLE.repr(lines[0])}, is {kind}, and a text file holds one prompt a line",
            where=where, fix=f"name it as the table it is: {', '.join(SUFFIXES)}",
        )  # fmt: skip
    for found, one, more in ((_COMMENT, "begins with #", "begin with #"), (_FLAG, "holds options", "hold options")):
        if marked := [line for line in lines if found.search(line)]:
            what = f"{len(marked)} of {len(lines)} prompts {one if len(marked) == 1 else more}"
            _warn_once(f"{what}, as {_EXAMPLE.repr(marked[0])}; all of a line is its prompt", where)


def _kind_of_table(lines: Sequence[str]) -> str:
    """The kind of table that the first line shows, as a clause; empty for a prompt."""
    first = lines[0]
    if first.startswith(("{", "[")):
        for text in (first, "\n".join(lines)):
            with contextlib.suppress(ValueError, RecursionError):
                json.loads(text)
                return "JSON"
    for delimiter in ",;\t|":
        cells = [cell.strip("\"' ").lower() for cell in first.split(delimiter)]
        if all(re.fullmatch(r"\w+", cell) for cell in cells) and (
            len(_KNOWN & {*cells}) > 1 or not _HEADERS.isdisjoint(cells)
        ):
            return "the header of a table"
    return ""


@cache
def _warn_once(what: str, where: str) -> None:
    """Warn once in this process: a run reads its lists again and again."""
    warn(what, where=where)
