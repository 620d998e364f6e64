"""The rating page in a real browser: by keyboard, by hand at a phone's width, and past a server that was killed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from ratings import PROMPTS, rating_of

from rats_video.rating.raters import Raters, schedule
from rats_video.rating.record import Rating
from rats_video.rating.server import RatingServer
from rats_video.rating.votes import VOTES

pytestmark = pytest.mark.pipeline
Watch = Callable[..., Any]
HOSTILE = "a <img src=x onerror=alert(1)> circle"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Rating, Path]:
    return rating_of(tmp_path_factory.mktemp("rating"), {"one": 0.2, "two": 0.5}, [HOSTILE, *PROMPTS[:2]])


@pytest.fixture
def server(made: tuple[Rating, Path]) -> Iterator[RatingServer]:
    with closing(RatingServer(Raters(*made), 0)) as server:
        yield server
    (made[1] / VOTES).unlink(missing_ok=True)


def votes(folder: Path) -> list[tuple[str, str | None]]:
    lines = (folder / VOTES).read_text().splitlines() if (folder / VOTES).exists() else []
    return [(line["person"], line["choice"]) for line in map(json.loads, lines)]


def start(page: Page, person: str) -> None:
    page.get_by_label("Your name").fill(person)
    page.keyboard.press("Enter")
    expect(page.locator("#progress")).to_contain_text(f"{person.strip()}: ")


def at(page: Page, done: int, person: str = "ann") -> None:
    """Waits until so many are done, and the next pair plays."""
    expect(page.locator("#progress")).to_have_text(f"{person}: {done} of 5")
    if done < 5:
        expect(page.get_by_role("button", name="First")).to_be_enabled()


def until(page: Page, expression: str) -> None:
    """Waits for it to be true; the page's policy forbids Playwright's own way, which is eval."""
    for _ in range(1000):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(5)
    pytest.fail(f"never true: {expression}")


def times(page: Page) -> list[float]:
    return [page.locator(name).evaluate("video => video.currentTime") for name in ("#clip1", "#clip2")]


def test_by_keyboard(watched: Watch, server: RatingServer, made: tuple[Rating, Path]) -> None:
    rating, folder = made
    order = schedule(rating, "ann", rating.pairs)
    with watched(server.url, "blob:", "data:") as page:
        page.keyboard.press("1")  # nobody votes yet
        start(page, "ann")
        at(page, 0)
        expect(page.locator("#prompt")).to_have_text(order[0].pair.prompt)
        assert page.locator("#prompt img").count() == 0

        # Both play, together, again and again.
        until(page, "clip1.currentTime > 0.2 && clip2.currentTime > 0.2")
        one, two = times(page)
        assert abs(one - two) < 0.15
        until(page, "clip1.currentTime < 0.2 && clip2.currentTime < 0.2 && !clip1.paused && !clip2.paused")

        page.keyboard.press("1")
        at(page, 1)
        page.keyboard.press("2")
        at(page, 2)
        page.keyboard.press("u")
        at(page, 1)
        expect(page.locator("#prompt")).to_have_text(order[1].pair.prompt)
        page.keyboard.press("0")
        at(page, 2)
        page.keyboard.press("9")  # means nothing
        page.keyboard.press("Control+1")  # is the browser's
        assert votes(folder) == [("ann", "left"), ("ann", "right"), ("ann", None), ("ann", "same")]

        # Another person starts afresh, and ann goes on where she stopped, on a page loaded again.
        page.reload()
        expect(page.get_by_label("Your name")).to_have_value("ann")
        start(page, "bob")
        at(page, 0, "bob")
        page.reload()
        start(page, " ann ")
        at(page, 2)
        for done in (3, 4, 5):
            page.keyboard.press("2")
            at(page, done)
        expect(page.locator("#end")).to_have_text("Thank you, ann: all 5 are done.")
        page.keyboard.press("1")
        page.keyboard.press("U")
        at(page, 4)
        assert votes(folder)[-4:] == [("ann", "right")] * 3 + [("ann", None)]


def test_at_a_phones_width_by_hand(watched: Watch, server: RatingServer, made: tuple[Rating, Path]) -> None:
    with watched(server.url, "blob:", "data:") as page:
        page.set_viewport_size({"width": 390, "height": 844})
        start(page, "ann")
        at(page, 0)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate("document.documentElement.scrollHeight") <= 844  # both clips and all buttons at once
        boxes = [page.locator(name).bounding_box() for name in ("#clip1", "#clip2")]
        assert boxes[0] is not None
        assert boxes[1] is not None
        assert boxes[1]["y"] > boxes[0]["y"] + boxes[0]["height"]  # below each other
        assert boxes[0]["width"] > 300
        assert boxes[0]["height"] > 200
        caption, choices = page.locator("figcaption").last.bounding_box(), page.locator("#choices").bounding_box()
        assert caption is not None
        assert choices is not None
        assert caption["y"] + caption["height"] <= choices["y"]  # the buttons cover nothing
        for name in ("First", "No difference", "Second", "Undo"):
            box = page.get_by_role("button", name=name).bounding_box()
            assert box is not None
            assert box["height"] >= 36
        expect(page.get_by_role("button", name="Undo")).to_be_disabled()
        page.get_by_role("button", name="Second").click()
        at(page, 1)
        page.get_by_role("button", name="No difference").click()
        at(page, 2)
        page.get_by_role("button", name="Undo").click()
        at(page, 1)
        assert votes(made[1]) == [("ann", "right"), ("ann", "same"), ("ann", None)]


def test_a_killed_server_loses_nothing(browser: Any, made: tuple[Rating, Path]) -> None:
    rating, folder = made
    first = RatingServer(Raters(rating, folder), 0)
    page = browser.new_page()
    page.goto(first.url)
    start(page, "ann")
    at(page, 0)
    page.keyboard.press("1")
    at(page, 1)
    port = first.server_port
    first.close()
    page.keyboard.press("2")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The server does not answer. Your votes are saved")
    expect(page.locator("#progress")).to_have_text("ann: 1 of 5")  # the pair stays
    with closing(RatingServer(Raters(rating, folder), port)):
        page.keyboard.press("2")
        at(page, 2)
        expect(alert).to_be_hidden()
        assert votes(folder) == [("ann", "left"), ("ann", "right")]
    page.close()
    (folder / VOTES).unlink()


def test_clips_of_one_frame_are_pictures(watched: Watch, tmp_path: Path) -> None:
    rating, folder = rating_of(tmp_path, {"one": 0.2, "two": 0.5}, PROMPTS[:3], frames=1)
    assert {Path(file).suffix for pair in (*rating.pairs, *rating.checks) for file in pair.key} == {".png"}
    with closing(RatingServer(Raters(rating, folder), 0)) as server, watched(server.url, "blob:", "data:") as page:
        start(page, "ann")
        at(page, 0)
        for side in (1, 2):
            expect(page.locator(f"#image{side}")).to_be_visible()
            expect(page.locator(f"#clip{side}")).to_be_hidden()
            assert page.evaluate(f"document.getElementById('image{side}').naturalWidth") == 32
        page.keyboard.press("1")
        at(page, 1)
    assert votes(folder) == [("ann", "left")]
