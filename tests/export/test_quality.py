"""What eight bits cost, measured with the sound of clips that have one."""

from __future__ import annotations

import pytest
import torch
from sounds import tone

from rats_video.evaluation.sound import SoundMeasure
from rats_video.export.base import Clips
from rats_video.export.quality import score


def test_measures_that_hear_are_given_each_clips_sound() -> None:
    clips = Clips(torch.rand(2, 3, 3, 8, 8), torch.zeros(2, 4), (tone(997, 1.0, level=0.1), tone(997, 1.0, level=0.2)))
    scores = score([SoundMeasure()], clips, ["a", "b"], torch.device("cpu"))
    assert scores["loudness"] == pytest.approx([-20.0, -13.98], abs=0.1)
    silent = score([SoundMeasure()], Clips(clips.videos, clips.latents), ["a", "b"], torch.device("cpu"))
    assert silent == {}
