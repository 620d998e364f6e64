"""Who sees which pair next: an order and sides of each person's own, the same whenever the server starts again."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from pathlib import Path

from rats_video.rating.record import CHECK_EVERY, Choice, Rating, ShownPair, mirrored
from rats_video.rating.votes import Vote, append_vote, drop_cut_line, read_votes, standing


@dataclass(frozen=True)
class Trial:
    """A pair as one person sees it, under a name that tells nothing."""

    name: str
    pair: ShownPair


@dataclass(frozen=True)
class Progress:
    """Where a person stands: the next trial, or None at the end; how many are done and how many there are."""

    trial: Trial | None
    done: int
    total: int


class Raters:
    """The people who vote; calls may come from several threads.

    Args:
        rating: what they see.
        folder: of the rating, whose lock the caller holds.

    Raises:
        UserError: the votes there are damaged.
    """

    def __init__(self, rating: Rating, folder: Path) -> None:
        self._rating, self._folder = rating, folder
        self._pairs, self._lock = rating.pairs, threading.Lock()
        drop_cut_line(folder)
        keys = [pair.key for pair in (*self._pairs, *rating.checks)]
        self._standing = standing(read_votes(folder, keys))
        self._trials: dict[str, dict[str, Trial]] = {}
        self._files: dict[str, tuple[Path, Path]] = {}

    @property
    def has_sound(self) -> bool:
        """True if the clips are heard, too."""
        return self._rating.has_sound

    def progress(self, person: str) -> Progress:
        """Where a person stands."""
        with self._lock:
            return self._progress(person)

    def vote(self, person: str, trial: str, choice: Choice) -> Progress:
        """Note a choice; on a pair that the person judged already it changes nothing, so that a request may come twice.

        Raises:
            KeyError: there is no such trial.
            OSError: the vote cannot be written, and does not count.
        """
        with self._lock:
            pair = self._of(person)[trial].pair
            if (person, pair.key) not in self._standing:
                self._add(Vote(person=person, left=pair.left, right=pair.right, choice=choice))
            return self._progress(person)

    def undo(self, person: str) -> Progress:
        """Take the person's last vote back, if there is one; its pair comes next.

        Raises:
            OSError: as `vote`.
        """
        with self._lock:
            last = next((vote for (who, _), vote in reversed(self._standing.items()) if who == person), None)
            if last is not None:
                self._add(Vote(person=person, left=last.left, right=last.right, choice=None))
            return self._progress(person)

    def clip(self, trial: str, side: int) -> Path | None:
        """The file on a side (0 or 1) of a trial that was handed out; None for any other."""
        with self._lock:
            return self._files[trial][side] if trial in self._files else None

    def _add(self, vote: Vote) -> None:
        append_vote(self._folder, vote)
        self._standing.pop((vote.person, vote.key), None)
        if vote.choice is not None:
            self._standing[vote.person, vote.key] = vote

    def _progress(self, person: str) -> Progress:
        trials = self._of(person).values()
        waiting = [trial for trial in trials if (person, trial.pair.key) not in self._standing]
        return Progress(waiting[0] if waiting else None, len(trials) - len(waiting), len(trials))

    def _of(self, person: str) -> dict[str, Trial]:
        if person not in self._trials:
            self._trials[person] = {trial.name: trial for trial in schedule(self._rating, person, self._pairs)}
            for name, trial in self._trials[person].items():
                self._files[name] = self._folder / trial.pair.left, self._folder / trial.pair.right
        return self._trials[person]


def schedule(rating: Rating, person: str, pairs: list[ShownPair]) -> list[Trial]:
    """All pairs in a random order of the person's own on random sides, and a check somewhere in each `CHECK_EVERY`."""

    def draw(pair: ShownPair, what: str) -> str:
        text = f"{rating.asked.seed}\n{person}\n{pair.left}\n{pair.right}\n{what}"
        return hashlib.sha256(text.encode()).hexdigest()

    order = sorted(pairs, key=lambda pair: draw(pair, "order"))
    for number, check in enumerate(sorted(rating.checks, key=lambda check: draw(check, "order"))):
        order.insert(number * (CHECK_EVERY + 1) + int(draw(check, "place"), 16) % CHECK_EVERY, check)
    return [Trial(draw(pair, "name")[:16], turned(pair) if int(draw(pair, "side"), 16) % 2 else pair) for pair in order]


def turned(pair: ShownPair) -> ShownPair:
    """The same with its sides exchanged."""
    return ShownPair(left=pair.right, right=pair.left, prompt=pair.prompt, answer=mirrored(pair.answer))
