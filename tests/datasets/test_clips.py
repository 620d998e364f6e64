"""Spans of scenes, frames of a bucket's size, and clips of real files."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rats_video.datasets.video.clips import fit_frames, pieces, plan_source, read_piece, read_source, read_spans
from rats_video.datasets.video.records import SourceVideo
from rats_video.datasets.video.settings import BucketConfig, PrepareConfig
from rats_video.datasets.video.spans import plan_spans, suitable_buckets


def config(*buckets: tuple[int, int, int], cut: dict[str, Any] | None = None, **others: Any) -> PrepareConfig:
    sizes = [{"num_frames": frames, "height": height, "width": width} for frames, height, width in buckets]
    return PrepareConfig.model_validate({"model": "none", "buckets": sizes, "cut": cut or {}, **others})


def planned(
    fps: float, count: int, cfg: PrepareConfig, scenes: Sequence[range] | None = None
) -> list[tuple[int, int, int]]:
    """Bucket's length, first and last frame of each span."""
    spans, _ = plan_spans(np.arange(count) / fps, scenes or [range(count)], suitable_buckets((64, 64), cfg), cfg)
    return [(span.bucket.num_frames, span.indices[0], span.indices[-1]) for span in spans]


def test_frames_are_the_nearest() -> None:
    cfg = config((5, 64, 64), fps=8)
    [span], short = plan_spans(np.arange(13) / 24, [range(13)], cfg.buckets, cfg)
    assert span.indices == (0, 3, 6, 9, 12)
    assert (span.start, span.end, span.scene, short) == (0.0, 13 / 24, 0, [])


def test_one_frame_less_is_too_short() -> None:
    cfg = config((5, 64, 64), fps=8)
    assert plan_spans(np.arange(12) / 24, [range(12)], cfg.buckets, cfg) == (
        [], ["0.00 to 0.50 s gives 4 frames at 8 a second; the shortest bucket takes 5"],
    )  # fmt: skip


def test_slow_source_repeats_frames() -> None:
    cfg = config((9, 64, 64), fps=8)
    [span], _ = plan_spans(np.arange(7) / 6, [range(7)], cfg.buckets, cfg)
    assert span.indices == (0, 1, 1, 2, 3, 4, 4, 5, 6)
    assert span.repeated == 2


def test_one_after_the_other_takes_the_longest_that_fits() -> None:
    assert planned(8, 30, config((5, 64, 64), (17, 64, 64), fps=8)) == [(17, 0, 16), (5, 17, 21), (5, 22, 26)]


def test_first_middle_and_most() -> None:
    scenes = [range(20), range(20, 40)]
    bucket = (5, 64, 64)
    assert planned(8, 40, config(bucket, fps=8, cut={"spans": "first"}), scenes) == [(5, 0, 4), (5, 20, 24)]
    assert planned(8, 40, config(bucket, fps=8, cut={"spans": "middle"}), scenes) == [(5, 7, 11), (5, 27, 31)]
    assert planned(8, 40, config(bucket, fps=8, cut={"max_clips": 5}), scenes)[-1] == (5, 20, 24)


def test_margin_lies_at_cuts_only() -> None:
    cfg = config((1, 64, 64), fps=8, cut={"margin_seconds": 0.25})
    assert planned(8, 12, cfg, [range(6), range(6, 12)]) == [(1, i, i) for i in (0, 1, 2, 3, 8, 9, 10, 11)]


BUCKETS = [(17, 480, 832), (17, 720, 1280), (33, 480, 832), (17, 832, 480), (1, 512, 512)]


@pytest.mark.parametrize(
    ("size", "best"),
    [
        ((480, 854), (33, 480, 832)),  # the longest, and 854 x 480 is no other aspect
        ((1920, 1080), (17, 832, 480)),
        ((500, 500), (1, 512, 512)),
    ],
)
def test_bucket_of_the_nearest_aspect(size: tuple[int, int], best: tuple[int, int, int]) -> None:
    assert suitable_buckets(size, config(*BUCKETS))[0] == BucketConfig.model_validate(
        dict(zip(("num_frames", "height", "width"), best, strict=True))
    )


