"""The page of clips while training: what strangers wrote stays text."""

from __future__ import annotations

from pathlib import Path

from rats_video.training.validation_page import write_page


def test_prompts_are_escaped(tmp_path: Path) -> None:
    clip = {"prompt": "<script>alert(1)</script>", "file": "a.mp4", "scores": {"reward": 0.5}}
    write_page(tmp_path / "index.html", [{"step": 1, "clips": [clip]}])
    page = (tmp_path / "index.html").read_text()
    assert page.count("<script>") == 1  # its own
    assert "&lt;script&gt;alert(1)" in page
