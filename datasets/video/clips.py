"""From one source to its clips: what a worker process of `prepare` runs."""

from __future__ import annotations

import contextlib
import hashlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from rats_video.datasets.prepared.cache import Skipped
from rats_video.datasets.video.files import Unreadable
from rats_video.datasets.video.records import CutClip, ReadSource, SourceVideo
from rats_video.datasets.video.scenes import find_scenes
from rats_video.datasets.video.settings import BucketConfig, PrepareConfig
from rats_video.datasets.video.shape_clips import render_shape
from rats_video.datasets.video.spans import Span, nearest_buckets, plan_spans, suitable_buckets
from rats_video.files import HASHED_BYTES
from rats_video.reading import check_plain_file

MOST_PIECE = 2**28  # bytes of frames that a worker hands over at a time: two clips of 81 x 480 x 832
PLAIN_LEVELS = 8  # of 255: compression leaves these in a picture of one colour
_MICROSECOND = 1e-6  # times are rounded

TOO_SHORT = "too short for any bucket"
SMALL_SIDE = "smaller than cut.min_side"
SMALL_BUCKET = "smaller than its bucket"
NO_FRAME = "no frame between start and end"
REPEATED = "most frames would be repeated: shows too few a second"
PLAIN = "one plain colour"
UNREADABLE = "cannot be read"


@dataclass(frozen=True)
class ReadPlan:
    """The plan of what to read of a source.

    Args:
        digest: SHA-256 of its bytes; empty where they could not be read.
        spans: in order of time.
        skipped: why it has none, or why some scenes have none.
    """

    digest: str = ""
    spans: tuple[Span, ...] = ()
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True)
class ReadChunk:
    """As much of a source as is read at a time: a film's clips would fill the memory.

    Args:
        source: it.
        plan: of these spans; what it skipped is in the first piece.
        is_last: whether the source is done with after it.
    """

    source: SourceVideo
    plan: ReadPlan
    is_last: bool = True


def pieces(source: SourceVideo, plan: ReadPlan, most: int = MOST_PIECE) -> Iterator[ReadChunk]:
    """All spans of a plan, as many at a time as make `most` bytes of frames; one span at least."""
    start, size = 0, 0
    skipped = plan.skipped
    for end, span in enumerate(plan.spans):
        added = 3 * span.bucket.num_frames * span.bucket.height * span.bucket.width
        if end > start and size + added > most:
            yield ReadChunk(source, ReadPlan(plan.digest, plan.spans[start:end], skipped), is_last=False)
            start, size, skipped = end, 0, ()
        size += added
    yield ReadChunk(source, ReadPlan(plan.digest, plan.spans[start:], skipped))


def read_piece(piece: ReadChunk, cfg: PrepareConfig) -> ReadSource:
    """The clips of a piece; whatever is wrong with it is in `skipped`. A prompt gives neither."""
    source, plan = piece.source, piece.plan
    if source.kind == "shape":
        return render_shape(source, cfg)
    if source.kind == "prompt":
        return ReadSource(source, hashlib.sha256((source.caption or "").encode()).hexdigest())
    clips, skipped = read_spans(source, plan.spans, cfg)
    return ReadSource(source, plan.digest, clips, plan.skipped + skipped)


def read_source(source: SourceVideo, cfg: PrepareConfig) -> ReadSource:
    """All clips of a source, in memory together; see `read_piece`."""
    return read_piece(ReadChunk(source, plan_source(source, cfg)), cfg)


def plan_source(source: SourceVideo, cfg: PrepareConfig) -> ReadPlan:  # noqa: PLR0911  # one a reason
    """Look through a video, a few frames at a time, for its scenes, and choose the spans to take.

    What is no video needs no plan: it is empty.
    """
    if not source.has_file:
        return ReadPlan()
    if source.kind == "image":
        cfg = cfg.of_images

    def skip(reason: str, detail: str = "") -> ReadPlan:
        return ReadPlan(digest, (), (Skipped(source.name, reason, detail),))

    digest = ""
    try:
        digest = digest_of(source)
        with opened_source(source) as video:
            times, size = video.timestamps, (video.height, video.width)
            end = math.inf if source.end is None else source.end
            first, stop = map(int, np.searchsorted(times, [source.start - _MICROSECOND, end - _MICROSECOND]))
            buckets = suitable_buckets(size, cfg)
            if min(size) < (cfg.cut.min_side or 0):
                return skip(SMALL_SIDE, "{1} x {0}; cut.min_side is {2}".format(*size, cfg.cut.min_side))
            if not buckets:
                least = min(nearest_buckets(size, cfg), key=lambda bucket: bucket.height * bucket.width)
                return skip(SMALL_BUCKET, "{1} x {0}; its bucket is {3} x {2}".format(*size, least.height, least.width))
            if first >= stop:
                return skip(NO_FRAME, f"start is {source.start:.2f} s, and the last one is at {times[-1]:.2f} s")
            cuts = cfg.cut.scene_threshold
            scenes = [range(first, stop)] if cuts is None else find_scenes(video, first, stop, cuts)
    except Unreadable as error:
        return skip(error.reason, error.detail)
    except OSError as error:
        return skip(UNREADABLE, error.strerror or str(error))
    spans, short = plan_spans(times, scenes, buckets, cfg)
    slow = [span for span in spans if 2 * span.repeated > len(span.indices)]
    reasons = [(TOO_SHORT, detail) for detail in short]
    reasons += [
        (REPEATED, f"{span.repeated} of {len(span.indices)} frames at {cfg.fps:g} a second, {_seconds(span)}")
        for span in slow
    ]
    return ReadPlan(
        digest,
        tuple(span for span in spans if span not in slow),
        tuple(Skipped(source.name, reason, detail) for reason, detail in reasons),
    )


