"""Finds the cuts between the scenes of a video.

Hard cuts only: a fade or dissolve of a second changes no neighbouring frames by much and is no cut, one of a few frames
is (`CutConfig.margin_seconds` keeps clear of it). PySceneDetect's detectors measure the mean change of pixels, which
fast motion raises as much as a cut does, and bring OpenCV; colours counted in nine parts of the picture tell the two
apart in a page of NumPy.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]
Signature = NDArray[np.float64]

WINDOW_SECONDS = 0.2  # looked at on both sides of a cut; a shorter scene is a flash
_MOST_WINDOW = 12  # frames
_BINS, _PARTS, _SIDE = 8, 3, 64  # bins a colour channel, parts a side of the picture, pixels of its shorter side
_CHUNK_BYTES = 2**25  # of frames that are read at a time
_STANDS_OUT = 2.0  # times what changes within the scenes around a cut: a whipping camera changes as much all along


def find_scenes(video: Any, first: int, stop: int, threshold: float) -> list[range]:
    """The scenes that frames `first` to `stop - 1` are made of.

    Args:
        video: as `datasets.video.reader.open_video` gives it; a few frames are held at a time.
        first: index of a frame.
        stop: index after the last.
        threshold: 0 to 1; see `find_cuts`.

    Returns:
        Ranges of frames, without gaps, in order.
    """
    chunk = max(1, min(64, _CHUNK_BYTES // (3 * video.height * video.width)))
    window = max(2, min(_MOST_WINDOW, round(WINDOW_SECONDS * video.fps)))
    frames = (
        frame
        for start in range(first, stop, chunk)
        for frame in video.frames(range(start, min(start + chunk, stop)))
    )  # fmt: skip
    edges = [first, *(first + cut for cut in find_cuts(frames, threshold, window)), stop]
    return [range(start, end) for start, end in itertools.pairwise(edges)]


def find_cuts(frames: Iterable[Frames], threshold: float, window: int) -> list[int]:
    """The frames with which a new scene begins, in order; never 0.

    A cut lies where every one of `window` frames before differs from every one of `window` frames after: by more than
    `threshold`, and by more than twice what changes between neighbours on either side. So a flash, after which the old
    scene is back, is none, and neither is fast motion.

    Args:
        frames: `[height, width, 3]` each, all of one size.
        threshold: share of the picture, 0 to 1, whose colours must have changed.
        window: frames; a scene of fewer is not seen.
    """
    recent: dict[int, Signature] = {}
    cuts, count = [], 0
    for count, frame in enumerate(frames, 1):
        recent[count - 1] = _signature(frame)
        if _is_cut(recent, count - window, threshold, window):
            cuts.append(count - window)
        recent.pop(count - 2 * window, None)
    return cuts + [
        index for index in range(max(1, count - window + 1), count) if _is_cut(recent, index, threshold, window)
    ]


def _is_cut(recent: dict[int, Signature], index: int, threshold: float, window: int) -> bool:
    if index < 1 or _change(recent[index - 1], recent[index]) <= threshold:  # nearly all frames end here
        return False
    before = [recent[i] for i in range(max(0, index - window), index)]
    after = [recent[i] for i in range(index, index + window) if i in recent]
    across = min(_change(old, new) for old in before for new in after)
    within = [*_changes(before), *_changes(after)]
    return across > max(threshold, _STANDS_OUT * float(np.median(within)) if within else 0.0)


def _changes(scene: list[Signature]) -> Iterator[float]:
    return (_change(old, new) for old, new in itertools.pairwise(scene))


def _change(old: Signature, new: Signature) -> float:
    """Share of the picture, 0 to 1, whose colours are others: total variation of the histograms."""
    return float(np.abs(old - new).sum()) / 2


def _signature(frame: Frames) -> Signature:
    """Joint colour histograms `[9 * 512]` of nine parts of a frame; sums to 1.

    Each pixel is shared between its eight nearest bins, so that a slight change of light is a slight change here.
    """
    step = max(1, min(frame.shape[:2]) // _SIDE)
    small = frame[::step, ::step]
    row, column = (np.arange(size) * _PARTS // size for size in small.shape[:2])
    part = (row[:, None] * _PARTS + column).ravel()
    level = small.reshape(-1, 3) * ((_BINS - 1) / 255)
    lower = np.minimum(level.astype(np.int64), _BINS - 2)
    upper_share = level - lower
    size = _PARTS**2 * _BINS**3
    total = np.zeros(size)
    for corner in np.ndindex(2, 2, 2):
        r, g, b = (lower + corner).T
        share = np.where(corner, upper_share, 1 - upper_share).prod(axis=1)
        total += np.bincount(((part * _BINS + r) * _BINS + g) * _BINS + b, share, size)
    return total / len(level)
