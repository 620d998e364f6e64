"""The frames that a video file displays, their times, and where decoding may begin.

An index is exact, or there is none. Where one packet is one frame and says when it is shown, packets are read and only
the first is decoded. Everywhere else (edit lists, transport streams, packets without times, codecs that hide frames)
the whole file is decoded once and its frames are counted as they come out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rats_video.datasets.video.files import MOST_FRAME_PIXELS, Unreadable, check_whole, is_upright, opened

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_TIMED_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
_ONE_FRAME_A_PACKET = {"h264", "hevc", "vp9", "av1", "mjpeg", "ffv1", "prores"}
_PROGRESSIVE = (0, 1)  # field orders unknown and progressive: of others each field may be a packet


@dataclass(frozen=True)
class _Kinds:
    """Kinds of units of a codec: where the kind is written, and which ones matter here."""

    shift: int
    mask: int
    length_at: int  # of the configuration record: bytes of a unit's length, less one
    closed: frozenset[int]
    opened: frozenset[int]
    breaks: frozenset[int]
    parameters: int


_UNITS = {
    "h264": _Kinds(0, 0x1F, 4, frozenset({5}), frozenset(), frozenset(), 7),
    "hevc": _Kinds(1, 0x3F, 21, frozenset({19, 20}), frozenset({21}), frozenset({16, 17, 18}), 33),
}


@dataclass(frozen=True)
class VideoIndex:
    """The frames that a file displays.

    Args:
        times: seconds `[N]` of each frame in the order of display, rising from 0.
        pts: of each frame `[N]` in the container's clock; None where frames can only be counted from the first.
        starts: rising pts of packets where decoding may begin: what is shown from there on comes out as it should.
        closed: a start divides packets as it divides frames, so that whoever counts packets counts frames; times
            are even and begin at 0.
        height: pixels, after rotation.
        width: pixels, after rotation.
        turns: counter-clockwise quarter turns from what is stored to what is displayed.
        fps: average frames a second; of a single frame what the file claims, 0 if nothing.
        codec: FFmpeg's name of it.
        pixels: FFmpeg's name of the pixel format.
    """

    times: NDArray[np.float64]
    pts: NDArray[np.int64] | None
    starts: NDArray[np.int64]
    closed: bool
    height: int
    width: int
    turns: int
    fps: float
    codec: str
    pixels: str


def index_video(path: Path) -> VideoIndex:
    """The index of a video file.

    Raises:
        Unreadable: it cannot be read, or not to its end.
    """
    known = check_whole(path)
    index = None
    with opened(path) as (container, stream):
        context = stream.codec_context
        simple = context.name in _ONE_FRAME_A_PACKET and context.field_order in _PROGRESSIVE
        if simple and container.format.name in _TIMED_FORMATS:
            index = _by_packets(container, stream, known=known, upright=is_upright(path))
    if index is not None:
        return index
    with opened(path) as (container, stream):
        return _by_frames(container, stream)


@dataclass(frozen=True)
class _Picture:
    """The properties that all stored frames share."""

    height: int
    width: int
    pixels: str
    rotation: int = 0

    @classmethod
    def of(cls, frame: VideoFrame) -> _Picture:
        return cls(frame.height, frame.width, frame.format.name, frame.rotation)


def _declared_picture(stream: VideoStream) -> _Picture | None:
    """The pictures' properties as FFmpeg knows them without decoding, which costs as much as opening the file."""
    context = stream.codec_context
    if not (context.pix_fmt and context.height and context.width):
        return None
    return _Picture(context.height, context.width, context.pix_fmt)


def _by_packets(container: InputContainer, stream: VideoStream, *, known: bool, upright: bool) -> VideoIndex | None:
    """The index as packets tell it; None if they cannot be trusted with it."""
    units = _Units(stream) if stream.codec_context.name in _UNITS else None
    first: _Picture | None = _declared_picture(stream) if upright else None
    shown: list[int] = []
    starts: list[int] = []  # positions among the packets
    closed = known and units is not None
    for packet in container.demux(stream):
        if first is None and (frame := next(iter(packet.decode()), None)):
            first = _Picture.of(frame)
        if not packet.size:  # the last, which empties the decoder
            break
        if packet.pts is None or packet.is_discard or packet.is_corrupt:
            return None
        if packet.is_keyframe:
            start = units.start(packet) if units else _Start.OPEN
            if start is _Start.UNKNOWN or packet.has_sidedata("new_extradata"):
                return None
            closed = closed and start is _Start.CLOSED
            if start is not _Start.NONE:
                starts.append(len(shown))
        shown.append(packet.pts)
    if first is None or not shown:
        raise Unreadable("no frames")
    pts, where = np.array(shown, np.int64), np.array(starts, np.int64)
    order = np.argsort(pts, kind="stable")
    rank = np.argsort(order)
    pts = pts[order]
    if stream.frames not in {0, len(pts)} or not where.size or where[0] or rank[0] or (np.diff(pts) <= 0).any():
        return None
    # decord loses count between calls where frames are spaced unevenly, or begin after 0.
    even = pts[0] == 0 and bool((np.diff(pts, 2) == 0).all())
    closed = closed and even and bool((rank[where] == where).all()) and len(container.streams.video) == 1
    return _index(stream, first, pts, pts=pts, starts=np.sort(pts[rank[where]]), closed=closed)


