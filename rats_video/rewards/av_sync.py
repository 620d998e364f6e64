"""Synchrony of pictures and sound: what is seen to happen against what is heard to happen, without any network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from rats_video.config.fields import PositiveFloat
from rats_video.errors import UserError
from rats_video.rewards.base import BaseRewardConfig, RewardContext
from rats_video.sound import Sound
from rats_video.types import RewardScores

_HOP, _WINDOW = 0.01, 0.032  # seconds of the spectrogram
_COMPRESSION = 100.0  # of magnitudes, where a full sine is 0.5: a thousandth of it hardly counts
_KNEE = 1e-3  # mean change of a pixel over which a rise bends, so that falls keep some slope
_FLOOR = 1e-6  # of a variance: what hardly changes has no onsets
_LEAST = 0.07  # of the strongest onset, above the mean around it, as librosa picks peaks


class AvSyncConfig(BaseRewardConfig):
    """Synchrony of sound and pictures: correlation of onsets, -1 to 1; 0 if silent or still. Prompts are not read."""

    per = "clip"
    source = "no weights"
    hears = True
    folders = ()

    kind: Literal["av_sync"]
    tolerance: PositiveFloat = Field(0.04, description="seconds that sound may be early or late at little loss")

    def build(self, context: RewardContext) -> AvSyncReward:  # noqa: ARG002
        """The measure as a reward."""
        return AvSyncReward(self.tolerance)

    def on_meta(self, context: RewardContext) -> AvSyncReward:
        """The same: it has no weights."""
        return self.build(context)


@dataclass(frozen=True)
class AvSyncReward:
    """`av_sync` of each clip. It judges the pictures and the sound alike: either may be brought to the other."""

    tolerance: float
    hears = True

    def __call__(self, videos: Tensor, prompts: Sequence[str], sound: Sound | None = None) -> RewardScores:  # noqa: ARG002  # not read
        """Score clips `[B, T, 3, height, width]` and their sound; raises UserError for clips of fewer than 3 frames."""
        assert sound is not None, "whoever hears is given the sound"
        clip = av_sync(videos, sound, self.tolerance)
        return RewardScores(clip, judged={"video": clip, "audio": clip})


def av_sync(videos: Tensor, sound: Sound, tolerance: float = 0.04) -> Tensor:
    """Correlation `[B]` in [-1, 1] of onsets that are seen with onsets that are heard; differentiable in both.

    Both are envelopes of onset strength, as beat trackers have them (spectral flux: Dixon 2006, "Onset Detection
    Revisited"; of the pictures the rise of the change from frame to frame), smoothed by a Gaussian of `tolerance`
    seconds and compared at the times of the frames, without lag. A clip that is silent or stands still has no onset and
    scores 0. The sound is taken to last as long as the pictures.
    """
    seen, heard = picture_onsets(videos), sound_onsets(sound)
    times = torch.arange(videos.shape[1], device=videos.device) + 0.0  # in frames
    a_frame = sound.waves.shape[2] / sound.rate / videos.shape[1]
    places = torch.arange(heard.shape[1], device=heard.device) * _HOP / a_frame
    rows = [
        _centred(onsets @ _gaussian(own, times, tolerance / a_frame).to(onsets))
        for onsets, own in ((seen, times), (heard, places))
    ]
    together, *apart = (rows[0] * rows[1]).mean(dim=1), *(row.square().mean(dim=1) + _FLOOR for row in rows)
    score: Tensor = together / (apart[0] * apart[1]).sqrt()
    return score


def av_align(videos: Tensor, sound: Sound) -> Tensor:
    """AV-Align `[B]` in [0, 1]: the onsets seen and heard within a frame of each other, over all onsets.

    Yariv et al. 2023, "Diverse and Aligned Audio-to-Video Generation via Text-to-Video Model Adaptation" (arXiv
    2309.16429): intersection over union of two lists of peaks. Theirs are librosa's onsets and all maxima of the mean
    optical flow; ours are peaks of `sound_onsets` and `picture_onsets` that stand out by librosa's threshold: flashes
    count too, and grain does not. A clip without any onset scores 0.
    """
    a_frame = sound.waves.shape[2] / sound.rate / videos.shape[1]
    scores = []
    for seen, heard in zip(picture_onsets(videos).cpu(), sound_onsets(sound).cpu(), strict=True):
        left = [place * a_frame for place in _peaks(seen, around=3)]
        both, heard_times = 0, [place * _HOP for place in _peaks(heard, around=round(0.1 / _HOP))]
        total = len(left) + len(heard_times)
        for time in heard_times:
            if near := [other for other in left if abs(other - time) <= a_frame]:
                left.remove(min(near, key=lambda other: abs(other - time)))  # used at once
                both += 1
        scores.append(both / (total - both) if total else 0.0)
    return torch.tensor(scores)


def picture_onsets(videos: Tensor) -> Tensor:
    """Onset strength `[B, T]` of clips `[B, T, 3, height, width]`: how much more the pixels change than a frame before.

    Raises:
        UserError: there are fewer than three frames.
    """
    if videos.shape[1] < 3:
        raise UserError(f"clips of {videos.shape[1]} frames have no onset to see", fix="at least 3 frames")
    change = videos.float().diff(dim=1).abs().mean(dim=(2, 3, 4))
    rise = F.pad(change[:, None], (2, 0), mode="replicate")[:, 0].diff(dim=1)
    return _KNEE * (F.softplus(rise / _KNEE) - math.log(2))  # 0 where nothing changes


def sound_onsets(sound: Sound) -> Tensor:
    """Onset strength `[B, N]`, every 10 ms: mean rise of the compressed spectrum, over its bins (spectral flux)."""
    waves, size = sound.waves.float().mean(dim=1), 2 * round(_WINDOW * sound.rate / 2)
    window = torch.hann_window(size, device=waves.device)
    waves = F.pad(waves, (0, max(0, size - waves.shape[1])))
    spectrum = torch.stft(waves, size, round(_HOP * sound.rate), window=window, return_complex=True).abs()
    compressed = (1 + _COMPRESSION * spectrum / window.sum()).log()
    return F.pad(compressed.diff(dim=2).clamp(min=0).mean(dim=1), (1, 0))


def _gaussian(places: Tensor, times: Tensor, width: float) -> Tensor:
    """Weights `[places, times]` of onsets at `places` for an envelope at `times`."""
    return (-0.5 * ((places[:, None] - times[None]) / width).square()).exp()


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(dim=1, keepdim=True)


def _peaks(onsets: Tensor, around: int) -> list[int]:
    """Where onsets `[N]` are highest among their neighbours and stand out of the mean `around` places to each side."""
    strength = onsets / onsets.max().clamp(min=_KNEE)
    mean = F.avg_pool1d(strength[None, None], 2 * around + 1, 1, around, count_include_pad=False)[0, 0]
    padded = F.pad(strength, (1, 1), value=-1.0)
    is_peak = (strength > padded[:-2]) & (strength >= padded[2:]) & (strength >= mean + _LEAST)
    return [int(place) for place in is_peak.nonzero().flatten()]