def test_upscaling_is_the_last_choice() -> None:
    cfg = config((17, 720, 1280), (17, 480, 832), (17, 240, 416))
    assert [bucket.height for bucket in suitable_buckets((500, 900), cfg)] == [480, 240, 720]
    none = config((17, 720, 1280), (17, 480, 832), cut={"allow_upscale": False})
    assert [bucket.height for bucket in suitable_buckets((500, 900), none)] == [480]
    assert suitable_buckets((100, 180), none) == []


@settings(max_examples=150, deadline=None)
@given(
    gaps=st.lists(st.floats(0.01, 0.12), min_size=1, max_size=120),
    cuts=st.sets(st.integers(1, 119), max_size=4),
    lengths=st.sets(st.sampled_from([1, 5, 9, 17]), min_size=1),
    fps=st.sampled_from([6.0, 8.0, 16.0, 30.0]),
    kind=st.sampled_from(["first", "middle", "all"]),
    margin=st.sampled_from([0.0, 0.1]),
)
def test_spans_keep_their_promises(
    gaps: list[float], cuts: set[int], lengths: set[int], fps: float, kind: str, margin: float
) -> None:
    times = np.concatenate([[0.0], np.cumsum(gaps)])
    edges = [0, *sorted(cut for cut in cuts if cut < len(times)), len(times)]
    scenes = [range(a, b) for a, b in itertools.pairwise(edges)]
    sizes = [(length, 64, 64) for length in lengths]
    cfg = config(*sizes, fps=fps, cut={"spans": kind, "margin_seconds": margin})
    spans, short = plan_spans(times, scenes, suitable_buckets((64, 64), cfg), cfg)
    used: set[int] = set()
    for span in spans:
        scene = scenes[span.scene]
        assert len(span.indices) == span.bucket.num_frames
        assert scene.start <= span.indices[0]
        assert span.indices[-1] < scene.stop
        assert list(span.indices) == sorted(span.indices)
        if scene is not scenes[0]:
            assert times[span.indices[0]] >= times[scene.start] + margin - 1e-5
        if scene is not scenes[-1]:
            assert times[span.indices[-1]] < times[scene.stop] - margin + 1e-5
        assert not used & set(span.indices)
        used |= set(span.indices)
        wanted = times[span.indices[0]] + np.arange(len(span.indices)) / fps
        off = np.abs(times[list(span.indices)] - wanted).max()
        assert off <= max(np.diff(times)) / 2 + 1e-5
    assert len({span.scene for span in spans}) + len(short) == len(scenes)
    assert kind == "all" or len(spans) + len(short) == len(scenes)


def test_fit_of_the_same_size_changes_nothing() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 6, 10, 3), np.uint8)
    for fit in ("crop", "pad", "stretch"):
        fitted = fit_frames(frames, BucketConfig(num_frames=1, height=6, width=10), fit)
        assert torch.equal(fitted, torch.from_numpy(frames).movedim(-1, 1))


def columns(width: int, height: int = 8) -> np.ndarray[Any, Any]:
    """A frame whose columns say which they are."""
    return np.broadcast_to(np.arange(width, dtype=np.uint8)[None, None, :, None] * 10, (1, height, width, 3))


def test_crop_takes_the_middle() -> None:
    fitted = fit_frames(columns(16), BucketConfig(num_frames=1, height=8, width=8), "crop")
    assert fitted[0, 0, 0].tolist() == [10 * i for i in range(4, 12)]
    odd = fit_frames(columns(11), BucketConfig(num_frames=1, height=8, width=8), "crop")
    assert odd[0, 0, 0].tolist() == [10 * i for i in range(1, 9)]


