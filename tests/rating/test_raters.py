"""Orders, sides and votes: nothing told, nothing lost."""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
from ratings import PROMPTS, rating_of

from rats_video.errors import UserError
from rats_video.rating.raters import Raters, schedule
from rats_video.rating.record import Choice, Rating
from rats_video.rating.votes import VOTES, read_votes, standing

Made = tuple[Rating, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return rating_of(tmp_path_factory.mktemp("rating"), {"one": 0.2, "two": 0.5, "three": 0.7})


@pytest.fixture(autouse=True)
def no_votes(made: Made) -> Iterator[None]:
    yield
    (made[1] / VOTES).unlink(missing_ok=True)


def all_votes(rating: Rating, folder: Path) -> dict[tuple[str, tuple[str, str]], str | None]:
    keys = [pair.key for pair in (*rating.pairs, *rating.checks)]
    return {key: vote.choice for key, vote in standing(read_votes(folder, keys)).items()}


def test_every_pair_once_and_a_check_in_every_ten(made: Made) -> None:
    rating, _ = made
    assert len(rating.pairs) == 3 * len(PROMPTS)
    assert [check.answer for check in rating.checks] == ["left", "same"]
    orders = [schedule(rating, person, rating.pairs) for person in ("ann", "bob", "cem", "dee")]
    for order in orders:
        assert Counter(trial.pair.key for trial in order) == Counter(p.key for p in (*rating.pairs, *rating.checks))
        places = [place for place, trial in enumerate(order) if trial.pair.answer is not None]
        assert len(places) == 2
        assert places[0] < 11 <= places[1] < 22
    assert len({tuple(trial.pair.key for trial in order) for order in orders}) == 4  # each in an order of their own
    assert schedule(rating, "ann", rating.pairs) == orders[0]

    arms = rating.arm_of
    first = Counter(
        arms[trial.pair.left] for order in orders for trial in order if trial.pair.answer is None
    )  # fmt: skip
    assert all(abs(count - 24) < 14 for count in first.values())  # 72 pairs, each arm in 48: three standard deviations
    names = [trial.name for order in orders for trial in order]
    assert len(set(names)) == len(names)
    assert not any(arm in name for name in names for arm in rating.arms)


def test_a_vote_counts_once_and_undo_brings_its_pair_back(made: Made) -> None:
    rating, folder = made
    raters = Raters(rating, folder)
    first = raters.progress("ann").trial
    assert first is not None
    second = raters.vote("ann", first.name, "left")
    assert (second.done, second.total) == (1, 20)
    assert raters.vote("ann", first.name, "right") == second  # the browser asked twice
    assert all_votes(rating, folder) == {("ann", first.pair.key): "left"}

    back = raters.undo("ann")
    assert (back.trial, back.done) == (first, 0)
    assert raters.undo("ann") == back  # nothing more to take back
    assert all_votes(rating, folder) == {}
    raters.vote("ann", first.name, "same")
    assert all_votes(rating, folder) == {("ann", first.pair.key): "same"}
    lines = [json.loads(line)["choice"] for line in (folder / VOTES).read_text().splitlines()]
    assert lines == ["left", None, "same"]  # nothing is ever deleted
    with pytest.raises(KeyError):
        raters.vote("ann", "0" * 16, "left")


def test_goes_on_where_it_was_killed_in_the_middle_of_a_line(made: Made) -> None:
    rating, folder = made
    raters, seen = Raters(rating, folder), []
    for _ in range(3):
        trial = raters.progress("ann").trial
        assert trial is not None
        seen.append(trial.name)
        raters.vote("ann", trial.name, "left")
    before = all_votes(rating, folder)
    whole = (folder / VOTES).read_bytes()
    (folder / VOTES).write_bytes(whole + whole[: len(whole) // 4])  # cut off, so never acknowledged
    assert all_votes(rating, folder) == before

    again = Raters(rating, folder)
    assert (folder / VOTES).read_bytes() == whole
    progress = again.progress("ann")
    assert progress.done == 3
    assert progress.trial is not None
    assert progress.trial.name not in seen
    assert again.undo("ann").trial.name == seen[-1]  # type: ignore[union-attr]
    assert again.progress("bob").done == 0


def test_two_at_once_lose_nothing(made: Made) -> None:
    rating, folder = made
    raters = Raters(rating, folder)

    def vote_all(person: str, choice: Choice) -> None:
        while (trial := raters.progress(person).trial) is not None:
            raters.vote(person, trial.name, choice)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(vote_all, ("ann", "bob", "cem", "ann"), ("left", "right", "same", "left")))
    votes = all_votes(rating, folder)
    assert Counter(person for person, _ in votes) == {"ann": 20, "bob": 20, "cem": 20}
    assert {choice for (person, _), choice in votes.items() if person == "bob"} == {"right"}


def test_a_full_disk_leaves_the_file_whole_and_the_pair_open(made: Made) -> None:
    rating, folder = made
    raters = Raters(rating, folder)
    trial = raters.progress("ann").trial
    assert trial is not None
    raters.vote("ann", trial.name, "left")
    before, now = (folder / VOTES).read_bytes(), raters.progress("ann")
    assert now.trial is not None
    with (
        mock.patch("rats_video.rating.votes.os.fsync", side_effect=OSError(errno.ENOSPC, "no space")),
        pytest.raises(OSError, match="no space"),
    ):
        raters.vote("ann", now.trial.name, "right")
    assert (folder / VOTES).read_bytes() == before
    assert raters.progress("ann") == now
    assert raters.vote("ann", now.trial.name, "right").done == 2


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 1"),
        ('{"person": "ann", "left": "a.mp4", "right": "b.mp4", "choice": "left", "at": "x"}', "no pair of this rating"),
        ('{"person": "ann", "left": "a", "right": "b", "choice": "up", "at": "x"}', "choice"),
        (
            '{"person": "a\\u001b[2Jnn", "left": "a", "right": "b", "choice": null, "at": "x"}',
            "holds the control character",
        ),
    ],
)
def test_a_damaged_line_is_named_and_stays(made: Made, line: str, says: str) -> None:
    rating, folder = made
    (folder / VOTES).write_text(line + "\n")
    with pytest.raises(UserError, match=says) as caught:
        Raters(rating, folder)
    assert "votes.jsonl, line 1" in str(caught.value)
    assert (folder / VOTES).read_text() == line + "\n"


