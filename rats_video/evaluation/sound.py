"""Measures of clips' sound: how loud it is, how much is clipped, how much is silence, and if it fits what is seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from rats_video.inference.audio import sound_frame
from rats_video.rewards.av_sync import av_align
from rats_video.sound import Sound

LOUDNESS, CLIPPED, SILENCE = "loudness", "clipped_sound", "silence"
MONITORS = (LOUDNESS, CLIPPED, SILENCE)
ALIGNED = "av_align"
_SHORTEST = 0.4  # seconds of one block of BS.1770
_FULL = 1 - 2.0**-15  # one step of 16 bits below the end
_WINDOW, _QUIET = 0.05, 1e-3  # seconds; root mean square of -60 dBFS


class SoundMeasure:
    """The monitors of clips with sound as a `Measure`; nothing of clips that have none."""

    hears = True

    def __call__(self, videos: Tensor, prompts: Sequence[str], sound: Sound | None = None) -> dict[str, Tensor]:  # noqa: ARG002
        """Values `[B]` by name; NaN of a sound that is not finite."""
        if sound is None:
            return {}
        found = {LOUDNESS: loudness(sound), CLIPPED: clipped_sound(sound), SILENCE: silence(sound)}
        return {name: values.cpu().masked_fill(_broken(sound.waves), math.nan) for name, values in found.items()}


class AlignMeasure:
    """`av_align` of clips with sound as a `Measure`; nothing of clips that have none, or too few frames."""

    hears = True

    def __call__(self, videos: Tensor, prompts: Sequence[str], sound: Sound | None = None) -> dict[str, Tensor]:  # noqa: ARG002
        """Values `[B]`; NaN where pixels or sound are not finite."""
        if sound is None or videos.shape[1] < 3:
            return {}
        found = av_align(videos.nan_to_num(), Sound(sound.waves.nan_to_num(), sound.rate))
        return {ALIGNED: found.masked_fill(_broken(sound.waves) | _broken(videos), math.nan)}


def loudness(sound: Sound) -> Tensor:
    """Integrated loudness `[B]` in LUFS: ITU-R BS.1770 with both gates, by FFmpeg's `ebur128`; silence is -70.

    A sound shorter than the 0.4 s of the standard's block is repeated until it fills one.
    """
    return torch.tensor([_integrated(sound.one(row)) for row in range(len(sound.waves))])


def clipped_sound(sound: Sound) -> Tensor:
    """Share `[B]` of samples at either end of the range, within one step of 16 bits."""
    return (sound.waves.abs() >= _FULL).float().mean(dim=(1, 2))


def silence(sound: Sound) -> Tensor:
    """Share `[B]` of windows of 50 ms whose root mean square over all channels is below -60 dBFS."""
    size = min(sound.waves.shape[2], round(_WINDOW * sound.rate))
    power = sound.waves.float().unfold(2, size, size).square().mean(dim=(1, 3))
    return (power.sqrt() < _QUIET).float().mean(dim=1)


def _broken(values: Tensor) -> Tensor:
    """Which clips hold what is not finite, `[B]`, in host memory."""
    return ~values.isfinite().flatten(1).all(dim=1).cpu()


def _integrated(sound: Sound) -> float:
    import av

    repeats = math.ceil(_SHORTEST * sound.rate / sound.waves.shape[2])
    frame = sound_frame(Sound(sound.waves.nan_to_num().repeat(1, 1, repeats), sound.rate))
    graph = av.filter.Graph()
    source = graph.add_abuffer(
        sample_rate=sound.rate, format=frame.format.name, layout=frame.layout.name, time_base=Fraction(1, sound.rate)
    )
    graph.link_nodes(source, graph.add("ebur128", "metadata=1"), graph.add("abuffersink")).configure()
    graph.push(frame)
    graph.push(None)
    found = -70.0
    while True:
        try:
            found = float(graph.pull().metadata.get("lavfi.r128.I", found))  # the last, shorter part has none
        except av.error.EOFError:
            return found
