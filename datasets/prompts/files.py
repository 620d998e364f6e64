"""Lists of prompts as docs/prompts.md describes them: what a row may say, and the files that hold rows."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, Field, ValidationError, field_validator

from rats_video.config.explain import explain
from rats_video.config.fields import Config
from rats_video.errors import CONTROLS, UserError
from rats_video.reading import read_json, read_text

T = TypeVar("T")
MOST_PROMPTS = 2**20  # in a file
MOST_CHARACTERS = 10_000  # in a prompt; tokenizers that read 512 tokens take minutes over a megabyte
_MAX_SEED = 2**63 - 1
_BEYOND = "(beyond the header)"


class PromptRow(Config):
    """A row of a prompt list; what is left out is as the command's options say."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    prompt: str = Field(min_length=1, max_length=MOST_CHARACTERS, description="what the video shows")
    seed: int | None = Field(None, ge=0, le=_MAX_SEED, description="its own: the noise is then that seed's first")
    nfe: int | None = Field(None, ge=1, le=1000, description="network evaluations")
    id: str | None = Field(None, max_length=200, description="any name; the manifest repeats it")
    dimension: tuple[str, ...] = Field((), description="what it tests, in VBench's words; a list, or words and commas")

    @field_validator("dimension", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def read_rows(path: Path) -> list[PromptRow]:
    """The rows of a `.jsonl`, `.csv` or VBench's `.json`, or of any other file that holds one prompt a line.

    Empty lines are skipped.

    Raises:
        UserError: the file is unreadable or empty, or a row is wrong; says which.
    """
    if path.suffix in _TABLES:
        return _read_all(path, _TABLES[path.suffix])
    return [PromptRow.model_construct(prompt=prompt) for prompt in _read_all(path, _text_lines)]


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of `read_rows`, in order, as often as they are there; of a million lines no rows are made."""
    is_table = path.suffix in _TABLES
    return tuple(row.prompt for row in read_rows(path)) if is_table else tuple(_read_all(path, _text_lines))


def json_row(line: str, where: str) -> PromptRow:
    """A row written as a JSON object; raises UserError where it is none."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError("is no JSON", where=where, fix='like {"prompt": "a red circle", "seed": 7}') from error
    if not isinstance(content, dict):
        raise UserError("is no JSON object", where=where, fix='like {"prompt": "a red circle", "seed": 7}')
    return as_row(content, where)


def as_row(content: Mapping[str, Any], where: str) -> PromptRow:
    """A row of these cells; raises UserError where one is wrong."""
    prompt = content.get("prompt")
    tree = {**content, "prompt": prompt.strip()} if isinstance(prompt, str) else dict(content)
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


def _read_all(path: Path, read: Callable[[Path], Iterator[T]]) -> list[T]:
    try:
        found = list(itertools.islice(read(path), MOST_PROMPTS + 1))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read the prompts: {_reason(error)}", where=str(path)) from error
    if not found:
        raise UserError("no prompt in it", where=str(path), fix="write one prompt a line, or one row a prompt")
    if len(found) > MOST_PROMPTS:
        raise UserError(f"more than {MOST_PROMPTS} prompts", where=str(path), fix="split it")
    return found


def _text_lines(path: Path) -> Iterator[str]:
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if prompt := line.strip():
            check_plain(prompt, where=f"{path}, line {number}")
            yield prompt


def _json_lines(path: Path) -> Iterator[PromptRow]:
    for number, line in enumerate(_read_table(path).split("\n"), 1):
        if line.strip():
            yield json_row(line, f"{path}, line {number}")


def _csv_rows(path: Path) -> Iterator[PromptRow]:
    for row in (reader := csv.DictReader(io.StringIO(_read_table(path), newline=""), restkey=_BEYOND, strict=True)):
        if cells := {key: cell for key, cell in row.items() if cell}:
            yield as_row(cells, f"{path}, line {reader.line_num}")


def _vbench_rows(path: Path) -> Iterator[PromptRow]:
    """VBench's `VBench_full_info.json`; its scorer compares prompts with file names, so their spaces stay."""
    entries = read_json(path)
    if not isinstance(entries, list):
        raise ValueError('it is no list of {"prompt_en": ..., "dimension": [...]}, as VBench\'s is')  # noqa: TRY004  # a mistake in a file
    for number, entry in enumerate(entries, 1):
        where = f"{path}, entry {number}"
        if not isinstance(entry, dict) or "prompt_en" not in entry:
            raise UserError("has no prompt_en", where=where, fix="other lists are .txt, .jsonl or .csv")
        tree = {"prompt": entry["prompt_en"], "dimension": entry.get("dimension", [])}
        try:
            yield PromptRow(**tree)
        except ValidationError as error:
            raise explain(error, PromptRow, tree, [(where, tree)]) from error


_TABLES = {".jsonl": _json_lines, ".csv": _csv_rows, ".json": _vbench_rows}


def _read_table(path: Path) -> str:
    return read_text(path).removeprefix("\ufeff")  # which spreadsheets write first


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    if isinstance(error, json.JSONDecodeError):
        return "it is no JSON"
    return getattr(error, "strerror", None) or str(error)
