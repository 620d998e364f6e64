"""The page of clips while training: what strangers wrote stays text."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from sounds import heard, tone, until_heard

from rats_video.inference.video import write_mp4
from rats_video.seeds import seeded
from rats_video.training.validation_page import write_page


def test_prompts_are_escaped(tmp_path: Path) -> None:
    clip = {"prompt": "<script>alert(1)</script>", "file": "a.mp4", "scores": {"reward": 0.5}}
    write_page(tmp_path / "index.html", [{"step": 1, "clips": [clip]}])
    page = (tmp_path / "index.html").read_text()
    assert page.count("<script>") == 1  # its own
    assert "&lt;script&gt;alert(1)" in page


def served(server: ThreadingHTTPServer) -> str:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/"


def test_a_click_lets_one_clip_be_heard(tmp_path: Path, watched: Callable[..., Any]) -> None:
    rows = []
    for step, hz in ((1, 500.0), (2, 2000.0)):
        frames = torch.rand(16, 3, 32, 32, generator=seeded(1))
        write_mp4(frames, tmp_path / f"{step}.mp4", fps=8.0, sound=tone(hz, 2.0))
        rows.append({"step": step, "clips": [{"prompt": "bells", "file": f"{step}.mp4", "scores": {}, "sound": True}]})
    write_page(tmp_path / "index.html", rows)
    one, two = "td:nth-child(2) video", "td:nth-child(3) video"
    # Over HTTP: what a page of a file plays, no script may listen to.
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)) as server,
        watched(served(server)) as page,
    ):
        page.locator(one).hover()
        assert heard(page, one, two) == {one: 0, two: 0}
        page.locator(one).click()
        until_heard(page, {one: 500.0, two: 0})
        page.locator(two).click()
        until_heard(page, {one: 0, two: 2000.0})
        page.locator(two).click()
        until_heard(page, {one: 0, two: 0})
        server.shutdown()
