"""mp4 writing and reading, and file names from prompts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rats_video.errors import UserError
from rats_video.inference.video import is_whole_png, read_mp4, slugify, write_mp4, write_png


def smooth_clip(num_frames: int = 9, height: int = 64, width: int = 96) -> Tensor:
    """A saturated colour gradient that drifts: `[T, 3, H, W]`, all frames different."""
    rows = torch.linspace(0, 1, height)[None, :, None].expand(num_frames, height, width)
    columns = torch.linspace(0, 1, width)[None, None, :].expand_as(rows)
    time = torch.linspace(0.1, 0.9, num_frames)[:, None, None].expand_as(rows)
    return torch.stack([rows, columns, time], dim=1)


def files_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize(("num_frames", "fps"), [(1, 8.0), (17, 16.0), (5, 24000 / 1001)])
def test_round_trip_keeps_count_rate_and_colours(tmp_path: Path, num_frames: int, fps: float) -> None:
    frames = smooth_clip(num_frames)
    write_mp4(frames, tmp_path / "clip.mp4", fps=fps)
    decoded, decoded_fps = read_mp4(tmp_path / "clip.mp4")
    assert decoded.shape == frames.shape
    assert decoded.dtype == torch.float32
    assert decoded_fps == pytest.approx(fps, rel=1e-6)
    # Per frame and channel: a swapped channel, a shifted matrix or a frame out of order would all be far off.
    assert (decoded - frames).abs().mean(dim=(2, 3)).max() < 0.02


@pytest.mark.parametrize(
    "color", [(0.9, 0.1, 0.1), (0.1, 0.75, 0.15), (0.15, 0.25, 0.95), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)]
)
def test_flat_colours_come_back(tmp_path: Path, color: tuple[float, float, float]) -> None:
    frames = torch.tensor(color).view(1, 3, 1, 1).expand(3, 3, 32, 32)
    write_mp4(frames, tmp_path / "flat.mp4", fps=8)
    decoded, _ = read_mp4(tmp_path / "flat.mp4")
    assert (decoded - frames).abs().max() < 0.02  # BT.601 read as BT.709 is off by up to 0.1


def test_stream_is_what_players_expect(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_mp4(smooth_clip(), path, fps=8)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt, context.profile) == ("h264", "yuv420p", "High")
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        assert float(stream.duration * stream.time_base) == pytest.approx(9 / 8)
    data = path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_same_frames_are_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rats_video.files._sync", lambda *_, **__: None)
    noise = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    frames, path = torch.nn.functional.interpolate(noise, size=(64, 64)), tmp_path / "clip.mp4"
    written = set()
    for _ in range(200):
        write_mp4(frames, path, fps=8)
        written.add(path.read_bytes())
    [data] = written
    assert b" mbtree=0 " in data  # as x264 says in the stream: with its tree, 1 to 30 of 100 files differ


def test_odd_sizes_repeat_the_edge(tmp_path: Path) -> None:
    frames = smooth_clip(3, 33, 47)
    write_mp4(frames, tmp_path / "odd.mp4", fps=8)
    decoded, _ = read_mp4(tmp_path / "odd.mp4")
    assert decoded.shape == (3, 3, 34, 48)
    assert (decoded[:, :, :33, :47] - frames).abs().mean() < 0.02
    assert (decoded[:, :, 33, :47] - frames[:, :, 32]).abs().mean() < 0.03
    assert (decoded[:, :, :33, 47] - frames[:, :, :, 46]).abs().mean() < 0.03


def test_accepts_half_precision_gradients_and_rounding_overshoot(tmp_path: Path) -> None:
    frames = (smooth_clip() * 1.005).bfloat16().requires_grad_()
    write_mp4(frames, tmp_path / "new" / "folder" / "clip.mp4", fps=8)
    assert files_in(tmp_path / "new" / "folder") == ["clip.mp4"]


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (torch.zeros(3, 64, 64), 8, "must be [T, 3, H, W]"),
        (torch.zeros(4, 64, 64, 3), 8, "must be [T, 3, H, W]"),
        (torch.zeros(0, 3, 64, 64), 8, "not empty"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), 8, "floating point"),
        (torch.full((4, 3, 8, 8), 255.0), 8, "must lie in [0, 1], got [255, 255]"),
        (torch.full((4, 3, 8, 8), -1.0), 8, "must lie in [0, 1]"),
        (torch.zeros(4, 3, 8, 8), 0, "fps must be positive"),
        (torch.zeros(4, 3, 8, 8), float("nan"), "fps must be positive"),
    ],
)
def test_refuses_what_is_no_clip(tmp_path: Path, frames: Tensor, fps: float, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        write_mp4(frames, tmp_path / "clip.mp4", fps=fps)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_refuses_a_diverged_model(tmp_path: Path, value: float) -> None:
    frames = smooth_clip()
    frames[4, 1, 2, 3] = value
    with pytest.raises(UserError, match="NaN or infinity"):
        write_mp4(frames, tmp_path / "clip.mp4", fps=8)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("failure", "raised"),
    [(OSError(28, "No space left on device"), UserError), (RuntimeError("encoder"), RuntimeError)],
)
def test_a_failure_half_way_leaves_the_old_file_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, raised: type[Exception]
) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    real = av.VideoFrame.from_ndarray
    seen: list[Any] = []

    def fail_late(image: Any, **options: Any) -> Any:
        if len(seen) == 90:  # x264 looks about 40 frames ahead before the file appears
            assert len(files_in(tmp_path)) == 2, "the partial file should be there by now"
            raise failure
        seen.append(image)
        return real(image, **options)

    class Frames:
        from_ndarray = staticmethod(fail_late)

    monkeypatch.setattr(av, "VideoFrame", Frames)
    with pytest.raises(raised, match=re.escape(failure.args[-1])):
        write_mp4(smooth_clip(100, 32, 32), path, fps=8)
    assert files_in(tmp_path) == ["clip.mp4"]
    assert path.read_bytes() == b"old"


def test_a_full_disk_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = av.open
    monkeypatch.setattr(av, "open", lambda _file, *args, **options: real("/dev/full", *args, **options))
    with pytest.raises(UserError, match="No space left"):
        write_mp4(smooth_clip(), tmp_path / "clip.mp4", fps=8)
    assert files_in(tmp_path) == []


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write the video"):
        write_mp4(smooth_clip(), tmp_path / "taken" / "clip.mp4", fps=8)


@pytest.mark.parametrize("content", [None, b"", b"this is no video at all, just text"])
def test_unreadable_files_are_user_errors(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bad.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_mp4(path)


def test_a_truncated_file_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "cut.mp4"
    write_mp4(smooth_clip(), path, fps=8)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match="video"):
        read_mp4(path)


def test_slug_known_answer() -> None:
    # The hash is sha1("A fast red circle, moving left!")[:10], computed with sha1sum.
    assert slugify("A fast red circle, moving left!") == "a-fast-red-circle-moving-left-0a7955739f"


@pytest.mark.parametrize(
    "prompt", ["../../etc/passwd", "a/b\\c:d\0e", "", "   ", "猫が走る", "café\nnoir", "x" * 5000, "\udcff"]
)
def test_slug_is_a_safe_short_name(prompt: str) -> None:
    slug = slugify(prompt)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug)
    assert 10 <= len(slug) <= 48


def test_slug_tells_prompts_apart() -> None:
    long = "a very long prompt that goes on and on and on and on and on, "
    prompts = ["a cat", "A cat", "a  cat", "a-cat", "a cät", "猫", "犬", "", " ", long + "one", long + "two"]
    assert len({slugify(prompt) for prompt in prompts}) == len(prompts)


def test_slug_length_bounds() -> None:
    assert len(slugify("a red circle", max_length=10)) == 10
    assert slugify("a red circle", max_length=16).startswith("a-red-")
    with pytest.raises(ValueError, match="at least 10"):
        slugify("a red circle", max_length=9)


def test_a_picture_round_trips_with_its_remarks(tmp_path: Path) -> None:
    frame = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    write_png(frame, tmp_path / "new" / "a.png", {"prompt": "a réd cat", "seed": "3"})
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.text == {"prompt": "a réd cat", "seed": "3"}
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    assert torch.equal(pixels, (frame * 255).round().byte())
    assert is_whole_png(tmp_path / "new" / "a.png")
    data = (tmp_path / "new" / "a.png").read_bytes()
    for damage in (data[:-30], data[:60] + bytes(8) + data[68:], b"", b"GIF89a"):
        (tmp_path / "b.png").write_bytes(damage)
        assert not is_whole_png(tmp_path / "b.png")
    assert not is_whole_png(tmp_path / "none.png")
    with pytest.raises(UserError, match="NaN or infinity"):
        write_png(torch.full_like(frame, float("nan")), tmp_path / "c.png", {})
    assert not (tmp_path / "c.png").exists()
