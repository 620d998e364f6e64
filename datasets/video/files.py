"""Opening video files of strangers: no network, no second file, no picture too large, and none that is cut off."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

MOST_FRAME_PIXELS = 2**26  # of one frame: twice 8K
# Whatever its name, a file may be a playlist that reads other files, or fetches them: none of these formats does.
_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,gif,ogg,asf,h264,hevc,ivf",
    "protocol_whitelist": "file",
    "max_pixels": str(MOST_FRAME_PIXELS),
}
_PACKET = 188  # bytes, of a transport stream
_BOXES = {
    b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"uuid", b"sidx", b"mfra", b"meta", b"pdin",
}  # fmt: skip
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_MATRIX = {b"mvhd": 36, b"tkhd": 40}  # where it begins in the box
_UPRIGHT = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)


class Unreadable(Exception):  # noqa: N818  # what a file is, no mistake of ours
    """A video that gives no frames.

    Args:
        reason: a short clause, equal for equal causes, to be counted.
        detail: what a library said, or figures.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(reason, detail)

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


@contextmanager
def opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A file and its first video stream that is no cover picture, decoded by one thread: twice the same comes out.

    Raises:
        Unreadable: it cannot be opened or holds no video, or FFmpeg reports damage inside the block.
    """
    import av
    from av.stream import Disposition

    container = _open(path)
    try:
        with container:
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise Unreadable("no video stream")
            stream = streams[0]
            if stream.codec_context is None:
                raise Unreadable("no decoder for its codec")
            stream.codec_context.options = {"max_pixels": _OPTIONS["max_pixels"]}
            stream.thread_count = 1
            yield container, stream
    except (av.error.FFmpegError, MemoryError) as error:
        raise Unreadable("damaged", _said(error)) from error


def _open(path: Path) -> InputContainer:
    import av

    try:  # an absolute path, or a name could be a protocol
        container: InputContainer = av.open(os.path.abspath(path), options=_OPTIONS)  # noqa: PTH100
    except (av.error.FFmpegError, OSError, ValueError, MemoryError) as error:
        raise Unreadable("cannot be opened", _said(error)) from error
    return container


def _said(error: BaseException) -> str:
    return getattr(error, "strerror", None) or type(error).__name__


def check_whole(path: Path) -> bool:
    """Refuse what is no file, or shorter than it says; whether the first bytes are those of MP4 or Matroska.

    FFmpeg reads a Matroska file that is cut off to where it ends, and says nothing.

    Raises:
        Unreadable: nothing to read, or bytes are missing at the end.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe may never begin
            raise Unreadable("is no file")
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            declared, known = _declared(file, size)
    except (OSError, ValueError) as error:
        raise Unreadable("cannot be opened", _said(error)) from error
    if not size:
        raise Unreadable("is empty")
    if declared > size:
        raise Unreadable("ends early", f"{declared - size} bytes are missing")
    return known


def _declared(file: BinaryIO, size: int) -> tuple[int, bool]:
    """The bytes a file says it has, 0 where it does not say; whether it is MP4 or Matroska."""
    head = file.read(12)
    if head[:4] == _EBML:
        return _end_of_segment(file), True
    if head[4:8] in _BOXES:
        return _end_of_boxes(file, size), True
    if head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:8], "little"), False
    if head[:1] == b"G" and size % _PACKET and file.seek(_PACKET) and file.read(1) == b"G":
        return -(-size // _PACKET) * _PACKET, False
    return 0, False


def _end_of_boxes(file: BinaryIO, size: int) -> int:
    """The end of an MP4 file's last box; bytes after it, as some cameras write them, are ignored."""
    end = 0
    while end < size:
        file.seek(end)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if head[4:8] not in _BOXES or length == 0:  # 0: to the end of the file
            return end
        end += int.from_bytes(head[8:16], "big") if length == 1 else length
        if (length == 1 and int.from_bytes(head[8:16], "big") < 16) or 1 < length < 8:
            raise Unreadable("damaged", "a box without length")
    return end


def is_upright(path: Path) -> bool:
    """True if an MP4 file shows all its tracks as they are stored, not turned or mirrored."""
    with path.open("rb") as file:
        matrices = list(_matrices(file, 0, path.stat().st_size))
    return b"tkhd" in dict(matrices) and all(matrix == _UPRIGHT for _, matrix in matrices)


def _matrices(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, bytes]]:
    """The matrices of a movie and its tracks (ISO/IEC 14496-12, 8.2.2 and 8.3.2), in the boxes between two places."""
    while start + 8 <= end:
        file.seek(start)
        head = file.read(16)
        length, kind, body = int.from_bytes(head[:4], "big"), head[4:8], start + 8
        if length == 1:
            length, body = int.from_bytes(head[8:16], "big"), start + 16
        if length < body - start:
            return
        if kind in {b"moov", b"trak"}:
            yield from _matrices(file, body, min(end, start + length))
        elif kind in _MATRIX:
            file.seek(body)
            version = file.read(1)
            file.seek(body + _MATRIX[kind] + 12 * (version == b"\x01"))  # whose times are longer
            yield kind, file.read(len(_UPRIGHT))
        start += length


def _end_of_segment(file: BinaryIO) -> int:
    """The end of a Matroska file's segment; 0 if the file does not say."""
    file.seek(4)
    header = _variable(file)
    file.seek(header or 0, os.SEEK_CUR)
    if file.read(4) != _SEGMENT or (length := _variable(file)) is None:
        return 0
    return file.tell() + length


def _variable(file: BinaryIO) -> int | None:
    """An EBML length at the file's position; None for the unknown one."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    extra = 8 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & (0x7F >> extra)]) + file.read(extra), "big")
    return None if value == (1 << 7 * (extra + 1)) - 1 else value
