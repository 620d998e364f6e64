"""`rate`: what it compares, what it says, and that the loop closes: a reward is trained on what people preferred."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outcomes import refused
from ratings import PROMPTS, rating_of, sampled

from rats_video.files import locked
from rats_video.rating.raters import Raters
from rats_video.rating.record import Rating

Command = Callable[..., Any]


def ask(url: str, path: str, **body: str) -> Any:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read())


def vote_all(raters: Raters, rating: Rating, person: str, favourite: str, *, checks: bool = True) -> None:
    """Votes for one arm wherever it is shown, and rightly on the checks or always wrongly."""
    while (trial := raters.progress(person).trial) is not None:
        pair = trial.pair
        if pair.answer is not None:
            wrong = {"left": "right", "right": "left", "same": "left"}[pair.answer]
            raters.vote(person, trial.name, pair.answer if checks else wrong)  # type: ignore[arg-type]
        else:
            raters.vote(person, trial.name, "left" if rating.arm_of[pair.left] == favourite else "right")


def test_from_a_page_to_preferences(tmp_path: Path) -> None:
    """As a user: start, vote, Ctrl-C, start again."""
    arms = [sampled(tmp_path / name, brightness=value) for name, value in (("dark", 0.2), ("light", 0.6))]
    argv = [sys.executable, "-P", "-m", "rats_video.cli", "rate", *map(str, arms), "--port", "7893"]

    def rate() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            argv, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
        )  # fmt: skip
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        assert lines[0] == "6 pairs of dark, light: ratings/dark-light\n"
        assert lines[1] == "http://127.0.0.1:7893 (this machine only; Ctrl-C ends it and shows the results)\n"
        return process

    process = rate()
    url = "http://127.0.0.1:7893"
    trial = ask(url, "/next", person="ann")["trial"]
    for _ in range(3):
        trial = ask(url, "/vote", person="ann", trial=trial["name"], choice="left")["trial"]
    process.kill()
    process.wait()

    process = rate()
    again = ask(url, "/next", person="ann")
    assert (again["done"], again["trial"]) == (3, trial)
    while trial:
        trial = ask(url, "/vote", person="ann", trial=trial["name"], choice="left")["trial"]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the page is closed; the same command goes on" in err
    assert "| dark" in out
    lines = (tmp_path / "ratings/dark-light/preferences.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert {json.loads(line)["caption"] for line in lines} == set(PROMPTS)


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three arms; ann prefers the still one, bob the same, eve clicks at random."""
    rating, folder = rating_of(tmp_path_factory.mktemp("rated"), {"dark": 0.2, "middle": 0.4, "light": 0.6})
    raters = Raters(rating, folder)
    vote_all(raters, rating, "ann", "dark")
    vote_all(raters, rating, "bob", "dark")
    vote_all(raters, rating, "eve", "light", checks=False)
    return folder


def test_results_of_several_arms_and_people(command: Command, rated: Path) -> None:
    code, out, err = command("rate", "--output", rated, "--results", "--device", "cpu")
    assert code == 0, err
    assert "eve: 0 of 2 attention checks right, so these votes are left out (--min-attention 0 counts them)" in err
    rows = {cells[1].strip(): cells for line in out.splitlines() if len(cells := line.split("|")) > 3}
    strengths = [line.split("|")[1].strip() for line in out.splitlines()[2:5]]
    assert strengths[0] == "dark"
    assert "1.000 (" in rows["ann"][2]
    assert "1.000 (0.342 to 1.000)" in rows["a red circle"][2]  # all votes of two people
    (pair,) = [line.split("|") for line in out.splitlines() if line.startswith("| dark") and "| middle" in line]
    assert [cell.strip() for cell in pair[3:5]] == ["1.000 (0.610 to 1.000)", "(0.342 to 1.000)"]
    assert "another person" in out
    assert "ann: 2 of 2 attention checks right" in out
    written = (rated / "results.md").read_text()
    assert all(prompt in written for prompt in PROMPTS)

    code, out, err = command("rate", "--output", rated, "--results", "--device", "cpu", "--min-attention", 0)
    assert "left out" not in err
    assert "eve" in out


