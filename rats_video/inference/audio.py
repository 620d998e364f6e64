"""The sound of clips as tracks of video files, written and read back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from rats_video.errors import UserError, first_line
from rats_video.reading import DEMUXER_OPTIONS, check_plain_file
from rats_video.sound import Sound

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer, OutputContainer

_BIT_RATE = {"aac": 192_000, "libopus": 96_000}  # a second
_OPUS_RATE = 48_000  # whatever the sound's: FFmpeg resamples
_MOST_SAMPLES = 2**27  # of a track, all channels together: 46 minutes of one channel at 48 kHz


def open_tracks(
    container: OutputContainer, sounds: Mapping[str, Sound], codec: Literal["aac", "libopus"]
) -> list[tuple[AudioStream, Sound]]:
    """Add a track for each sound of one clip, before anything is written; players play the first and show the names."""
    tracks = []
    for name, sound in sounds.items():
        rate = _OPUS_RATE if codec == "libopus" else sound.rate
        stream = container.add_stream(codec, rate=rate, layout=_layout(sound), bit_rate=_BIT_RATE[codec])
        if name:
            stream.metadata.update(title=name, handler_name=name)
        tracks.append((stream, sound))
    return tracks


def write_tracks(container: OutputContainer, tracks: list[tuple[AudioStream, Sound]]) -> None:
    """Encode what `open_tracks` added."""
    for stream, sound in tracks:
        container.mux(stream.encode(sound_frame(sound)))
        container.mux(stream.encode(None))


def sound_frame(sound: Sound) -> AudioFrame:
    """The sound of one clip as FFmpeg takes it; what lies outside [-1, 1] is clipped."""
    import av

    waves = sound.waves[0].detach().float().clamp(-1, 1).cpu().contiguous().numpy()
    frame: AudioFrame = av.AudioFrame.from_ndarray(waves, format="fltp", layout=_layout(sound))
    frame.sample_rate, frame.pts, frame.time_base = sound.rate, 0, Fraction(1, sound.rate)
    return frame


def read_sound(path: Path, track: int = 0) -> Sound | None:
    """The sound of a video file, of one or two channels; None if it has no such track, or is a picture.

    Raises:
        UserError: the file cannot be read, or the track is longer than any clip's.
    """
    import av

    if path.suffix == ".png":
        return None
    try:
        check_plain_file(path)
        with av.open(str(path), options=DEMUXER_OPTIONS) as container:
            if track >= len(container.streams.audio):
                return None
            stream = container.streams.audio[track]
            pieces = [torch.from_numpy(frame.to_ndarray()) for frame in _decoded(container, stream, path)]
            rate = stream.rate
    except (av.error.FFmpegError, OSError, ValueError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot read the sound: {reason}", where=str(path), fix="make the file again") from error
    return Sound(torch.cat(pieces, dim=1)[None], rate) if pieces else None


def _decoded(container: InputContainer, stream: AudioStream, path: Path) -> Iterator[AudioFrame]:
    """The track's frames as floats; of more channels than two, two."""
    import av

    resampler = av.AudioResampler("fltp", "mono" if stream.channels == 1 else "stereo", stream.rate)
    samples = 0
    for frame in container.decode(stream):
        for played in resampler.resample(frame):
            samples += played.samples * len(played.layout.channels)
            if samples > _MOST_SAMPLES:
                raise UserError(f"holds more than {_MOST_SAMPLES} samples of sound", where=str(path), fix="cut it")
            yield played
    yield from resampler.resample(None)


def _layout(sound: Sound) -> str:
    return "mono" if sound.waves.shape[1] == 1 else "stereo"
