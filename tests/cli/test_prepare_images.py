"""`prepare` on images, alone and among videos: clips of one frame, that training takes in turns with the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from films import Inline, film
from PIL import Image

from rats_video.backbones.wan import WanBackbone
from rats_video.datasets.prepared.cache import ClipCache
from rats_video.datasets.prepared.loader import ClipLoader

Command = Callable[..., Any]
PIXELS = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two films, a picture, and a film's poster."""
    folder = tmp_path / "source"
    for number in range(2):
        film(folder / f"{number}.mp4", number, frames=20)
        (folder / f"{number}.txt").write_text(f"film {number}")
    Image.fromarray(PIXELS).save(folder / "picture.PNG")
    (folder / "picture.PNG.txt").write_text("a picture")
    Image.fromarray(PIXELS).save(folder / "0.png")
    return folder


@pytest.fixture
def prepare(command: Command, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setattr("rats_video.commands.prepare_sources.IsolatedPool", Inline)
    settings = {"heldout": 0, "dtype": "float32", "cut.max_clips": 1}

    def call(model: object, **bucket: int) -> Any:
        given = settings | {"model": model, "buckets": json.dumps([bucket])}
        options = [option for key, value in given.items() for option in ("--set", f"{key}={value}")]
        return command("prepare", source, "--output", tmp_path / "cache", "--device", "cpu", *options)

    return call


def test_images_among_videos(prepare: Command, tiny_wan: Path, tmp_path: Path, loaded: WanBackbone) -> None:
    code, out, err = prepare(tiny_wan, num_frames=5, height=32, width=32)
    assert code == 0, err
    assert out.splitlines()[1:4] == [
        "  2 of 5x32x32", "  1 of 1x32x32", "  skipped 1: an image of the name of a video beside it (0.png)",
    ]  # fmt: skip
    cache = ClipCache(tmp_path / "cache")
    [picture] = [record for record in cache.records if record.num_frames == 1]
    assert (picture.source, picture.caption, picture.size) == ("picture.PNG", "a picture", (1, 32, 32))
    latents, _ = cache.read([picture])
    pixels = torch.from_numpy(PIXELS).permute(2, 0, 1)[None, None].float() / 255
    assert torch.allclose(latents, loaded.encode(pixels), atol=1e-5)
    loader = ClipLoader(cache, batch_size=1, seed=0)
    assert sorted(loader.batch(step).latents.shape[2] for step in range(6)) == [1, 1, 2, 2, 2, 2]


def test_model_without_clips_of_one_frame_takes_the_videos_alone(
    prepare: Command, tiny_wan: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_wan, tmp_path / "model")
    config = json.loads((model / "transformer" / "config.json").read_text())
    (model / "transformer" / "config.json").write_text(json.dumps(config | {"patch_size": [2, 2, 2]}))
    code, out, err = prepare(model, num_frames=5, height=32, width=32)
    assert code == 0, err
    assert out.splitlines()[1:4] == [
        "  2 of 5x32x32", "  skipped 1: an image of the name of a video beside it (0.png)",
        "  skipped 1: an image, and this model takes no clip of one frame (picture.PNG)",
    ]  # fmt: skip
    assert [record.size for record in ClipCache(tmp_path / "cache").records] == [(5, 32, 32)] * 2
