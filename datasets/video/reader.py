"""Frames of a video file by their index: exact, in any order, the same on every read.

decord reads where it is known to be exact: 8-bit H.264 and HEVC in MP4 or Matroska whose groups of pictures are
closed. PyAV reads everything else, and everything where decord is not installed. Both convert alike: by the matrix
and range that the file states (BT.601 and limited where it states none), alpha dropped, gray in three equal channels,
interlaced frames woven as they are stored, pixels not stretched where they are not square, HDR not mapped.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch  # noqa: F401  # before decord, which may crash it otherwise (dmlc/decord#293)
from numpy.typing import NDArray

from rats_video.config.fields import MOST_PIXELS
from rats_video.datasets.video.files import Unreadable, opened
from rats_video.datasets.video.index import VideoIndex, index_video

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

Reader = Literal["decord", "pyav"]
_PIXELS_OF_DECORD = {"yuv420p", "yuvj420p", "yuv444p"}
_NO_FAULT = 1e-9  # of the frames


class VideoReader:
    """An open video; see `open_video`.

    Args:
        path: the file.
        index: what it displays.
    """

    def __init__(self, path: Path, index: VideoIndex) -> None:
        self.timestamps = index.times
        self.num_frames = len(index.times)
        self.height, self.width = index.height, index.width
        self.fps, self.codec = index.fps, index.codec
        self._pyav = _PyavFrames(path, index)
        self._decord = _decord_reader(path, index)

    @property
    def reader(self) -> Reader:
        """The library that decodes it."""
        return "decord" if self._decord else "pyav"

    def frames(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Frames in the order of `indices`, each exactly what a decoding of the whole file displays there.

        Rising indices, also over several calls, are read in one pass.

        Args:
            indices: from 0 to `num_frames` - 1, in any order, again if wanted.

        Returns:
            `[K, height, width, 3]` RGB.

        Raises:
            IndexError: there is no such frame.
            ValueError: together they have more than `MOST_PIXELS` pixels.
            Unreadable: the file does not give what its index promised.
        """
        wanted, place = np.unique(np.asarray(indices, np.int64), return_inverse=True)
        if wanted.size and not 0 <= wanted[0] <= wanted[-1] < self.num_frames:
            raise IndexError(f"frames {wanted[0]} to {wanted[-1]} of {self.num_frames}")
        if len(place) * self.height * self.width > MOST_PIXELS:
            raise ValueError(f"{len(place)} frames of {self.height} x {self.width} are over {MOST_PIXELS} pixels")
        frames = self._read(wanted)
        return frames if np.array_equal(place, np.arange(len(wanted))) else frames[place]

    def close(self) -> None:
        """Close the file; memory is freed."""
        self._decord = None
        self._pyav.close()

    def _read(self, wanted: NDArray[np.int64]) -> NDArray[np.uint8]:
        if self._decord:
            from decord import DECORDError

            try:
                frames: NDArray[np.uint8] = self._decord.get_batch(wanted).asnumpy()
            except (DECORDError, RuntimeError):
                self._decord = None  # what PyAV says of the file counts
            else:
                return frames
        return self._pyav.read(wanted)


@contextmanager
def open_video(path: Path) -> Iterator[VideoReader]:
    """Open a video file for reading.

    The object has `timestamps` (float64 `[N]`, seconds of each displayed frame, rising from 0), `num_frames`,
    `height` and `width` (pixels as displayed: rotation flags are applied), `fps` (average), `codec`, `reader`
    ("decord" or "pyav") and `frames(indices)`.

    Raises:
        Unreadable: the file is no video, is damaged, ends early, or its frames are too large or change size.
    """
    index = index_video(path)
    reader = VideoReader(path, index)
    try:
        yield reader
    finally:
        reader.close()


class _BatchReader(Protocol):
    """The part of `decord.VideoReader` that is used."""

    def __len__(self) -> int: ...
    def get_batch(self, indices: NDArray[np.int64]) -> Any: ...


def _decord_reader(path: Path, index: VideoIndex) -> _BatchReader | None:
    """The reader of decord, where it is there and exact."""
    if not index.closed or index.pixels not in _PIXELS_OF_DECORD:
        return None
    try:
        import decord
    except ImportError:
        return None
    decord.logging.set_level(decord.logging.QUIET)
    try:  # with a tolerance above 0 it says where it repeated a frame that it could not decode
        reader: _BatchReader = decord.VideoReader(os.path.abspath(path), num_threads=1, fault_tol=_NO_FAULT)  # noqa: PTH100
    except (decord.DECORDError, RuntimeError, UnicodeError):
        return None
    return reader if len(reader) == len(index.times) else None


class _PyavFrames:
    """Frames by index from PyAV: from the nearest start before a frame, or onwards from the last one read.

    It never seeks by time, which lands where a container's index happens to lead: packets before a start are read and
    not decoded, which costs little.
    """

    def __init__(self, path: Path, index: VideoIndex) -> None:
        self._path, self._index = path, index
        self._position = {} if index.pts is None else {pts: at for at, pts in enumerate(index.pts.tolist())}
        self._starts = set(index.starts.tolist())
        self._decoded: Generator[tuple[int, VideoFrame]] | None = None
        self._last: tuple[int, VideoFrame] | None = None
        self._passed: int | None = None  # the last start whose packet was read
        self._target: int | None = None  # the start up to which packets are not decoded

    def read(self, wanted: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Frames `[K, height, width, 3]` of rising, unequal indices."""
        frames = np.empty((len(wanted), self._index.height, self._index.width, 3), np.uint8)
        for place, at in enumerate(wanted.tolist()):
            image = np.rot90(self._frame(at).to_ndarray(format="rgb24"), self._index.turns)
            if image.shape != frames.shape[1:]:
                raise Unreadable("its frames change size")
            frames[place] = image
        return frames

    def close(self) -> None:
        """Close the file."""
        if self._decoded:
            self._decoded.close()
        self._decoded = self._last = self._passed = self._target = None

    def _frame(self, at: int) -> VideoFrame:
        if self._last and at < self._last[0]:
            self.close()
        if self._index.pts is not None:
            start = self._index.starts[np.searchsorted(self._index.starts, self._index.pts[at], "right") - 1]
            if self._passed is None or start > self._passed:
                self._target = int(start)
        if self._decoded is None:
            self._decoded = self._decode()
        while self._last is None or self._last[0] < at:
            self._last = next(self._decoded, None)
            if self._last is None:
                raise Unreadable("ends early", f"at frame {at} of {len(self._index.times)}")
        if self._last[0] > at:
            raise Unreadable("frames are missing", f"frame {at} of {len(self._index.times)}")
        return self._last[1]

    def _decode(self) -> Generator[tuple[int, VideoFrame]]:
        """Frames with their indices, from the target on and from each new target."""
        with opened(self._path) as (container, stream):
            if not self._position:
                yield from enumerate(container.decode(stream))
                return
            for packet in container.demux(stream):
                if packet.pts in self._starts:
                    self._passed = packet.pts
                if self._target is not None:
                    if packet.pts != self._target:
                        continue
                    stream.codec_context.flush_buffers()
                    self._target = None
                for frame in packet.decode():
                    if frame.pts not in self._position:
                        raise Unreadable("frames are missing", "one is shown at another time than its packet says")
                    yield self._position[frame.pts], frame
