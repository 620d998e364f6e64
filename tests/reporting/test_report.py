"""The report: what it holds of a run, whatever the run holds; and in a real browser, that its clips play together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

Command = Callable[..., Any]
HOSTILE = '</script><script>alert(1)</script> & "quoted" \u2028 prompt'
CLIPS = ".card:not([hidden]) video"


class Reader(HTMLParser):
    """The numbers of cells, the titles of cards, and how many elements there are of each name."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []
        self.titles: list[str] = []
        self.count: dict[str, int] = {}
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self._inside = tag
        found = dict(attrs).get("data-v")
        if found is not None:
            self.values.append(float(found))

    def handle_data(self, data: str) -> None:
        if self._inside == "h3":
            self.titles.append(data)
        self._inside = ""


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text())
    return reader


@pytest.fixture(scope="module")
def run(command: Command, config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "run"
    done = command("run", "--config", config_file, "--output", folder, "--device", "cpu",
                   "--set", "comparison.num_videos=2", "--set", "evaluation.latency_clips=0")  # fmt: skip
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def report(command: Command, run: Path) -> Path:
    done = command("report", run, "--output", run.parent / "report.html")
    assert done.code == 0, done.err
    return run.parent / "report.html"


def test_holds_what_was_measured(run: Path, report: Path) -> None:
    reader = read(report)
    rows = json.loads((run / "evaluation" / "evaluation.json").read_text())["rows"]
    means = {value["mean"] for row in rows for value in row["metrics"].values()}
    assert means <= set(reader.values)
    prompts = [clip["prompt"] for clip in json.loads((run / "comparison" / "index.json").read_text())]
    assert [title for title in reader.titles if title in prompts] == prompts
    assert reader.count["video"] == 3 * len(prompts)


def test_same_run_same_bytes(command: Command, run: Path, report: Path, tmp_path: Path) -> None:
    assert command("report", run, "--output", tmp_path / "again.html").code == 0
    assert (tmp_path / "again.html").read_bytes() == report.read_bytes()


def test_prompts_of_strangers_are_text(command: Command, run: Path, report: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    index = copy / "comparison" / "index.json"
    clips = json.loads(index.read_text())
    clips[0]["prompt"] = HOSTILE
    index.write_text(json.dumps(clips))
    assert command("report", copy, "--output", tmp_path / "report.html").code == 0
    found, before = read(tmp_path / "report.html"), read(report)
    assert found.count["script"] == before.count["script"] == 1
    assert any("<script>alert(1)</script>" in title for title in found.titles)


def test_what_a_run_lacks_is_said_with_its_command(command: Command, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "evaluation")
    (copy / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "lo')
    done = command("report", copy, "--output", tmp_path / "report.html")
    assert done.code == 0
    assert f"run: no evaluation; rats-video evaluate {copy}" in done.out


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["{run}", "--output", "{tmp}/student.safetensors"], "a report's name ends in .html"),
        (["{tmp}"], "holds neither a run nor a comparison of methods"),
        (["{run}", "{run}"], "is given twice"),
    ],
)
def test_mistakes_are_one_line(command: Command, run: Path, tmp_path: Path, arguments: list[str], what: str) -> None:
    done = command("report", *(each.format(run=run, tmp=tmp_path) for each in arguments))
    assert done.code == 2
    assert what in done.err
    assert done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------- in the browser


@pytest.fixture
def page(watched: Callable[..., Any], report: Path) -> Iterator[Page]:
    """The report, loaded; it must not ask anybody for anything, nor complain."""
    with watched(report.as_uri(), "data:") as page:
        yield page


def until(page: Page, expression: str, seconds: float = 20) -> None:
    """Wait for it by asking again: the page's own policy forbids what Playwright would wait with."""
    for _ in range(int(10 * seconds)):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(100)
    pytest.fail(f"never true: {expression}")


def test_clips_play_together(page: Page) -> None:
    page.keyboard.press("Space")
    until(page, f"[...document.querySelectorAll('{CLIPS}')].slice(0, 3).every(v => v.currentTime > 0.1)")
    page.keyboard.press("Space")
    until(page, f"[...document.querySelectorAll('{CLIPS}')].every(v => v.paused)")


def test_scrubber_moves_all_to_one_frame(page: Page) -> None:
    page.locator("#scrub").fill("3")
    until(
        page, f"[...document.querySelectorAll('{CLIPS}')].slice(0, 3).every(v => Math.floor(v.currentTime * 8) === 3)"
    )
    assert page.locator("#frame").inner_text().startswith("4 / 5")


def test_filter_and_sort(page: Page) -> None:
    titles = page.locator(".card h3").all_inner_texts()
    page.locator("#filter").fill(titles[1])
    until(page, "document.querySelectorAll('.card:not([hidden])').length === 1")
    assert page.locator(".card:not([hidden]) h3").all_inner_texts() == [titles[1]]
    page.locator("#filter").fill("no such words")
    until(page, "document.querySelectorAll('.card:not([hidden])').length === 0")
    page.locator("#filter").fill("")
    for way in "-+":
        page.locator("#sort").select_option(f"{way}0")  # the gap
        found = [float(each.get_attribute("data-k0") or "nan") for each in page.locator(".card").all()]
        assert found == sorted(found, reverse=way == "-")


def test_fits_a_phone(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
