"""`sample` of a model whose clips have sound."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from ltx2_family import LTX23
from PIL import Image
from shared import made_once

from rats_video.backbones.kinds import load_backbone
from rats_video.diffusion.rollout import rollout
from rats_video.inference.sampler import clip_noise
from rats_video.types import ClipSpec

pytestmark = pytest.mark.pipeline

PROMPT = "a fast red circle"
SIZE = ("--num-frames", 17, "--height", 64, "--width", 64, "--seed", 7)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, LTX23.name, LTX23.build)


def low(wave: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Its part below 4 kHz: a random vocoder hisses, and AAC keeps no hiss."""
    spectrum = np.fft.rfft(wave)
    spectrum[np.fft.rfftfreq(len(wave), 1 / 48000) > 4000] = 0
    return np.fft.irfft(spectrum)


def heard(path: Path) -> tuple[np.ndarray[Any, Any], int, float]:
    """Samples `[channels, samples]`, their rate, and the seconds of pictures."""
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        assert video.average_rate is not None
        seconds = float(video.frames / video.average_rate)
        pieces = [frame.to_ndarray() for frame in container.decode(audio=0)]
        return np.concatenate(pieces, axis=1), container.streams.audio[0].rate, seconds


@torch.no_grad()
def test_an_mp4_with_the_sound_of_its_latents(command: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    options = (*SIZE, "--guidance-scale", 3, "--nfe", 6, "--output", tmp_path)
    code, out, err = command("sample", "--model", model, "--prompt", PROMPT, *options)
    assert code == 0, err
    assert out.startswith("1 clip at 6 NFE")  # two steps: text guidance is two calls, modality guidance one
    (row,) = json.loads((tmp_path / "manifest.json").read_text())
    assert row["num_steps"] == 2
    waves, rate, seconds = heard(tmp_path / row["file"])
    assert (rate, seconds) == (48000, pytest.approx(17 / 24))
    assert waves.shape[1] / rate == pytest.approx(seconds, abs=0.06)

    backbone, clip = load_backbone(model), ClipSpec(17, 64, 64, 24.0)
    backbone.fps = clip.fps
    further = backbone.further_guidance({"transformer": dict(backbone.denoiser.config)})
    assert further is not None
    assert (further.calls, further.audio_scale, further.rescale) == (1, 7.0, 0.7)
    (shift,) = backbone.stated(json.loads((model / "scheduler" / "scheduler_config.json").read_text()), clip).values()
    made = rollout(
        backbone.velocity, clip_noise(backbone, clip, 7, 0), backbone.sigmas(2, shift),
        backbone.encode_text([PROMPT]), negative=backbone.encode_text([""]), guidance_scale=3.0,
        guide=backbone.guidance(further),
    )  # fmt: skip
    sound = backbone.decode_sound(made.x0)
    assert sound is not None
    for ours, theirs in zip(sound.waves[0].clamp(-1, 1).numpy(), waves, strict=True):
        assert np.corrcoef(low(ours), low(theirs[: len(ours)]))[0, 1] > 0.9


def test_a_clip_from_a_picture_has_sound_too(command: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    options = (*SIZE, "--guidance-scale", 1, "--nfe", 2, "--image", tmp_path / "a.png", "--output", tmp_path / "out")
    code, _, err = command("sample", "--model", model, "--prompt", PROMPT, *options)
    assert code == 0, err
    (row,) = json.loads((tmp_path / "out" / "manifest.json").read_text())
    waves, _, _ = heard(tmp_path / "out" / row["file"])
    assert waves.std() > 0.01


def test_guidance_of_three_calls_divides_the_nfe(command: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    code, _, err = command(
        "sample", "--model", model, "--prompt", PROMPT, *SIZE, "--nfe", 4, "--output", tmp_path / "o"
    )
    line = "error: --nfe 4: guidance takes three calls a step (give a multiple of 3)"
    assert (code, err.strip().splitlines()[-1]) == (2, line)
