"""Lists whose prompts come with pictures that a video starts from, and ends at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from rats_video.datasets.prompts.files import PromptRow, read_rows
from rats_video.datasets.video.pictures import check_picture, find_picture
from rats_video.errors import UserError, warn


@dataclass(frozen=True)
class PicturedPrompt:
    """A prompt, the picture that its clip starts from, and the one that it ends at, if any."""

    prompt: str
    first: Path
    last: Path | None = None


def read_pictured(path: Path) -> tuple[PicturedPrompt, ...]:
    """The rows of a list whose pictures can be read, each once; the others are warned of by name and left out.

    Every picture is decoded here, once in this process, so that none fails in the middle of a run.

    Raises:
        UserError: the list cannot be read, no row is left, or only some of its clips end at a picture.
    """
    changed = path.stat().st_mtime_ns if path.is_file() else 0
    return _read(path, changed)


@lru_cache(maxsize=8)
def _read(path: Path, changed: int) -> tuple[PicturedPrompt, ...]:  # noqa: ARG001  # a changed list is read anew
    rows, usable = read_rows(path), dict[PicturedPrompt, int]()
    if not any(row.image for row in rows):
        fix = "add the column, docs/prompts.md, or set prompts.first_frame=false"
        raise UserError("no row of it has an image", where=str(path), fix=fix)
    refused = []
    for number, row in enumerate(rows, 1):
        try:
            usable.setdefault(_pictured(row, path, number), number)
        except UserError as error:
            refused.append(error)
            warn(str(error))
    if not usable:
        raise UserError(f"no row has a picture that can be read, the first: {refused[0]}", where=str(path))
    without = [number for row, number in usable.items() if row.last is None]
    if 0 < len(without) < len(usable):
        raise UserError(
            "has no last_image, which other rows have", where=f"{path}, row {without[0]}",
            fix="give it to all rows or to none: all clips of a run are made in one way",
        )  # fmt: skip
    return tuple(usable)


def _pictured(row: PromptRow, path: Path, number: int) -> PicturedPrompt:
    """A row with its pictures found and checked; raises UserError."""
    found: list[Path | None] = []
    for kind, name in (("image", row.image), ("last_image", row.last_image)):
        where = f"{path}, row {number}: {kind}"
        if name is None:
            if kind == "image":
                raise UserError("names no picture", where=where, fix="the clips of this run start from pictures")
            found.append(None)
            continue
        picture = find_picture(name, path.parent, where=where)
        check_picture(picture, where=where)
        found.append(picture)
    first, last = found
    assert first is not None
    return PicturedPrompt(row.prompt, first, last)
