"""Clips for a web page: VP9 and Opus in WebM, which every browser of today decodes (Chromium often has no H.264)."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from rats_video.inference.audio import open_tracks, write_tracks
from rats_video.sound import Sound

LONGEST = 384  # pixels of a side: a report is mailed
_OPTIONS = {"crf": "32", "b": "0", "deadline": "good", "cpu-used": "4", "threads": "1"}  # one thread: the same bytes
_BT709, _LIMITED_RANGE = 1, 1


@dataclass(frozen=True)
class WebClip:
    """A clip as the page holds it: data URIs of video and poster, its size, and whether it can be heard."""

    video: str
    poster: str
    width: int
    height: int
    num_frames: int
    fps: float
    has_sound: bool

    @property
    def size(self) -> int:
        """Characters it takes."""
        return len(self.video) + len(self.poster)


def crop(frames: Tensor, box: Sequence[int]) -> Tensor | None:
    """The box (left, top, width, height) of frames `[T, 3, H, W]`; None if it does not lie inside."""
    left, top, width, height = box
    if min(left, top) < 0 or min(width, height) < 1 or top + height > frames.shape[2] or left + width > frames.shape[3]:
        return None
    return frames[:, :, top : top + height, left : left + width]


def encode_clip(frames: Tensor, fps: float, sound: Sound | None = None) -> WebClip:
    """Encode frames `[T, 3, H, W]` in [0, 1], reduced to `LONGEST` pixels a side, and their sound.

    The same give the same bytes.

    Raises:
        OSError: the encoder failed.
    """
    frames = _reduced(frames)
    height, width = frames.shape[2:]
    images = frames.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    video = base64.b64encode(_webm(list(images), Fraction(fps).limit_denominator(1001), sound)).decode()
    poster = base64.b64encode(_poster(images[0])).decode()
    return WebClip(
        f"data:video/webm;base64,{video}", f"data:image/webp;base64,{poster}", width, height, len(images), fps,
        has_sound=sound is not None,
    )  # fmt: skip


def _reduced(frames: Tensor) -> Tensor:
    """Even sides of at most `LONGEST` pixels, in proportion."""
    height, width = frames.shape[2:]
    scale = min(1.0, LONGEST / max(height, width))
    size = [max(2, round(side * scale / 2) * 2) for side in (height, width)]
    if size == [height, width]:
        return frames
    return torch.nn.functional.interpolate(frames, size=size, mode="bilinear", antialias=True)


def _webm(images: Sequence[object], rate: Fraction, sound: Sound | None) -> bytes:
    import av

    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", format="webm", options={"fflags": "+bitexact"}) as container:  # no random identifier
            stream = container.add_stream("libvpx-vp9", rate=rate)
            stream.pix_fmt = "yuv420p"
            height, width = images[0].shape[:2]  # type: ignore[attr-defined]
            stream.height, stream.width = height, width
            stream.options = _OPTIONS
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = _LIMITED_RANGE
            tracks = open_tracks(container, {} if sound is None else {"": sound}, "libopus")
            for index, image in enumerate(images):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
                frame.pts, frame.time_base = index, 1 / rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
            write_tracks(container, tracks)
    except av.error.FFmpegError as error:
        raise OSError(f"the encoder failed: {error}") from error
    return buffer.getvalue()


def _poster(image: object) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", quality=70, method=4)  # type: ignore[arg-type]
    return buffer.getvalue()
