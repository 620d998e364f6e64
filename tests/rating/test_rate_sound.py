"""A rating of clips with sound: people hear one at a time, and both before they choose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from ratings import PROMPTS, rating_of
from sounds import pitch, until_heard

from rats_video.inference.audio import read_sound
from rats_video.rating.raters import Raters, schedule
from rats_video.rating.record import Rating
from rats_video.rating.server import RatingServer

pytestmark = pytest.mark.pipeline
HZ = {"one": 500.0, "two": 2000.0}


@pytest.fixture
def made(tmp_path: Path) -> tuple[Rating, Path]:
    return rating_of(tmp_path, {"one": 0.2, "two": 0.5}, PROMPTS[:2], frames=24, hz=HZ)


@pytest.fixture
def server(made: tuple[Rating, Path]) -> Iterator[RatingServer]:
    with closing(RatingServer(Raters(*made), 0)) as server:
        yield server


def first_pair(rating: Rating, folder: Path) -> list[float]:
    """The tones of the two sides of ann's first pair."""
    pair = schedule(rating, "ann", rating.pairs)[0].pair
    sounds = [read_sound(folder / file) for file in (pair.left, pair.right)]
    return [pitch(sound) for sound in sounds if sound is not None]


def choice(page: Page) -> Any:
    return page.get_by_role("button", name="No difference")


def test_the_page_plays_one_sound_at_a_time_and_waits_for_both(
    watched: Callable[..., Any], server: RatingServer, made: tuple[Rating, Path]
) -> None:
    left, right = first_pair(*made)
    with watched(server.url, "blob:", "data:") as page:
        page.get_by_label("Your name").fill("ann")
        page.keyboard.press("Enter")
        expect(page.locator("#hint")).to_be_visible()
        until_heard(page, {"#clip1": left, "#clip2": 0})
        expect(page.locator("figure.heard")).to_have_count(1)
        page.keyboard.press("0")  # too early: one of them was not heard
        until_heard(page, {"#clip1": 0, "#clip2": right})  # by turns
        expect(choice(page)).to_be_enabled()
        expect(page.locator("#progress")).to_have_text("ann: 0 of 4")
        page.locator("#clip1").click()
        until_heard(page, {"#clip1": left, "#clip2": 0})
        page.keyboard.press("s")
        until_heard(page, {"#clip1": 0, "#clip2": right})
        page.keyboard.press("0")
        expect(page.locator("#progress")).to_have_text("ann: 1 of 4")
        expect(choice(page)).to_be_disabled()  # until this pair was heard


def test_a_damaged_copy_keeps_its_sound(made: tuple[Rating, Path]) -> None:
    rating, folder = made
    assert rating.has_sound
    damaged = next(check for check in rating.checks if check.right.startswith("checks/"))
    before, after = (read_sound(folder / file) for file in (damaged.left, damaged.right))
    assert before is not None
    assert after is not None
    assert pitch(after) == pitch(before)


def test_where_some_have_no_sound_all_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rating, _ = rating_of(tmp_path, {"one": 0.2, "two": 0.5}, PROMPTS[:2], hz={"one": 500.0})
    assert not rating.has_sound
    assert "2 of 4 clips have no sound: all are shown without" in capsys.readouterr().err
