"""People's votes on disk: a line each in `votes.jsonl`, written before it is acknowledged, never changed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from rats_video.config.explain import first_mistake
from rats_video.config.fields import Config
from rats_video.errors import UserError, first_line
from rats_video.rating.record import Choice
from rats_video.reading import read_text

VOTES = "votes.jsonl"
MOST_NAME = 40  # characters of a person's name
Person = Annotated[str, Field(max_length=MOST_NAME, pattern=r"^\S+( \S+)*$")]
MOST_VOTES = 2**28  # bytes: about a million


class Vote(Config):
    """What a person said of a pair; `choice` is None where they took it back."""

    person: Person
    left: str
    right: str
    choice: Choice | None
    at: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def key(self) -> tuple[str, str]:
        """As `ShownPair.key`."""
        first, second = sorted((self.left, self.right))
        return first, second


def read_votes(folder: Path, known: Iterable[tuple[str, str]]) -> list[Vote]:
    """All lines of FOLDER/votes.jsonl; a last one that a kill cut off is left out, and was never acknowledged.

    Args:
        folder: of the rating.
        known: keys of the pairs that a vote may be on.

    Raises:
        UserError: another line is damaged, or is on no pair of this rating; says which.
    """
    path, keys = folder / VOTES, set(known)
    if not path.exists():
        return []
    try:
        lines = read_text(path, MOST_VOTES).split("\n")[:-1]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the votes: {first_line(error)}", where=str(path)) from error
    votes = []
    for number, line in enumerate(lines, 1):
        try:
            vote = Vote.model_validate_json(line)
        except ValidationError as error:
            raise UserError(first_mistake(error), where=f"{path}, line {number}", fix="mend or delete it") from error
        if vote.key not in keys:
            what = f"no pair of this rating: {vote.left} and {vote.right}"
            raise UserError(what, where=f"{path}, line {number}", fix="mend or delete it")
        votes.append(vote)
    return votes


def append_vote(folder: Path, vote: Vote) -> None:
    """Add a line; when this returns it is on the disk.

    Raises:
        OSError: it cannot be written; then the file is as before.
    """
    with (folder / VOTES).open("ab") as file:
        end = file.tell()
        try:
            file.write(vote.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), end)
            raise


def drop_cut_line(folder: Path) -> None:
    """Cut off what a kill left of a line; only for the holder of the folder's lock."""
    path = folder / VOTES
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def standing(votes: Iterable[Vote]) -> dict[tuple[str, tuple[str, str]], Vote]:
    """The last vote of each person on each pair, in the order of voting; what was taken back is left out."""
    last: dict[tuple[str, tuple[str, str]], Vote] = {}
    for vote in votes:
        last.pop((vote.person, vote.key), None)
        if vote.choice is not None:
            last[vote.person, vote.key] = vote
    return last