def test_the_loop_closes(command: Command, rated: Path, tiny_wan: Path, tmp_path: Path) -> None:
    """What `rate` tells to do next is done: prepare, and the preferences are read by `train reward --data`."""
    from rats_video.datasets.prepared.cache import ClipCache
    from rats_video.datasets.prepared.preferences import read_preferences

    command("rate", "--output", rated, "--results", "--device", "cpu")
    cache = tmp_path / "cache"
    code, _, err = command(
        "prepare", rated / "clips", "--output", cache, "--device", "cpu", "--set", f"model={tiny_wan}",
        "--set", "buckets=[{num_frames: 5, height: 32, width: 32}]", "--set", "workers=1",
    )  # fmt: skip
    assert code == 0, err
    pairs = read_preferences(rated / "preferences.jsonl", ClipCache(cache))
    # Six prompts; dark leads by two votes over each other arm, and the other two are even or one's.
    won = [pair for pair in pairs if pair.preferred.source.startswith("dark/")]
    assert len(won) == 24
    assert {pair.caption for pair in won} == set(PROMPTS)
    assert not any(pair.rejected.source.startswith("dark/") for pair in pairs)


# -------------------------------------------------------------------------------------------------------- refused


def test_what_cannot_be_compared(command: Command, tmp_path: Path) -> None:
    one, other = sampled(tmp_path / "one", PROMPTS[:2]), sampled(tmp_path / "other", PROMPTS[2:4])
    wide, broken = sampled(tmp_path / "wide", PROMPTS[:2], size=64), sampled(tmp_path / "broken", PROMPTS[:2])
    (broken / "001-clip-nfe4-seed0.mp4").unlink()
    output = tmp_path / "rating"

    def refuses(says: str, *arguments: object) -> None:
        refused(command("rate", *arguments, "--output", output, "--device", "cpu"), says)

    refuses("nothing to compare these clips with", one)
    refuses("no prompt and noise that all have a clip of: one has 2, other has 2", one, other)
    sizes = "differ in size: one 5 frames of 32 x 32 at 8 a second, wide 5 frames of 64 x 64"
    refuses(sizes, one, wide)
    refuses("001-clip-nfe4-seed0.mp4: cannot copy: No such file", one, broken)
    refuses(f"error: RUN: no such folder: {tmp_path / 'none'} (give a run", tmp_path / "none")
    refuses(f"error: RUN: one and one-2 are the same folder: {one} (name it once)", one, one)
    refuses("no rating here", "--results")
    assert not (output / "rating.json").exists()
    refused(command("rate", "--output", tmp_path / "nowhere"), "no rating here")
    assert not (tmp_path / "nowhere").exists()
    refused(command("rate"), "RUN: nothing to compare")


def test_another_comparison_in_its_place(command: Command, rated: Path, tmp_path: Path) -> None:
    before = (rated / "votes.jsonl").read_bytes()
    runs = [sampled(tmp_path / name) for name in ("x", "y")]
    outcome = command("rate", *runs, "--nfe", 8, "--output", rated)
    refused(outcome, "holds a rating of other clips: RUN, --nfe differ")
    refused(outcome, f"rats-video rate --output {rated}")
    assert (rated / "votes.jsonl").read_bytes() == before
    (rated / "votes.jsonl").write_bytes(before + b"{oops}\n")
    refused(command("rate", "--output", rated, "--results"), "votes.jsonl, line ")
    (rated / "votes.jsonl").write_bytes(before)


def test_one_server_a_rating(command: Command, rated: Path) -> None:
    with locked(rated):
        refused(command("rate", "--output", rated), "is working in it")
        assert command("rate", "--output", rated, "--results", "--device", "cpu").code == 0  # which only reads votes


def test_no_votes_yet(command: Command, tmp_path: Path) -> None:
    _, folder = rating_of(tmp_path, {"a": 0.2, "b": 0.5}, PROMPTS[:1])
    refused(command("rate", "--output", folder, "--results"), "no vote counts yet")
