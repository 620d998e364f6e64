"""Tracks of video files: of several sounds by name, and read back."""

from __future__ import annotations

from pathlib import Path

import av
import pytest
import torch
from sounds import pitch, tone

from rats_video.errors import UserError
from rats_video.inference.audio import read_sound
from rats_video.inference.panel import Panel, with_tracks
from rats_video.inference.video import write_mp4, write_png
from rats_video.seeds import seeded

FRAMES = torch.rand(9, 3, 32, 48, generator=seeded(1))


def test_each_sound_is_a_track_under_its_name(tmp_path: Path) -> None:
    sounds = {"student": tone(880, 1.1), "teacher": tone(440, 1.1, 24_000, 1)}
    write_mp4(FRAMES, tmp_path / "a.mp4", fps=8.0, sound=sounds)
    with av.open(str(tmp_path / "a.mp4")) as container:
        tracks = container.streams.audio
        assert [track.metadata["handler_name"] for track in tracks] == ["student", "teacher"]
        assert [bool(track.disposition & av.stream.Disposition.default) for track in tracks] == [True, False]
    for track, (hz, rate, channels) in enumerate([(880, 48_000, 2), (440, 24_000, 1)]):
        sound = read_sound(tmp_path / "a.mp4", track)
        assert sound is not None
        assert (sound.rate, sound.waves.shape[:2]) == (rate, (1, channels))
        assert pitch(sound) == pytest.approx(hz, abs=1)
        assert float(sound.waves.abs().max()) == pytest.approx(0.3, abs=0.02)
    assert read_sound(tmp_path / "a.mp4", 2) is None


def test_a_silent_file_and_a_picture_have_no_sound(tmp_path: Path) -> None:
    write_mp4(FRAMES, tmp_path / "a.mp4", fps=8.0)
    write_png(FRAMES[0], tmp_path / "a.png")
    assert read_sound(tmp_path / "a.mp4") is None
    assert read_sound(tmp_path / "a.png") is None


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"not a video" * 100)
    with pytest.raises(UserError, match=r"a\.mp4: cannot read the sound: Invalid data found"):
        read_sound(tmp_path / "a.mp4")


def test_the_last_panels_sound_plays_and_each_panel_says_its_track() -> None:
    sounds = [tone(hz, 0.1) for hz in (440, 880, 1760)]
    names = ("teacher", "base", "student")
    panels = [Panel(name, FRAMES, 4, 4, 1.0, None, sound) for name, sound in zip(names, sounds, strict=True)]
    told, tracks = with_tracks([Panel("given", FRAMES), *panels])
    assert list(tracks.items()) == [("student", sounds[2]), ("teacher", sounds[0]), ("base", sounds[1])]
    assert [panel.track for panel in told] == [None, 2, 3, 1]
    assert told[3].stats == "4 steps · 4 NFE · 1.00 s · sound: track 1"
    assert with_tracks([Panel("student", FRAMES, 4, 4, 1.0)]) == ([Panel("student", FRAMES, 4, 4, 1.0)], {})
