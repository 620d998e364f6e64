"""Clips to mp4 and PNG files, mp4 back, and prompts to file names. Tensors are `[T, 3, H, W]` in [0, 1]."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from fractions import Fraction
from typing import TYPE_CHECKING

import torch

from rats_video.config.fields import MOST_PIXELS
from rats_video.errors import UserError, first_line
from rats_video.files import replacing
from rats_video.inference.audio import open_tracks, write_tracks
from rats_video.reading import DEMUXER_OPTIONS, check_plain_file
from rats_video.sound import Sound

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor

_RANGE_SLACK = 0.01  # decoders overshoot [0, 1] by a rounding; [-1, 1] or 0..255 pixels are a caller's bug
_HASH_DIGITS = 10
_DIVERGED = "the model diverged: try an earlier checkpoint, or float32 instead of half precision"
# Of small pictures x264's macroblock tree is not the same every time: the same frames would give other bytes.
_ENCODER_OPTIONS = {"crf": "18", "preset": "medium", "profile": "high", "x264-params": "mbtree=0"}
_BT709 = 1  # the same code for matrix, primaries and transfer
_LIMITED_RANGE = 1


def write_mp4(frames: Tensor, path: Path, *, fps: float, sound: Sound | Mapping[str, Sound] | None = None) -> None:
    """Write a clip that plays everywhere: H.264, yuv420p, BT.709, AAC, the index before the data.

    The same frames give the same bytes. The file appears at `path` complete or not at all: it is encoded beside it and
    moved into place. Odd heights and widths, which yuv420p cannot hold, grow by one repeated edge row or column.

    Args:
        frames: pixels `[T, 3, H, W]`, floating point in [0, 1], on any device.
        path: the file to write, replaced if it exists; missing parent folders are made.
        fps: frames a second.
        sound: of this clip alone, if it has one; of several by name, one track each, players play the first.

    Raises:
        ValueError: `frames` is not such a tensor or `fps` is not positive.
        UserError: `frames` or `sound` hold NaN or infinity, or the file cannot be encoded or written.
    """
    frames = frames.detach()
    _check_clip(frames, fps, where=str(path))
    sounds = {"": sound} if isinstance(sound, Sound) else sound or {}
    if not all(bool(each.waves.isfinite().all()) for each in sounds.values()):
        raise UserError("the sound holds NaN or infinity", where=str(path), fix=_DIVERGED)
    with replacing(path, "video") as partial:
        _encode(frames, partial, Fraction(fps).limit_denominator(1001), sounds)


def write_png(frame: Tensor, path: Path, remarks: Mapping[str, str] | None = None) -> None:
    """Write a frame as a picture of eight bits, complete or not at all.

    Args:
        frame: pixels `[3, H, W]`, floating point in [0, 1], on any device.
        path: the file to write, replaced if it exists; missing parent folders are made.
        remarks: texts that the file carries, by key.

    Raises:
        ValueError: `frame` is not such a tensor.
        UserError: `frame` holds NaN or infinity, or the file cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    frame = frame.detach()
    _check_clip(frame[None], 1.0, where=str(path))
    about = PngInfo()
    for key, text in (remarks or {}).items():
        about.add_itxt(key, text.encode("utf-8", "replace").decode())
    with replacing(path, "image") as partial:
        to_picture(frame).save(partial, "PNG", pnginfo=about)


def to_picture(frame: Tensor) -> Image.Image:
    """A frame `[3, H, W]` of [0, 1] in eight bits."""
    from PIL import Image

    return Image.fromarray(_bytes(frame.detach()).permute(1, 2, 0).contiguous().numpy())


def write_clip(
    frames: Tensor, path: Path, *, fps: float, remarks: Mapping[str, str], sound: Sound | None = None
) -> None:
    """Write a clip `[T, 3, H, W]` as `write_mp4` does; one frame, of a file called `.png`, as `write_png` does."""
    if path.suffix == ".png":
        write_png(frames[0], path, remarks)
    else:
        write_mp4(frames, path, fps=fps, sound=sound)


