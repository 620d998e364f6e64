"""Requests to sample: the rows of a prompt list, or the lines of a pipe as they arrive."""

from __future__ import annotations

import os
import select
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rats_video.datasets.prompts.files import PromptRow, as_row, json_row
from rats_video.datasets.prompts.split import Reader, check_prompt
from rats_video.errors import UserError, warn

_MAX_LINE = 2**16  # bytes: a pipe that never ends its line must not fill the memory


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
        image: the picture that it starts from.
        last_image: the one that it ends at.
    """

    index: int
    prompt: str
    nfe: int
    seed: int
    noise: int
    id: str | None = None
    image: str | None = None
    last_image: str | None = None


def list_requests(rows: Sequence[str | PromptRow], *, nfe: int, seed: int, count: int | None = None) -> list[Request]:
    """A request a row, or `count` of them with the rows taken in turn."""
    whole = [row if isinstance(row, PromptRow) else PromptRow.model_construct(prompt=row) for row in rows]
    return [
        _request(whole[i % len(whole)], i, nfe=nfe, seed=seed, turn=i // len(whole))
        for i in range(len(whole) if count is None else count)
    ]


def piped_requests(
    descriptor: int,
    reader: Reader,
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
                check_prompt(row.prompt, reader, where=where)
            except UserError as error:
                refused.append(error)
                warn(str(error))
            else:
                yield _request(row, index, nfe=nfe, seed=seed)
            index += 1


def parse_line(line: bytes, *, where: str) -> PromptRow:
    """A line of a pipe: a row as JSON where it begins with `{`, otherwise a prompt.

    Raises:
        UserError: it is neither.
    """
    try:
        text = line.decode().strip()
    except UnicodeDecodeError as error:
        raise UserError("is not UTF-8 text", where=where) from error
    return json_row(text, where) if text.startswith("{") else as_row({"prompt": text}, where)


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


def _request(row: PromptRow, index: int, *, nfe: int, seed: int, turn: int = 0) -> Request:
    """The clip at `index` that a row asks for, the `turn`-th time (from 0) that its list comes round."""
    own, noise = (seed, index) if row.seed is None else (row.seed, turn)
    return Request(index, row.prompt, row.nfe or nfe, own, noise, row.id, row.image, row.last_image)