def _by_frames(container: InputContainer, stream: VideoStream) -> VideoIndex:
    """The index of what comes out when the whole file is decoded."""
    first: VideoFrame | None = None
    shown: list[int] = []
    for frame in container.decode(stream):
        if frame.pts is None:
            raise Unreadable("its frames have no times")
        first = first or frame
        check_same(first, frame)
        shown.append(frame.pts)
    if first is None:
        raise Unreadable("no frames")
    clock = np.array(shown, np.int64)
    if (np.diff(clock) <= 0).any():
        raise Unreadable("its times run backwards")
    return _index(stream, _Picture.of(first), clock, pts=None, starts=clock[:0], closed=False)


def check_same(first: VideoFrame, frame: VideoFrame) -> None:
    """Refuse a frame that is not of the first one's size, or turned otherwise."""
    for one, other in ((first.height, frame.height), (first.width, frame.width), (first.rotation, frame.rotation)):
        if one != other:
            raise Unreadable("its frames change size", f"{one} and {other}")


def _index(
    stream: VideoStream,
    first: _Picture,
    clock: NDArray[np.int64],
    *,
    pts: NDArray[np.int64] | None,
    starts: NDArray[np.int64],
    closed: bool,
) -> VideoIndex:
    if first.height * first.width > MOST_FRAME_PIXELS:
        raise Unreadable("its frames are too large", f"{first.width} x {first.height}")
    if first.rotation % 90:
        raise Unreadable("turned by no quarter", f"{first.rotation} degrees")
    times = (clock - clock[0]) * float(stream.time_base or 0)
    rate = stream.average_rate or stream.guessed_rate or 0
    height, width = (first.width, first.height) if first.rotation % 180 else (first.height, first.width)
    return VideoIndex(
        times=times, pts=pts, starts=starts, closed=closed, height=height, width=width, turns=first.rotation // 90 % 4,
        fps=(len(times) - 1) / times[-1] if len(times) > 1 else float(rate),
        codec=stream.codec_context.name, pixels=first.pixels,
    )  # fmt: skip


class _Start(Enum):
    """Kind of a key packet as a place to begin decoding."""

    NONE = auto()  # no start: pictures after it may need ones before
    OPEN = auto()  # pictures shown before it may follow it
    CLOSED = auto()
    UNKNOWN = auto()  # the stream changes here, or pictures that follow are never shown


class _Units:
    """Looks into H.264 and HEVC packets for the kinds of their units: a key flag alone does not tell."""

    def __init__(self, stream: VideoStream) -> None:
        self._kinds = _UNITS[stream.codec_context.name]
        extra = stream.codec_context.extradata or b""
        # The first byte of a configuration record is its version, 1; a start code begins with 0.
        self._length = (extra[self._kinds.length_at] & 3) + 1 if extra[:1] == b"\x01" else 0
        self._parameters: set[bytes] = set()

    def start(self, packet: Packet[VideoStream]) -> _Start:
        """The kind of start that this packet is."""
        found = set()
        for unit in self._split(bytes(packet)):
            kind = unit[0] >> self._kinds.shift & self._kinds.mask
            found.add(kind)
            if kind == self._kinds.parameters:
                self._parameters.add(unit)
        if len(self._parameters) > 1 or found & self._kinds.breaks:
            return _Start.UNKNOWN
        if found & self._kinds.closed:
            return _Start.CLOSED
        return _Start.OPEN if found & self._kinds.opened else _Start.NONE

    def _split(self, data: bytes) -> Iterator[bytes]:
        if not self._length:
            yield from (unit for unit in re.split(rb"\x00\x00\x00?\x01", data) if unit)
            return
        at = 0
        while at + self._length < len(data):
            begin = at + self._length
            at = begin + int.from_bytes(data[at:begin], "big")
            if at > begin:
                yield data[begin:at]