def test_clips_only_of_trials_that_were_handed_out(made: Made) -> None:
    rating, folder = made
    raters = Raters(rating, folder)
    name = schedule(rating, "ann", rating.pairs)[0].name
    assert raters.clip(name, 0) is None
    trial = raters.progress("ann").trial
    assert trial is not None
    assert (raters.clip(name, 0), raters.clip(name, 1)) == (folder / trial.pair.left, folder / trial.pair.right)


def test_a_record_names_no_file_outside(made: Made, tmp_path: Path) -> None:
    rating, folder = made
    text = (folder / "rating.json").read_text()
    assert Rating.load(folder) == rating
    for odd in ("../../etc/passwd", "clips/../../x.mp4", "/etc/passwd", "clips/..", "votes.jsonl"):
        (tmp_path / "rating.json").write_text(text.replace(rating.checks[0].left, odd))
        with pytest.raises(UserError, match="cannot read it"):
            Rating.load(tmp_path)
    (tmp_path / "rating.json").write_text(text)
    with pytest.raises(UserError, match="names a clip that is not there: checks"):
        Rating.load(tmp_path)
    (tmp_path / "clips").symlink_to("/etc")
    with pytest.raises(UserError, match="leads out of the rating's folder"):
        Rating.load(tmp_path)
    with pytest.raises(UserError, match="no rating here"):
        Rating.load(tmp_path / "none")
