"""What is rated: the clips of several arms, and the pairs in which people see them.

    RATING/rating.json         Rating
    RATING/clips/ARM/*.mp4     the clips, each with its prompt in a .txt beside it, as `prepare` reads them
    RATING/checks/*.mp4        damaged copies, whose answer is known
    RATING/votes.jsonl         see `votes`
    RATING/preferences.jsonl   what counts of the votes, as `train reward --data` reads it
    RATING/results.md          the tables

Clips of one frame are `*.png`. Files are named by their place below RATING, with slashes.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from rats_video.config.explain import first_mistake
from rats_video.config.fields import Config
from rats_video.errors import UserError, first_line
from rats_video.files import write_json
from rats_video.reading import read_json, strays

RECORD, CLIPS, CHECKS, PREFERENCES, RESULTS = "rating.json", "clips", "checks", "preferences.jsonl", "results.md"
CHECK_EVERY = 10  # pairs
_FILE = r"^(clips|checks)/[\w.-]*\w[\w.-]*(/\w[\w.-]*)?$"  # no way out of the folder

Choice = Literal["left", "right", "same"]


def mirrored(choice: Choice | None) -> Choice | None:
    """The same choice where the two sides are exchanged."""
    sides: dict[Choice | None, Choice | None] = {"left": "right", "right": "left"}
    return sides.get(choice, choice)


class ShownPair(Config):
    """Two clips of one prompt and noise; `answer` is None but for an attention check, whose answer is known."""

    left: str = Field(pattern=_FILE)
    right: str = Field(pattern=_FILE)
    prompt: str
    answer: Choice | None = None

    @property
    def key(self) -> tuple[str, str]:
        """The two files in order, whichever side they are on."""
        first, second = sorted((self.left, self.right))
        return first, second


class RatedClips(Config):
    """One prompt from one noise: the clip of each arm, as a file."""

    prompt: str
    files: dict[str, str]


class Asked(Config):
    """What the clips are made of, as the command said."""

    runs: tuple[str, ...]
    nfe: int | None
    num_videos: int | None
    seed: int
    prompts: tuple[str, ...]


class Rating(Config):
    """A folder of clips that people compare; with sound if all of them have one."""

    format: Literal[1] = 1
    asked: Asked
    arms: tuple[str, ...] = Field(min_length=2)
    clips: tuple[RatedClips, ...] = Field(min_length=1)
    checks: tuple[ShownPair, ...]
    has_sound: bool = False

    @property
    def pairs(self) -> list[ShownPair]:
        """Every two arms on every prompt and noise; the first arm is on the left."""
        return [
            ShownPair(left=each.files[left], right=each.files[right], prompt=each.prompt)
            for each in self.clips
            for left, right in itertools.combinations(self.arms, 2)
        ]

    @property
    def arm_of(self) -> dict[str, str]:
        """The arm of each file."""
        return {file: arm for each in self.clips for arm, file in each.files.items()}

    def save(self, folder: Path) -> None:
        """Write FOLDER/rating.json."""
        write_json(folder / RECORD, self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: Path) -> Rating:
        """Read FOLDER/rating.json.

        Raises:
            UserError: it is not there, is damaged, or a file that it names is missing.
        """
        path = folder / RECORD
        try:
            rating = cls.model_validate(read_json(path))
        except FileNotFoundError:
            fix = "name the runs to compare: rats-video rate RUN [RUN...]"
            raise UserError("no rating here", where=str(folder), fix=fix) from None
        except (OSError, ValueError) as error:
            reason = first_mistake(error) if isinstance(error, ValidationError) else first_line(error)
            raise UserError(f"cannot read it: {reason}", where=str(path)) from error
        if odd := strays(folder):
            raise UserError("leads out of the rating's folder, or is no plain file", where=str(odd[0]), fix="remove it")
        files = {file for pair in (*rating.pairs, *rating.checks) for file in pair.key}
        if missing := sorted(file for file in files if not (folder / file).is_file()):
            raise UserError(f"names a clip that is not there: {missing[0]}", where=str(path), fix="put it back")
        return rating
