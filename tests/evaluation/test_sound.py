"""Monitors of sound: known loudness, clipping and silence."""

from __future__ import annotations

import math

import pytest
import torch
from sounds import tone

from rats_video.evaluation.sets import fill_sets
from rats_video.evaluation.sound import SoundMeasure, clipped_sound, loudness, silence
from rats_video.evaluation.sweep import ArmScores
from rats_video.inference.sampler import SamplerSpec
from rats_video.sound import Sound


@pytest.mark.parametrize("rate", [16_000, 24_000, 48_000])
def test_loudness_of_the_standards_tone(rate: int) -> None:
    """A sine of 997 Hz at 0 dBFS in one channel is -3.01 LUFS (BS.1770-4, annex 1), in two channels 0."""
    assert float(loudness(tone(997, 2.0, rate, 1, level=1.0))) == pytest.approx(-3.01, abs=0.06)
    both = torch.cat([tone(997, 2.0, rate, level=10 ** (-23 / 20)).waves, tone(997, 2.0, rate, level=0.1).waves])
    assert loudness(Sound(both, rate)).tolist() == pytest.approx([-23.0, -20.0], abs=0.06)


def test_the_gate_leaves_silence_out() -> None:
    """Without the gate, four fifths of silence would cost 7 LU."""
    loud = tone(997, 2.0, level=0.1)
    silent = torch.zeros(1, 2, 8 * 48_000)
    assert float(loudness(Sound(torch.cat([loud.waves, silent], dim=2), 48_000))) == pytest.approx(-20, abs=0.5)


def test_silence_and_a_sound_shorter_than_a_block() -> None:
    assert float(loudness(Sound(torch.zeros(1, 2, 48_000), 48_000))) == -70
    for seconds in (0.1, 0.39, 0.4, 0.55, 0.708):
        assert float(loudness(tone(1000, seconds, level=0.1))) == pytest.approx(-20, abs=0.1)


def test_clipped_samples_are_counted() -> None:
    waves = torch.tensor([[[1.0, 0.5, -1.0, 0.2], [0.1, 0.9999, 1.7, 0.0]]])
    assert float(clipped_sound(Sound(waves, 4))) == 3 / 8
    assert float(clipped_sound(tone(100, 1.0, level=0.9))) == 0


def test_silence_is_a_share_of_time() -> None:
    waves = torch.cat([tone(1000, 0.5, level=0.1).waves, torch.zeros(1, 2, 72_000)], dim=2)
    waves[..., 60_000:] += 5e-4  # of -66 dBFS
    assert float(silence(Sound(waves, 48_000))) == pytest.approx(0.75)


def test_a_clip_that_is_not_finite_has_no_value_and_spoils_no_other() -> None:
    waves = tone(1000, 1.0, level=0.1).waves.repeat(2, 1, 1)
    waves[0, 0, 7] = math.inf
    found = SoundMeasure()(torch.zeros(2, 1, 3, 1, 1), ["a", "b"], Sound(waves, 48_000))
    assert all(math.isnan(float(values[0])) for values in found.values())
    assert [round(float(found[name][1]), 1) for name in ("loudness", "clipped_sound", "silence")] == [-20.0, 0.0, 0.0]
    assert SoundMeasure()(torch.zeros(2, 1, 3, 1, 1), ["a", "b"]) == {}


def test_tables_have_the_difference_to_the_teachers_sound() -> None:
    def arm(name: str, *values: float) -> ArmScores:
        return ArmScores(name, SamplerSpec(4, 3.0), ["a", "b"], [1.0, 1.0], {"loudness": list(values)})

    teacher, student = arm("teacher", -20, -24), arm("student", -12, -18)
    fill_sets([teacher, student], None)
    assert student.sets["loudness_difference"].mean == 7
    assert student.row().metrics["loudness"].mean == -15
    assert teacher.sets["loudness_difference"].mean == 0
