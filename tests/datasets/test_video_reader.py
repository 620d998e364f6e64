"""Frames of files of all kinds, by index, against a decoding of the whole file by PyAV."""

from __future__ import annotations

import sys
from pathlib import Path

import av
import numpy as np
import pytest
import zoo
from numpy.typing import NDArray

from rats_video.config.fields import MOST_PIXELS
from rats_video.datasets.video.files import Unreadable, is_upright
from rats_video.datasets.video.reader import open_video

CLOSED = {
    "h264", "h264 in mkv", "h264 yuv444", "h264 full range", "h264 gray", "hevc", "odd", "portrait", "turned 90",
    "turned 180", "turned 270", "audio", "one frame", "wrong extension",
}  # fmt: skip


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("zoo")
    return {name: zoo.make(name, folder) for name in zoo.CLIPS}


def decoded(path: Path) -> tuple[NDArray[np.uint8], list[float]]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    images = [np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90) for frame in frames]
    return np.stack(images), [float((f.pts - frames[0].pts) * f.time_base) for f in frames]


@pytest.mark.parametrize("name", zoo.CLIPS)
@pytest.mark.parametrize("without_decord", [False, True])
def test_any_frame_in_any_order_is_the_whole_decodings(
    clips: dict[str, Path], name: str, *, without_decord: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if without_decord:
        monkeypatch.setitem(sys.modules, "decord", None)
    truth, times = decoded(clips[name])
    with open_video(clips[name]) as video:
        assert video.reader == ("decord" if name in CLOSED and not without_decord else "pyav")
        assert (video.num_frames, video.height, video.width) == truth.shape[:3]
        np.testing.assert_allclose(video.timestamps, times, atol=1e-6)
        for seed in range(4):
            indices = np.random.default_rng(seed).integers(0, video.num_frames, 6).tolist()
            np.testing.assert_array_equal(video.frames(indices), truth[indices])
        np.testing.assert_array_equal(video.frames(range(video.num_frames)), truth)


@pytest.mark.parametrize(
    "name", ["h264", "h264 open", "hevc 10 bit", "vp8", "vp9", "av1", "transport stream", "trimmed"]
)
def test_frames_carry_the_numbers_they_were_written_with(clips: dict[str, Path], name: str) -> None:
    with open_video(clips[name]) as video:
        first = zoo.FRAMES - video.num_frames
        assert first == (11 if name == "trimmed" else 0)
        for at in (video.num_frames - 1, 3, 12, 0):
            assert zoo.number_of(video.frames([at])[0]) == first + at


def test_a_turned_clip_is_shown_upright(clips: dict[str, Path]) -> None:
    with open_video(clips["turned 90"]) as video:
        assert (video.height, video.width) == (zoo.SIZE[1], zoo.SIZE[0])
        assert zoo.number_of(np.rot90(video.frames([21])[0], -1)) == 21


def test_times_of_a_variable_rate(clips: dict[str, Path]) -> None:
    with open_video(clips["variable rate"]) as video:
        expected = [(at + at * at // 9) / 10 for at in range(zoo.FRAMES)]
        np.testing.assert_allclose(video.timestamps, expected, atol=1e-6)
        assert video.fps == pytest.approx((zoo.FRAMES - 1) / expected[-1])


def test_wrong_indices_are_refused(clips: dict[str, Path]) -> None:
    with open_video(clips["h264"]) as video:
        assert video.frames([]).shape == (0, *zoo.SIZE, 3)
        for wrong in ([-1], [zoo.FRAMES]):
            with pytest.raises(IndexError):
                video.frames(wrong)
        with pytest.raises(ValueError, match="pixels"):
            video.frames([0] * (MOST_PIXELS // (zoo.SIZE[0] * zoo.SIZE[1]) + 1))


def test_a_clip_whose_frames_change_size_is_refused(tmp_path: Path, clips: dict[str, Path]) -> None:
    other = zoo.write_clip(tmp_path / "other.ts", size=(96, 128))
    path = tmp_path / "joined.ts"
    path.write_bytes(clips["transport stream"].read_bytes() + other.read_bytes())
    with pytest.raises(Unreadable, match=r"change size|run backwards"), open_video(path):
        pass


def test_files_that_give_no_frames_say_why(tmp_path: Path) -> None:
    for name, (path, reason) in zoo.misfits(tmp_path).items():
        with pytest.raises(Unreadable) as caught, open_video(path):
            pass
        assert caught.value.reason == reason, (name, caught.value)


@pytest.mark.parametrize("part", range(1, 8))
def test_a_file_that_is_cut_off_is_never_short(clips: dict[str, Path], tmp_path: Path, part: int) -> None:
    for name in ("h264", "h264 in mkv", "vp9", "mpeg4 in avi", "h264 fragmented"):
        data = clips[name].read_bytes()
        path = tmp_path / clips[name].name
        path.write_bytes(data[: len(data) * part // 8])
        with pytest.raises(Unreadable, match=r"ends early|cannot be opened"), open_video(path):
            pass


def test_a_container_tells_whether_its_tracks_are_turned(clips: dict[str, Path]) -> None:
    """Only then a frame must be decoded to know: any other is as large as it says, which opening it has told."""
    upright = {name: is_upright(clips[name]) for name in ("h264", "hevc", "audio", "odd", "one frame")}
    turned = {name: is_upright(clips[name]) for name in ("turned 90", "turned 180", "turned 270")}
    assert set(upright.values()) == {True}
    assert set(turned.values()) == {False}
    assert not is_upright(clips["h264 in mkv"])  # it says so elsewhere, or nowhere


@pytest.mark.parametrize("box", [b"tkhd", b"mvhd"])
def test_a_damaged_matrix_is_no_upright_one(clips: dict[str, Path], tmp_path: Path, box: bytes) -> None:
    data = bytearray(clips["h264"].read_bytes())
    data[data.index(box) + 4 + {b"mvhd": 36, b"tkhd": 40}[box]] ^= 1
    (tmp_path / "a.mp4").write_bytes(data)
    assert is_upright(clips["h264"])
    assert not is_upright(tmp_path / "a.mp4")