def test_pad_adds_black_bars() -> None:
    bucket = BucketConfig(num_frames=1, height=8, width=8)
    fitted = fit_frames(np.full((1, 16, 8, 3), 200, np.uint8), bucket, "pad")  # portrait
    assert fitted[0, 0, 3].tolist() == [0, 0, 200, 200, 200, 200, 0, 0]
    assert fitted[0, :, :, 2:6].unique().tolist() == [200]


def test_stretch_uses_the_whole() -> None:
    halves = np.zeros((1, 8, 16, 3), np.uint8)
    halves[:, :, 8:] = 255
    fitted = fit_frames(halves, BucketConfig(num_frames=1, height=8, width=4), "stretch")
    assert fitted[0, 0, 0, 0] < 12
    assert fitted[0, 0, 0, -1] > 243
    assert fitted.float().mean().item() == pytest.approx(127.5, abs=1)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(1, 1), (7, 300), (301, 5), (33, 47)])
def test_odd_sizes(size: tuple[int, int], fit: Any) -> None:
    fitted = fit_frames(np.full((3, *size, 3), 90, np.uint8), BucketConfig(num_frames=1, height=18, width=34), fit)
    assert fitted.shape == (3, 3, 18, 34)
    assert set(fitted.unique().tolist()) <= {0, 90}
    assert (fit == "pad") or (fitted == 90).all()


def video_file(path: Path, colors: Sequence[tuple[int, int, int]], size: tuple[int, int] = (64, 96)) -> Path:
    """A frame a colour at 24 frames a second, with a gray square that moves; None of it where the colour is black."""
    import av

    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "5", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for number, color in enumerate(colors):
            picture = np.full((*size, 3), color, np.uint8)
            if any(color):
                picture[8:24, 2 * number % 80 : 2 * number % 80 + 16] = 128
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


RED, BLUE, BLACK = (230, 20, 20), (20, 20, 230), (0, 0, 0)
CFG = config((5, 32, 48), fps=8)


def test_clips_of_a_file_with_a_cut(tmp_path: Path) -> None:
    path = video_file(tmp_path / "a.mp4", [RED] * 20 + [BLUE] * 20)
    read = read_source(SourceVideo("a.mp4", path, "two"), CFG)
    assert read.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [(clip.scene, clip.frames.shape, clip.frames.dtype) for clip in read.clips] == [
        (0, (5, 3, 32, 48), torch.uint8), (1, (5, 3, 32, 48), torch.uint8),
    ]  # fmt: skip
    corners = [clip.frames[:, :, -1, -1].float().mean(0) for clip in read.clips]
    assert torch.allclose(corners[0], torch.tensor(RED, dtype=torch.float), atol=8)
    assert torch.allclose(corners[1], torch.tensor(BLUE, dtype=torch.float), atol=8)
    assert (read.clips[1].start, read.skipped) == (pytest.approx(20 / 24), ())


def test_span_of_a_table_is_kept_to(tmp_path: Path) -> None:
    path = video_file(tmp_path / "a.mp4", [RED] * 60)
    [clip] = read_source(SourceVideo("a.mp4", path, "red", start=1.0, end=1.7), CFG).clips
    assert (clip.start, clip.end) == (pytest.approx(1.0), pytest.approx(37 / 24))


def test_spans_read_alone_are_those_read_together(tmp_path: Path) -> None:
    source = SourceVideo("a.mp4", video_file(tmp_path / "a.mp4", [RED] * 50), "red")
    plan, together = plan_source(source, CFG), read_source(source, CFG).clips
    alone = [read_spans(source, [span], CFG)[0][0] for span in plan.spans]
    assert len(together) == 3
    assert all(torch.equal(one.frames, other.frames) for one, other in zip(alone, together, strict=True))


def test_member_of_an_archive_is_read_by_offset(tmp_path: Path) -> None:
    data = video_file(tmp_path / "a.mp4", [RED] * 20).read_bytes()
    (tmp_path / "a.tar").write_bytes(b"x" * 100 + data + b"y" * 100)
    member = SourceVideo("a.tar/a.mp4", tmp_path / "a.tar", "red", member=(100, len(data)))
    whole = read_source(SourceVideo("a.mp4", tmp_path / "a.mp4", "red"), CFG)
    read = read_source(member, CFG)
    assert read.digest == whole.digest
    assert torch.equal(read.clips[0].frames, whole.clips[0].frames)


