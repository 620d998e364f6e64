"""Images as clips of one frame: what is read, how it is fitted, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rats_video.datasets.video.clips import plan_source, read_source
from rats_video.datasets.video.images import open_image
from rats_video.datasets.video.records import SourceVideo
from rats_video.datasets.video.settings import PrepareConfig

PIXELS = np.random.default_rng(1).integers(0, 256, (32, 48, 3), np.uint8)


def config(*sizes: tuple[int, int, int], **others: Any) -> PrepareConfig:
    buckets = [dict(zip(("num_frames", "height", "width"), size, strict=True)) for size in sizes]
    return PrepareConfig.model_validate({"model": "none", "buckets": buckets, **others})


def source(path: Path) -> SourceVideo:
    return SourceVideo(path.name, path, "one", kind="image")


def test_pixels_are_the_files(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    read = read_source(source(tmp_path / "a.png"), config((17, 32, 48), fps=8))
    [clip] = read.clips
    assert torch.equal(clip.frames, torch.from_numpy(PIXELS).permute(2, 0, 1)[None])
    assert (clip.start, clip.end, clip.repeated, read.skipped, len(read.digest)) == (0.0, 1 / 8, 0, (), 64)


@pytest.mark.parametrize(
    ("buckets", "chosen"),
    [
        ([(17, 32, 48), (49, 64, 96), (49, 64, 32)], (1, 32, 48)),  # of the aspect, not enlarged
        ([(17, 32, 48), (1, 64, 96), (1, 64, 32)], (1, 64, 96)),  # where images have buckets of their own
        ([(17, 64, 96)], (1, 64, 96)),
    ],
)
def test_bucket(tmp_path: Path, buckets: list[tuple[int, int, int]], chosen: tuple[int, int, int]) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    [span] = plan_source(source(tmp_path / "a.png"), config(*buckets)).spans
    assert (span.bucket.num_frames, span.bucket.height, span.bucket.width) == chosen


def test_orientation_alpha_palette_and_gray(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # shown after a quarter turn clockwise
    image = Image.fromarray(PIXELS)
    image.save(tmp_path / "turned.png", exif=turned)
    image.convert("RGBA").save(tmp_path / "alpha.webp", lossless=True)
    image.quantize(4).save(tmp_path / "palette.png")
    image.convert("L").save(tmp_path / "gray.bmp")
    image.convert("CMYK").save(tmp_path / "print.tif")
    Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    half = np.full((*PIXELS.shape[:2], 1), 51, np.uint8)  # a fifth of the picture, the rest white
    Image.fromarray(np.concatenate([PIXELS, half], axis=2)).save(tmp_path / "glass.png")
    expected = {
        "turned.png": np.rot90(PIXELS, -1), "alpha.webp": PIXELS,
        "palette.png": np.array(image.quantize(4).convert("RGB")),
        "gray.bmp": np.repeat(np.array(image.convert("L"))[..., None], 3, axis=2),
        "print.tif": PIXELS, "deep.png": np.repeat(PIXELS[..., :1], 3, axis=2),
        "glass.png": np.round(PIXELS * 0.2 + 255 * 0.8),
    }  # fmt: skip
    for name, pixels in expected.items():
        with open_image(tmp_path / name) as picture:
            apart = np.abs(picture.frames([0])[0].astype(int) - pixels)
            assert apart.max() <= (1 if name == "glass.png" else 0), name


def test_no_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.fromarray(PIXELS), Image.fromarray(PIXELS[::-1])]
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    frames[0].save(tmp_path / "program.eps")
    (tmp_path / "program.eps").rename(tmp_path / "program.jpg")
    Image.fromarray(PIXELS[..., 0].astype(np.float32)).save(tmp_path / "float.tif")
    Image.new("RGB", (48, 32), "red").save(tmp_path / "plain.png")
    reasons = {
        "moving.png": "is a moving picture: make a video of it", "cut.png": "damaged", "program.jpg": "damaged",
        "float.tif": "holds no pixels of eight or sixteen bits", "plain.png": "one plain colour",
        "gone.png": "cannot be read",
    }  # fmt: skip
    for name, reason in reasons.items():
        read = read_source(source(tmp_path / name), config((17, 32, 48)))
        assert (read.clips, [each.reason for each in read.skipped]) == ((), [reason]), name
    monkeypatch.setattr("rats_video.datasets.video.images.MOST_FRAME_PIXELS", 32 * 48 - 1)
    [large] = read_source(source(tmp_path / "float.tif"), config((17, 32, 48))).skipped
    assert (large.reason, large.detail) == ("its frames are too large", "48 x 32")