def is_whole_png(path: Path) -> bool:
    """True if a PNG file is there with all its pixels."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.verify()  # every chunk's checksum
    except (OSError, ValueError, SyntaxError):  # Pillow raises the last for a damaged chunk
        return False
    return True


def read_mp4(path: Path) -> tuple[Tensor, float]:
    """Read every frame of a video file.

    Args:
        path: any file FFmpeg can decode; the whole clip is held in memory.

    Returns:
        Pixels `[T, 3, H, W]`, float32 in [0, 1], and the frames a second.

    Raises:
        UserError: the file is missing, is no video, holds no frame, or more pixels than `MOST_PIXELS`.
    """
    import av

    fix = "give a readable video file"
    images: list[Tensor] = []
    try:
        check_plain_file(path)
        with av.open(str(path), options=DEMUXER_OPTIONS) as container:
            stream = next(iter(container.streams.video), None)
            if stream is None or stream.codec_context is None:
                raise UserError("holds no video stream", where=str(path), fix=fix)
            stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}  # of one frame, before it has a buffer
            rate = stream.average_rate
            for frame in container.decode(stream):
                if (len(images) + 1) * frame.height * frame.width > MOST_PIXELS:
                    raise UserError(f"holds more than {MOST_PIXELS} pixels", where=str(path), fix="cut it")
                images.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
                if images[-1].shape != images[0].shape:
                    raise UserError("its frames change size", where=str(path), fix=fix)
    except (av.error.FFmpegError, OSError, ValueError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot read the video: {reason}", where=str(path), fix=fix) from error
    if not images or not rate:
        raise UserError("holds no frame", where=str(path), fix=fix)
    return torch.stack(images).permute(0, 3, 1, 2).float() / 255, float(rate)


def read_clip(path: Path) -> tuple[Tensor, float]:
    """What `write_clip` wrote: frames `[T, 3, H, W]` and the frames a second, 1 of a PNG.

    Raises:
        UserError: the file cannot be read.
    """
    if path.suffix != ".png":
        return read_mp4(path)
    import numpy as np
    from PIL import Image

    try:
        check_plain_file(path)
        with Image.open(path, formats=("PNG",)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise UserError(f"holds more than {MOST_PIXELS} pixels", where=str(path), fix="give a smaller one")
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"cannot read the image: {first_line(error)}", where=str(path)) from error
    return torch.tensor(pixels).permute(2, 0, 1)[None].float() / 255, 1.0


def slugify(prompt: str, max_length: int = 48) -> str:
    """A readable file name stem for a prompt, e.g. "a-red-circle-moving-left-1f0c9d2b7a".

    Only `[a-z0-9-]` are used, so no prompt can name another folder. The hash covers the whole prompt, so prompts that
    share their first words, or differ only in case or accents, still get different names.

    Args:
        prompt: any text, the empty one too.
        max_length: most characters of the result, hash included.

    Raises:
        ValueError: `max_length` cannot hold the hash.
    """
    if max_length < _HASH_DIGITS:
        raise ValueError(f"max_length must be at least {_HASH_DIGITS}, got {max_length}")
    # surrogatepass: a prompt that came from undecodable command-line bytes still gets a name.
    data = prompt.encode("utf-8", "surrogatepass")
    digest = hashlib.sha1(data, usedforsecurity=False).hexdigest()[:_HASH_DIGITS]
    ascii_text = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode()
    words = re.sub(r"[^a-z0-9]+", "-", ascii_text.lower()).strip("-")
    words = words[: max(0, max_length - _HASH_DIGITS - 1)].rstrip("-")
    return f"{words}-{digest}" if words else digest


def _check_clip(frames: Tensor, fps: float, *, where: str) -> None:
    """Refuse what cannot be a clip; see `write_mp4` for the errors."""
    if frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames must be [T, 3, H, W] and not empty, got {list(frames.shape)}")
    if not frames.is_floating_point():
        raise ValueError(f"frames must be floating point in [0, 1], got {frames.dtype}")
    if not 0 < fps < float("inf"):
        raise ValueError(f"fps must be positive, got {fps}")
    if not bool(torch.isfinite(frames).all()):
        raise UserError("the frames hold NaN or infinity", where=where, fix=_DIVERGED)
    low, high = (value.item() for value in torch.aminmax(frames))
    if low < -_RANGE_SLACK or high > 1 + _RANGE_SLACK:
        raise ValueError(f"frames must lie in [0, 1], got [{low:.3g}, {high:.3g}]")


def _encode(frames: Tensor, path: Path, rate: Fraction, sounds: Mapping[str, Sound]) -> None:
    """Encode `frames` `[T, 3, H, W]` into a new file at `path`; raises OSError if that fails."""
    import av

    try:
        _write_frames(frames, path, rate, sounds)
    except av.error.FFmpegError as error:
        if isinstance(error, OSError):
            raise
        raise OSError(f"the encoder failed: {error}") from error  # of PyAV's errors only the disk's derive from it


def _write_frames(frames: Tensor, path: Path, rate: Fraction, sounds: Mapping[str, Sound]) -> None:
    import av

    height, width = frames.shape[-2:]
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.pix_fmt = "yuv420p"
        stream.options = _ENCODER_OPTIONS
        stream.height, stream.width = height + height % 2, width + width % 2
        # Without these tags players guess BT.601 for small clips, and colours shift.
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        tracks = open_tracks(container, sounds, "aac")
        for index, image in enumerate(_rgb_images(frames)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        write_tracks(container, tracks)


def _rgb_images(frames: Tensor) -> Iterator[NDArray[np.uint8]]:
    """Frames `[T, 3, H, W]` one by one as `[even H, even W, 3]` bytes: a long clip is never held twice."""
    height, width = frames.shape[-2:]
    for frame in frames:
        image = _bytes(frame)
        rows = torch.arange(height + height % 2).clamp(max=height - 1)
        columns = torch.arange(width + width % 2).clamp(max=width - 1)
        yield image[:, rows][:, :, columns].permute(1, 2, 0).contiguous().numpy()


def _bytes(frame: Tensor) -> Tensor:
    """A frame of [0, 1] as bytes, on the CPU."""
    return frame.float().clamp(0, 1).mul(255).round().to(torch.uint8).cpu()
