"""The demo page of clips with sound, in a real browser."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import expect
from sounds import heard, tone, until_heard

from rats_video.inference.demo import DemoClip, DemoModels, DemoRequest, Role
from rats_video.inference.demo_page import build_page, launch_page
from rats_video.inference.sampler import SamplerSpec
from rats_video.inference.video import write_mp4
from rats_video.seeds import seeded
from rats_video.types import ClipSpec

HZ = {"student": 2000.0, "teacher": 500.0}
VIDEOS = {role: f"#{role}-card video" for role in HZ}


@dataclass(frozen=True)
class Sounding(DemoModels):
    """A studio whose clips are a tone a role."""

    folder: Path = Path()

    takes_pictures = False

    def accept(self, prompt: object, nfe: object, seed: object, picture: object = None) -> DemoRequest:  # noqa: ARG002
        return DemoRequest(str(prompt), 4, 0)

    def make(self, role: Role, wish: DemoRequest, advance: Callable[[], None]) -> DemoClip:  # noqa: ARG002
        path = self.folder / f"{role}.mp4"
        write_mp4(torch.rand(16, 3, 32, 32, generator=seeded(1)), path, fps=8.0, sound=tone(HZ[role], 2.0))
        return DemoClip(role, path.read_bytes(), 4, 4, 0.1, None, has_sound=True)


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    nobody: Any = None
    clip, spec = ClipSpec(16, 32, 32, 8.0), SamplerSpec(3, 3.0, 2.0)
    studio = Sounding(nobody, nobody, clip, 3.0, (4,), spec, None, folder=tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    page = build_page(studio, ("a red circle",), name="mine", teacher=True)
    launch_page(page, port, takes_pictures=False)
    yield f"http://127.0.0.1:{port}"
    page.close(verbose=False)


def test_muted_at_first_and_one_is_heard_at_a_time(watched: Callable[..., Any], url: str) -> None:
    with watched(url, "data:", "blob:") as page:
        page.get_by_role("button", name="Generate").click()
        for video in VIDEOS.values():
            expect(page.locator(video)).to_be_visible(timeout=60_000)
        expect(page.get_by_text("Muted at first")).to_have_count(2)
        assert heard(page, *VIDEOS.values()) == dict.fromkeys(VIDEOS.values(), 0)
        for role, hz in HZ.items():
            page.locator(VIDEOS[role]).evaluate("video => { video.muted = false; }")  # as its controls do
            until_heard(page, {video: hz if other == role else 0 for other, video in VIDEOS.items()})
