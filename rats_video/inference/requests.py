"""What is to be sampled: the rows of a prompt list, or the lines of a pipe as they arrive."""

from __future__ import annotations

import csv
import json
import os
import select
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, ValidationError

from rats_video.config.explain import explain
from rats_video.config.schema import Config
from rats_video.datasets.prompts import check_prompt, read_prompt_file
from rats_video.errors import UserError, warn

_MAX_LINE = 2**16  # bytes: a pipe that never ends its line must not fill the memory
_MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Request:
    """One clip to make, by what its pixels depend on beside the student.

    Args:
        index: its place in the list.
        prompt: what it shows.
        nfe: network evaluations.
        seed: its starting noise is one of this seed's,
        noise: namely this one, counted from 0.
        id: what the list calls it.
    """

    index: int
    prompt: str
    nfe: int
    seed: int
    noise: int
    id: str | None = None


class Row(Config):
    """A row of a prompt list; what is left out is as the command's options say."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    prompt: str = Field(min_length=1, max_length=10_000, description="what the video shows")
    seed: int | None = Field(None, ge=0, le=_MAX_SEED, description="its own: the noise is then that seed's first")
    nfe: int | None = Field(None, ge=1, le=1000, description="network evaluations")
    id: str | None = Field(None, max_length=200, description="any name; the manifest repeats it")

    def request(self, index: int, *, nfe: int, seed: int, turn: int = 0) -> Request:
        """The clip at `index` that this row asks for, the `turn`-th time (from 0) that its list comes round."""
        own, noise = (seed, index) if self.seed is None else (self.seed, turn)
        return Request(index, self.prompt, self.nfe or nfe, own, noise, self.id)


def read_rows(path: Path) -> list[Row]:
    """The rows of a `.jsonl` or `.csv` file, or of any other that holds one prompt a line; empty lines are skipped.

    Raises:
        UserError: the file is unreadable or empty, or a row is wrong; says which.
    """
    if path.suffix not in {".jsonl", ".csv"}:
        return [Row(prompt=prompt) for prompt in read_prompt_file(path)]
    read = _csv_rows if path.suffix == ".csv" else _json_rows
    try:
        rows = list(read(path))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", error)
        raise UserError(f"cannot read the prompts: {reason}", where=str(path)) from error
    if not rows:
        raise UserError("no prompt in it", where=str(path), fix="write one row a prompt")
    return rows


def list_requests(rows: Sequence[str | Row], *, nfe: int, seed: int, count: int | None = None) -> list[Request]:
    """A request a row, or `count` of them with the rows taken in turn."""
    whole = [row if isinstance(row, Row) else Row.model_construct(prompt=row) for row in rows]
    return [
        whole[i % len(whole)].request(i, nfe=nfe, seed=seed, turn=i // len(whole))
        for i in range(len(whole) if count is None else count)
    ]


def piped_requests(
    descriptor: int,
    unknown_words: Callable[[str], Sequence[str]],
    *,
    nfe: int,
    seed: int,
    refused: list[UserError],
) -> Iterator[Request | None]:
    """A request for each line of a pipe as it arrives; None wherever the next one would have to be waited for.

    A line that cannot be followed keeps its number; it is warned of, and what is wrong with it put into `refused`.
    """
    index = 0
    for line in arriving_lines(descriptor):
        if line is None:
            yield None
        elif line.strip():
            where = f"line {index + 1}"
            try:
                row = parse_line(line, where=where)
                check_prompt(row.prompt, unknown_words, where=where)
            except UserError as error:
                refused.append(error)
                warn(str(error))
            else:
                yield row.request(index, nfe=nfe, seed=seed)
            index += 1


def parse_line(line: bytes, *, where: str) -> Row:
    """A line of a pipe: a row as JSON where it begins with `{`, otherwise a prompt.

    Raises:
        UserError: it is neither.
    """
    try:
        text = line.decode().strip()
    except UnicodeDecodeError as error:
        raise UserError("is not UTF-8 text", where=where) from error
    return _json_row(text, where) if text.startswith("{") else _row({"prompt": text}, where)


def arriving_lines(descriptor: int) -> Iterator[bytes | None]:
    """Lines without their ends as they arrive, empty ones too; None wherever the next one would have to be waited for.

    Raises:
        UserError: a line is longer than any prompt.
    """
    rest = b""
    while True:
        if not select.select([descriptor], [], [], 0)[0]:
            yield None
        piece = os.read(descriptor, _MAX_LINE)
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
        if len(rest) > _MAX_LINE:
            raise UserError(
                f"a line of more than {_MAX_LINE} bytes", where="--prompts -", fix="end each prompt with a newline"
            )
        if not piece:
            break
    if rest:
        yield rest


def in_batches(requests: Iterable[Request | None], size: int) -> Iterator[list[Request]]:
    """Up to `size` requests at a time; a None among them says not to wait for more."""
    batch: list[Request] = []
    for request in requests:
        if request is not None:
            batch.append(request)
        if batch and (request is None or len(batch) == size):
            yield batch
            batch = []
    if batch:
        yield batch


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _json_row(line, f"{path}, line {number}")


def _csv_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in (reader := csv.DictReader(file, restkey="(beyond the header)", strict=True)):
            if cells := {key: cell for key, cell in row.items() if cell}:
                yield _row(cells, f"{path}, line {reader.line_num}")


def _json_row(line: str, where: str) -> Row:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError("is no JSON", where=where, fix='like {"prompt": "a red circle", "seed": 7}') from error
    if not isinstance(content, dict):
        raise UserError("is no JSON object", where=where, fix='like {"prompt": "a red circle", "seed": 7}')
    return _row(content, where)


def _row(content: Mapping[str, Any], where: str) -> Row:
    tree = {
        key: value.strip() if key == "prompt" and isinstance(value, str) else value for key, value in content.items()
    }
    try:
        return Row(**tree)
    except ValidationError as error:
        raise explain(error, Row, tree, [(where, tree)]) from error
