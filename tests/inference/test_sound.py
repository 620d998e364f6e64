"""Clips with sound as mp4, decoded again."""

from __future__ import annotations

import math
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rats_video.errors import UserError
from rats_video.inference.video import read_mp4, write_mp4
from rats_video.seeds import seeded
from rats_video.sound import Sound


def tones(channels: int, rate: int, seconds: float) -> Sound:
    """A tone that grows louder, another one a channel."""
    time = torch.arange(round(rate * seconds)) / rate
    waves = [
        0.8 * time / seconds * torch.sin(2 * math.pi * (330 + 220 * channel) * time) for channel in range(channels)
    ]
    return Sound(torch.stack(waves)[None], rate)


def read_sound(path: Path) -> tuple[NDArray[np.float32], int, str]:
    """Samples `[channels, samples]`, rate and codec."""
    with av.open(str(path)) as container:
        (stream,) = container.streams.audio
        assert stream.codec_context is not None
        pieces = [frame.to_ndarray() for frame in container.decode(stream)]
        return np.concatenate(pieces, axis=1), stream.codec_context.sample_rate, stream.codec_context.name


@pytest.mark.parametrize(("channels", "rate"), [(2, 24000), (2, 48000), (1, 16000)])
def test_sound_comes_back_in_step(tmp_path: Path, channels: int, rate: int) -> None:
    frames, sound = torch.rand(25, 3, 32, 48, generator=seeded(1)), tones(channels, rate, 1.0)
    write_mp4(frames, tmp_path / "a.mp4", fps=25.0, sound=sound)
    heard, heard_rate, codec = read_sound(tmp_path / "a.mp4")
    assert (heard_rate, codec, heard.shape[0]) == (rate, "aac", channels)
    assert heard.shape[1] / rate == pytest.approx(1.0, abs=1024 / rate)  # AAC ends on a whole packet
    for ours, theirs in zip(sound.waves[0].numpy(), heard, strict=True):
        assert np.corrcoef(ours, theirs[: len(ours)])[0, 1] > 0.99  # at no delay
        assert theirs.std() == pytest.approx(ours.std(), rel=0.1)
    again, fps = read_mp4(tmp_path / "a.mp4")
    assert (len(again), fps) == (25, 25.0)


def test_the_same_clip_is_the_same_bytes(tmp_path: Path) -> None:
    frames = torch.rand(9, 3, 32, 48, generator=seeded(1))
    for name in "ab":
        write_mp4(frames, tmp_path / f"{name}.mp4", fps=8.0, sound=tones(2, 24000, 1.1))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_diverged_sound_is_one_line(tmp_path: Path) -> None:
    sound = tones(2, 24000, 0.1)
    sound.waves[0, 1, 7] = math.nan
    with pytest.raises(UserError, match=r"a\.mp4: the sound holds NaN or infinity \(the model diverged: "):
        write_mp4(torch.rand(3, 3, 32, 48), tmp_path / "a.mp4", fps=25.0, sound=sound)
    assert not list(tmp_path.iterdir())