@pytest.mark.parametrize(
    ("colors", "source", "cut", "reason", "detail"),
    [
        (
            [RED] * 6,
            {},
            {},
            "too short for any bucket",
            "0.00 to 0.25 s gives 2 frames at 8 a second; the shortest bucket takes 5",
        ),
        ([BLACK] * 20, {}, {}, "one plain colour", "0.00 to 0.54 s"),
        (
            [RED] * 20,
            {"start": 9.0},
            {},
            "no frame between start and end",
            "start is 9.00 s, and the last one is at 0.79 s",
        ),
        ([RED] * 20, {}, {"min_side": 65}, "smaller than cut.min_side", "96 x 64; cut.min_side is 65"),
    ],
)
def test_reasons(
    tmp_path: Path,
    colors: list[tuple[int, int, int]],
    source: dict[str, Any],
    cut: dict[str, Any],
    reason: str,
    detail: str,
) -> None:
    path = video_file(tmp_path / "a.mp4", colors)
    read = read_source(SourceVideo("a.mp4", path, "", **source), config((5, 32, 48), fps=8, cut=cut))
    assert (read.clips, [(each.reason, each.detail) for each in read.skipped]) == ((), [(reason, detail)])


def test_smaller_than_its_bucket(tmp_path: Path) -> None:
    path = video_file(tmp_path / "a.mp4", [RED] * 20)
    read = read_source(SourceVideo("a.mp4", path), config((5, 96, 144), fps=8, cut={"allow_upscale": False}))
    assert [(each.reason, each.detail) for each in read.skipped] == [
        ("smaller than its bucket", "96 x 64; its bucket is 144 x 96")
    ]


def test_mostly_repeated_frames_are_no_clip(tmp_path: Path) -> None:
    path = video_file(tmp_path / "a.mp4", [RED] * 20)
    read = read_source(SourceVideo("a.mp4", path), config((17, 32, 48), fps=60, cut={"spans": "first"}))
    assert [(each.reason, each.detail) for each in read.skipped] == [
        ("most frames would be repeated: shows too few a second", "10 of 17 frames at 60 a second, 0.00 to 0.29 s")
    ]


def test_file_that_is_gone_and_one_that_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "b.mp4").write_text("no video")
    gone, text = (read_source(SourceVideo(name, tmp_path / name), CFG) for name in ("a.mp4", "b.mp4"))
    assert (gone.digest, [each.reason for each in gone.skipped]) == ("", ["cannot be read"])
    assert (text.clips, len(text.skipped), len(text.digest)) == ((), 1, 64)


def test_a_film_is_read_piece_by_piece(tmp_path: Path) -> None:
    source = SourceVideo("a.mp4", video_file(tmp_path / "a.mp4", [RED] * 90), "red")
    plan, together = plan_source(source, CFG), read_source(source, CFG)
    assert len(plan.spans) > 2
    clip = 3 * math.prod((CFG.buckets[0].num_frames, CFG.buckets[0].height, CFG.buckets[0].width))
    for most, clips in ((1, 1), (2 * clip, 2), (3 * clip - 1, 2), (100 * clip, len(plan.spans))):
        parts = list(pieces(source, plan, most))
        assert [len(part.plan.spans) for part in parts[:-1]] == [clips] * ((len(plan.spans) - 1) // clips)
        assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
        read = [read_piece(part, CFG) for part in parts]
        apart = [clip for part in read for clip in part.clips]
        assert [clip.start for clip in apart] == [clip.start for clip in together.clips]
        assert all(torch.equal(one.frames, other.frames) for one, other in zip(apart, together.clips, strict=True))
        assert tuple(each for part in read for each in part.skipped) == together.skipped
        assert {part.digest for part in read} == {together.digest}