def read_spans(
    source: SourceVideo, spans: Sequence[Span], cfg: PrepareConfig
) -> tuple[tuple[CutClip, ...], tuple[Skipped, ...]]:
    """Read some of the spans that `plan_source` chose; those that show nothing are skipped."""
    clips, skipped = [], []
    try:
        if spans:
            with opened_source(source) as video:
                for span in spans:
                    if clip := _read_span(video, span, cfg):
                        clips.append(clip)
                    else:
                        skipped.append(Skipped(source.name, PLAIN, _seconds(span)))
    except Unreadable as error:
        skipped.append(Skipped(source.name, error.reason, error.detail))
    except OSError as error:
        skipped.append(Skipped(source.name, UNREADABLE, error.strerror or str(error)))
    return tuple(clips), tuple(skipped)


def _read_span(video: Any, span: Span, cfg: PrepareConfig) -> CutClip | None:
    """The clip, or None where it is one plain colour from its first frame to its last."""
    shown = sorted(set(span.indices))
    size = (3, span.bucket.height, span.bucket.width)
    fitted, low, high = torch.empty((len(shown), *size), dtype=torch.uint8), 255, 0
    for row, index in enumerate(shown):  # one by one: those of the source may be much larger
        pixels = video.frames([index])
        low, high = np.minimum(low, pixels.min(axis=(0, 1, 2))), np.maximum(high, pixels.max(axis=(0, 1, 2)))
        fitted[row] = fit_frames(pixels, span.bucket, cfg.fit)[0]
    if np.max(high - low) <= PLAIN_LEVELS:
        return None
    frames = fitted[np.searchsorted(shown, span.indices)]
    return CutClip(frames, span.bucket, span.start, span.end, span.scene, span.repeated)


def fit_frames(frames: NDArray[np.uint8], bucket: BucketConfig, fit: Literal["crop", "pad", "stretch"]) -> Tensor:
    """Frames of a bucket's height and width.

    Args:
        frames: `[T, height, width, 3]`.
        bucket: the size to be.
        fit: `crop` cuts equal parts off two sides, `pad` adds equal black bars, `stretch` distorts.

    Returns:
        `[T, 3, height, width]` uint8.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, 1)
    height, width = pixels.shape[-2:]
    inner = bucket.height, bucket.width
    if fit == "crop":
        scale = max(bucket.height / height, bucket.width / width)
        pixels = _centre(pixels, min(height, round(bucket.height / scale)), min(width, round(bucket.width / scale)))
    elif fit == "pad":
        scale = min(bucket.height / height, bucket.width / width)
        inner = min(bucket.height, max(1, round(height * scale))), min(bucket.width, max(1, round(width * scale)))
    if pixels.shape[-2:] != inner:
        smooth = F.interpolate(pixels.float(), size=inner, mode="bicubic", antialias=True)
        pixels = smooth.round().clamp(0, 255).to(torch.uint8)
    black = torch.zeros((len(pixels), 3, bucket.height, bucket.width), dtype=torch.uint8)
    _centre(black, *inner).copy_(pixels)
    return black


def _centre(pixels: Tensor, height: int, width: int) -> Tensor:
    """The middle of `[..., height, width]`."""
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]


def _seconds(span: Span) -> str:
    return f"{span.start:.2f} to {span.end:.2f} s"


def digest_of(source: SourceVideo) -> str:
    """SHA-256 of a video's bytes; raises OSError."""
    digest = hashlib.sha256()
    for piece in _pieces(source):
        digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def opened_source(source: SourceVideo) -> Iterator[Any]:
    """A source's file, open as `open_video` gives it; raises Unreadable and OSError."""
    from rats_video.datasets.video.images import open_image
    from rats_video.datasets.video.reader import open_video

    with local_file(source) as path, (open_image if source.kind == "image" else open_video)(path) as video:
        yield video


@contextlib.contextmanager
def local_file(source: SourceVideo) -> Iterator[Path]:
    """A file that holds the video alone: its own, or for an archive's member one for the time being."""
    if source.member is None:
        yield source.path
        return
    with tempfile.NamedTemporaryFile(prefix="rats-video-", suffix=Path(source.name).suffix) as file:
        for piece in _pieces(source):
            file.write(piece)
        file.flush()
        yield Path(file.name)


def _pieces(source: SourceVideo) -> Iterator[bytes]:
    check_plain_file(source.path)
    offset, left = source.member or (0, source.path.stat().st_size)
    with source.path.open("rb") as file:
        file.seek(offset)
        while piece := file.read(min(left, HASHED_BYTES)):
            left -= len(piece)
            yield piece
