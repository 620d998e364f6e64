"""`sample` of clips of one frame: pictures that say how they were made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flux_family import FLUX
from PIL import Image
from shared import made_once

from rats_video.backbones.kinds import load_backbone

pytestmark = pytest.mark.pipeline

PROMPT = "a fast réd circle \N{RIGHTWARDS ARROW}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, FLUX.name, FLUX.build)


def test_an_image_is_a_png_that_says_how_it_was_made(command: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    size = ("--height", 32, "--width", 48, "--nfe", 2, "--seed", 7, "--output", tmp_path)
    code, out, _ = command("sample", "--model", model, "--prompt", PROMPT, *size)
    assert code == 0
    assert out.startswith("1 clip at 2 NFE")
    (row,) = json.loads((tmp_path / "manifest.json").read_text())
    path = tmp_path / row["file"]
    assert path.suffix == ".png"
    with Image.open(path) as image:
        assert image.size == (48, 32)
        assert image.text["prompt"] == PROMPT
        assert (image.text["seed"], image.text["guidance_scale"]) == ("7", "1")
        assert image.text["model"] == f"{FLUX.name} ({row['student']})"
        first, half, last = map(float, image.text["sigmas"].split(", "))
    assert (first, last) == (1, 0)
    assert half == pytest.approx(float(load_backbone(model, with_text=False).sigmas(2, 1.5815)[1]), abs=1e-3)

    made = path.stat().st_mtime_ns
    command("sample", "--model", model, "--prompt", PROMPT, *size)
    assert path.stat().st_mtime_ns == made  # kept
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    command("sample", "--model", model, "--prompt", PROMPT, *size)
    assert path.read_bytes() == whole  # made anew, from the same noise


def test_what_an_image_model_cannot_do_is_one_line(command: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    base = ("sample", "--model", model, "--prompt", "a", "--height", 32, "--width", 48, "--output", tmp_path)
    for options, line in (
        (("--num-frames", 5), "error: --num-frames: FLUX makes images, which have one frame, got 5 (take 1)"),
        (("--image", "x.png"), "error: --image: this FLUX makes images from text alone (leave the picture out)"),
    ):
        code, _, err = command(*base, *options)
        assert (code, err.strip().splitlines()[-1]) == (2, line)
