"""The report of clips with sound, in a real browser: silent at first, one clip is heard at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sounds import heard, tone, until_heard

from rats_video.inference.panel import Panel, with_tracks
from rats_video.inference.side_by_side import compose_comparison, panel_boxes
from rats_video.inference.video import write_mp4
from rats_video.seeds import seeded

HZ = {"teacher": 500.0, "base": 1000.0, "student": 2000.0}
VIDEOS = {name: f"figure:nth-child({place}) video" for place, name in enumerate(HZ, 1)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with one comparison, each arm of a tone of its own."""
    (tmp_path / "run" / "comparison").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    frames = torch.rand(16, 3, 16, 16, generator=seeded(1))
    panels, sounds = with_tracks([Panel(name, frames, 4, 4, 1.0, None, tone(hz, 2.0)) for name, hz in HZ.items()])
    write_mp4(
        compose_comparison(panels, prompt="bells"), tmp_path / "run" / "comparison" / "a.mp4", fps=8.0, sound=sounds
    )
    shown = [
        {"title": panel.title, "num_steps": 4, "nfe": 4, "box": box, "track": panel.track}
        for panel, box in zip(panels, panel_boxes(panels), strict=True)
    ]
    row = {"file": "a.mp4", "prompt": "bells", "seed": 0, "reward": dict.fromkeys(HZ, 0.5), "panels": shown}
    (tmp_path / "run" / "comparison" / "index.json").write_text(json.dumps([row]))
    return tmp_path / "run"


def test_one_clip_is_heard_at_a_time(
    command: Callable[..., Any], watched: Callable[..., Any], run: Path, tmp_path: Path
) -> None:
    assert command("report", run, "--output", tmp_path / "report.html").code == 0
    with watched((tmp_path / "report.html").as_uri(), "data:") as page:
        page.keyboard.press("Space")
        page.wait_for_timeout(300)
        assert heard(page, *VIDEOS.values()) == dict.fromkeys(VIDEOS.values(), 0)  # muted, though it plays
        for name, hz in HZ.items():
            page.get_by_role("button", name=f"Sound of {name}").click()
            until_heard(page, {video: hz if other == name else 0 for other, video in VIDEOS.items()})
        page.get_by_role("button", name="Sound of student").click()
        until_heard(page, dict.fromkeys(VIDEOS.values(), 0))


def test_a_silent_clip_has_no_switch_and_a_lost_track_is_said(
    command: Callable[..., Any], run: Path, tmp_path: Path
) -> None:
    index = run / "comparison" / "index.json"
    (row,) = json.loads(index.read_text())
    del row["panels"][0]["track"]
    index.write_text(json.dumps([row]))
    done = command("report", run, "--output", tmp_path / "report.html")
    assert (done.code, (tmp_path / "report.html").read_text().count('class="sound"')) == (0, 2)
    row["panels"][0]["track"] = 0
    index.write_text(json.dumps([row]))
    done = command("report", run, "--output", tmp_path / "report.html")
    assert "the comparison clips cannot be read" in done.err
