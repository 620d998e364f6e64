"""Tiny clips of many kinds, each frame of which carries its own number, and damaged ones."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

FRAMES = 30
SIZE = (64, 96)  # height, width
_BITS, _BLOCK = 6, 16


def picture(number: int, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """Six blocks along the top, white where a bit of `number` is set, over a colour that changes."""
    image = np.zeros((*size, 3), np.uint8)
    for bit in range(_BITS):
        if number >> bit & 1:
            image[: size[0] // 2, bit * _BLOCK : (bit + 1) * _BLOCK] = 255
    image[size[0] // 2 :] = np.random.default_rng(number).integers(40, 215, 3)
    return image


def number_of(image: NDArray[np.uint8]) -> int:
    """The number that a picture carries."""
    row = image[image.shape[0] // 4, _BLOCK // 2 :: _BLOCK].mean(-1)[:_BITS]
    return sum(int(value > 127) << bit for bit, value in enumerate(row))


def write_clip(
    path: Path,
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    size: tuple[int, int] = SIZE,
    numbers: Sequence[int] = range(FRAMES),
    times: Sequence[int] | None = None,
    turned: int | None = None,
    audio: bool = False,
    full_range: bool = False,
    interlaced: bool = False,
    muxer: dict[str, str] | None = None,
) -> Path:
    """A clip of `picture`s, ten a second unless `times` (tenths of a second) say otherwise."""
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream: Any = container.add_stream(codec, rate=10, options=options or {})
        stream.height, stream.width = size
        stream.pix_fmt = pixels
        stream.time_base = stream.codec_context.time_base = Fraction(1, 10)
        if turned is not None:
            stream.set_display_rotation(turned)
        if full_range:
            stream.codec_context.color_range = 2
        if interlaced:
            stream.codec_context.flags |= 1 << 18 | 1 << 29
        sound: Any = container.add_stream("aac", rate=16000) if audio else None
        for place, number in enumerate(numbers):
            frame = av.VideoFrame.from_ndarray(picture(number, size), format="rgb24")
            frame = frame.reformat(format=pixels, dst_color_range="JPEG" if full_range else None)
            frame.pts, frame.time_base = (times[place] if times else place), Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound:
            wave = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            wave.sample_rate, wave.pts = 16000, 0
            container.mux(sound.encode(wave))
            container.mux(sound.encode(None))
    return path


def trim(source: Path, path: Path, *, tenths: int) -> Path:
    """Copy packets from the last key before `tenths` on, that begins to be shown at `tenths`: with an edit list."""
    with av.open(str(source)) as whole, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(whole.streams.video[0])
        packets = [packet for packet in whole.demux(video=0) if packet.size]
        shift = int(Fraction(tenths, 10) / packets[0].time_base)
        first = max(at for at, packet in enumerate(packets) if packet.is_keyframe and packet.pts <= shift)
        for packet in packets[first:]:
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
            container.mux(packet)
    return path


_GOP = {"g": "8", "bf": "2"}
_X265 = "keyint=8:bframes=2:log-level=none:pools=1:frame-threads=1"
CLIPS: dict[str, tuple[str, dict[str, Any]]] = {
    "h264": ("mp4", {"options": _GOP}),
    "h264 in mkv": ("mkv", {"options": _GOP}),
    "h264 open": ("mp4", {"options": {"x264-params": "open-gop=1:keyint=8:min-keyint=8:bframes=2:scenecut=0"}}),
    "h264 refresh": ("mp4", {"options": {"x264-params": "intra-refresh=1:keyint=8:bframes=0"}}),
    "h264 yuv444": ("mp4", {"options": _GOP, "pixels": "yuv444p"}),
    "h264 full range": ("mp4", {"options": _GOP, "full_range": True}),
    "h264 10 bit": ("mp4", {"options": _GOP, "pixels": "yuv420p10le"}),
    "h264 gray": ("mp4", {"options": _GOP, "pixels": "gray"}),
    "h264 interlaced": ("mp4", {"options": _GOP, "interlaced": True}),
    "h264 fragmented": ("mp4", {"options": _GOP, "muxer": {"movflags": "frag_keyframe+empty_moov"}}),
    "hevc": ("mp4", {"codec": "libx265", "options": {"x265-params": _X265 + ":open-gop=0"}}),
    "hevc open": ("mp4", {"codec": "libx265", "options": {"x265-params": _X265 + ":open-gop=1"}}),
    "hevc 10 bit": ("mp4", {"codec": "libx265", "options": {"x265-params": _X265}, "pixels": "yuv420p10le"}),
    "vp8": ("webm", {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}}),
    "vp9": ("webm", {"codec": "libvpx-vp9", "options": {"g": "8", "cpu-used": "8", "deadline": "realtime"}}),
    "av1": ("mp4", {"codec": "libsvtav1", "options": {"preset": "12", "g": "8", "svtav1-params": "lp=1"}}),
    "mpeg4": ("mp4", {"codec": "mpeg4", "options": _GOP}),
    "mpeg4 in avi": ("avi", {"codec": "mpeg4", "options": _GOP}),
    "mjpeg": ("avi", {"codec": "mjpeg", "pixels": "yuvj420p"}),
    "ffv1": ("mkv", {"codec": "ffv1"}),
    "transport stream": ("ts", {"options": _GOP}),
    "mpeg2": ("mpg", {"codec": "mpeg2video", "options": {"g": "8", "bf": "2"}}),
    "flash": ("flv", {"options": _GOP}),
    "variable rate": ("mp4", {"options": _GOP, "times": [at + at * at // 9 for at in range(FRAMES)]}),
    "odd": ("mp4", {"options": _GOP, "size": (63, 97), "pixels": "yuv444p"}),
    "portrait": ("mp4", {"options": _GOP, "size": (128, 96)}),
    "turned 90": ("mp4", {"options": _GOP, "turned": 90}),
    "turned 180": ("mp4", {"options": _GOP, "turned": 180}),
    "turned 270": ("mp4", {"options": _GOP, "turned": 270}),
    "audio": ("mp4", {"options": _GOP, "audio": True}),
    "one frame": ("mp4", {"numbers": [5]}),
    "wrong extension": ("mp4", {"options": _GOP}),
    "trimmed": ("mp4", {"options": _GOP}),
}


def make(name: str, folder: Path) -> Path:
    """One of `CLIPS`; a trimmed one shows the pictures 11 to 29."""
    suffix, settings = CLIPS[name]
    path = write_clip(folder / f"{name}.{suffix}", **settings)
    if name == "trimmed":
        return trim(path, folder / "cut.mp4", tenths=11)
    return path.rename(folder / "film.txt") if name == "wrong extension" else path


# ----------------------------------------------------------------------------------------------------- damage


def damage(data: bytes, seed: int) -> bytes:
    """`data` cut off, blanked at its head or in its middle, or with flipped bytes."""
    chance = random.Random(seed)
    at = chance.randrange(len(data))
    kinds: list[Callable[[], bytes]] = [
        lambda: data[:at],
        lambda: bytes(64) + data[64:],
        lambda: data[:at] + bytes(min(256, len(data) - at)) + data[at + 256 :],
        lambda: bytes(byte ^ (chance.random() < 0.01) * chance.randrange(256) for byte in data),
    ]
    return kinds[seed % len(kinds)]()


def misfits(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that give no frames, with the reason."""
    whole = write_clip(folder / "whole.mp4", options=_GOP).read_bytes()
    head = write_clip(folder / "head.mp4", options=_GOP, muxer={"movflags": "+faststart"}).read_bytes()
    with av.open(str(folder / "sound.m4a"), "w", format="mp4") as container:
        sound: Any = container.add_stream("aac", rate=16000)
        wave = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        wave.sample_rate = 16000
        container.mux(sound.encode(wave))
        container.mux(sound.encode(None))
    mkv = write_clip(folder / "whole.mkv", options=_GOP).read_bytes()
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{folder / 'whole.mp4'}\n#EXT-X-ENDLIST\n"
    files = {
        "empty": (b"", "is empty"),
        "zeros": (bytes(4096), "cannot be opened"),
        "garbage": (random.Random(0).randbytes(4096), "cannot be opened"),
        "text": (b"no film\n" * 99, "cannot be opened"),
        "playlist": (playlist.encode(), "cannot be opened"),
        "script": (f"ffconcat version 1.0\nfile '{folder / 'whole.mp4'}'\n".encode(), "cannot be opened"),
        "no index": (whole[: whole.rindex(b"moov") - 4], "cannot be opened"),
        "cut early": (head[: len(head) // 2], "ends early"),
        "cut at its end": (head[:-9], "ends early"),
        "cut matroska": (mkv[: len(mkv) // 2], "ends early"),
    }
    found = {}
    for name, (data, reason) in files.items():
        (folder / f"{name}.mp4").write_bytes(data)
        found[name] = (folder / f"{name}.mp4", reason)
    os.mkfifo(folder / "pipe.mp4")
    (folder / "folder.mp4").mkdir()
    return found | {
        "sound": (folder / "sound.m4a", "no video stream"),
        "pipe": (folder / "pipe.mp4", "is no file"),
        "folder": (folder / "folder.mp4", "is no file"),
        "missing": (folder / "missing.mp4", "cannot be opened"),
    }
