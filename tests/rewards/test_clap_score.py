"""CLAP score: the spectrogram and the score of transformers' own, with gradient, of clips' sound."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shared import made_once
from tiny_clap import save_clap
from torch import Tensor

from rats_video.errors import UserError
from rats_video.rewards.clap_score import ClapReward, ClapScoreConfig, fill, resample, spectrogram
from rats_video.rewards.reward import build_reward, check_reward_prompts
from rats_video.rewards.self_test import self_test
from rats_video.seeds import seeded
from rats_video.sound import Sound
from rats_video.types import ClipSpec

pytestmark = pytest.mark.pipeline

PROMPTS = ["a dog barks", "rain on a roof"]
CPU = torch.device("cpu")
NOTHING = torch.zeros(2, 1, 3, 1, 1)  # the pixels of a reward that does not see


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "clap", save_clap)


def clap(folder: Path, **options: Any) -> ClapReward:
    reward = build_reward(ClapScoreConfig(kind="clap_score", path=str(folder), **options), CPU, where="reward")
    assert isinstance(reward, ClapReward)
    return reward


def sounds(seconds: float, rate: int = 48_000, channels: int = 1) -> Tensor:
    """Two chords with noise `[2, channels, samples]`."""
    time = torch.arange(round(seconds * rate)) / rate
    waves = torch.stack([torch.sin(2 * math.pi * tone * time) * torch.sin(3 * time) for tone in (440, 1760)])
    noise = torch.randn(2, channels, len(time), generator=seeded(1))
    return 0.3 * waves[:, None] + 0.05 * noise


def extracted(waves: Tensor) -> Tensor:
    """transformers' features of mono waves of 48 kHz."""
    from transformers import ClapFeatureExtractor

    extractor = ClapFeatureExtractor(truncation="rand_trunc", padding="repeatpad")
    return extractor(list(waves.numpy()), sampling_rate=48_000, return_tensors="pt").input_features[:, 0]


@pytest.mark.parametrize("seconds", [0.7, 3.0, 5.04, 10.0])
def test_spectrogram_is_the_feature_extractors(folder: Path, seconds: float) -> None:
    waves = sounds(seconds)[:, 0]
    ours = spectrogram(fill(waves, 480_000), clap(folder).bank)
    theirs = extracted(waves)
    assert theirs.std() > 5  # decibels
    torch.testing.assert_close(ours, theirs.float(), atol=0.02, rtol=0)


@torch.no_grad()
def test_score_is_transformers_cosine(folder: Path) -> None:
    from transformers import AutoTokenizer, ClapModel

    waves = sounds(3.0, channels=2)
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    model = ClapModel.from_pretrained(folder)
    theirs = model(**tokens, input_features=extracted(waves.mean(dim=1))[:, None].float())
    cosines = (theirs.audio_embeds * theirs.text_embeds).sum(dim=-1)
    ours = clap(folder)(NOTHING, PROMPTS, Sound(waves, 48_000))
    assert (cosines[0] - cosines[1]).abs() > 0.01
    torch.testing.assert_close(ours.clip, cosines, atol=1e-4, rtol=0)
    assert ours.judged == {"audio": ours.clip}
    assert ours.frames is None


@torch.no_grad()
def test_each_clip_and_its_prompt_alone_in_chunks_as_in_one(folder: Path) -> None:
    waves = sounds(1.0)
    together = clap(folder, chunk=1)(NOTHING, PROMPTS, Sound(waves, 48_000)).clip
    alone = clap(folder)(NOTHING[:1], PROMPTS[1:], Sound(waves[1:], 48_000)).clip
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=0)
    swapped = clap(folder)(NOTHING, PROMPTS[::-1], Sound(waves, 48_000)).clip
    assert (swapped - together).abs().min() > 1e-3


def test_gradient_is_that_of_finite_differences(folder: Path) -> None:
    reward, waves = clap(folder).double(), sounds(1.0).double()[:1]
    direction = torch.randn(waves.shape, generator=seeded(2)).double()

    def score(waves: Tensor) -> Tensor:
        return reward.score_waves(fill(waves.mean(dim=1), 480_000), reward.condition(PROMPTS[:1])).sum()

    (gradient,) = torch.autograd.grad(score(waves.requires_grad_()), waves)
    assert (gradient.abs() > 0).float().mean() > 0.99
    with torch.no_grad():
        slope = (score(waves + 1e-4 * direction) - score(waves - 1e-4 * direction)) / 2e-4
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=0.02)


def test_another_rate_is_the_same_sound() -> None:
    def tones(samples: int, rate: int) -> Tensor:
        time = torch.arange(samples, dtype=torch.float64) / rate
        return torch.stack([torch.sin(2 * math.pi * tone * time) for tone in (50.0, 440.0, 9000.0)])

    wave, finer = tones(24_000, 24_000), tones(48_000, 48_000)  # whole periods
    torch.testing.assert_close(resample(wave, 24_000, 48_000), finer, atol=1e-9, rtol=0)
    torch.testing.assert_close(resample(finer, 48_000, 24_000), wave, atol=1e-9, rtol=0)
    odd, theirs = resample(tones(23_999, 24_000), 24_000, 16_000), tones(15_999, 16_000)
    assert odd.shape == theirs.shape
    assert np.corrcoef(odd[1, 100:-100], theirs[1, 100:-100])[0, 1] > 0.999


def test_a_long_sound_is_heard_in_its_middle() -> None:
    waves = torch.arange(14.0)[None]
    assert fill(waves, 10).tolist() == [[2.0, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
    assert fill(waves[:, :3], 10).tolist() == [[0.0, 1, 2, 0, 1, 2, 0, 1, 2, 0]]


def test_it_passes_the_test_before_a_run(folder: Path) -> None:
    found = self_test(clap(folder), ClipSpec(9, 32, 32, 8.0), PROMPTS, where="reward")
    found.require_loss()
    assert found.gradient is not None
    assert found.gradient.shape == (2, 9)  # a stretch of the sound each frame


def test_a_fused_model_is_refused(tmp_path: Path) -> None:
    save_clap(tmp_path, fused=True)
    line = r": fuses cuts of a sound that it draws at random: [^\n]* \(give an unfused one, such as laion/clap-htsat-"
    with pytest.raises(UserError, match=line):
        clap(tmp_path)


def test_long_prompts_are_cut_with_one_warning(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_reward_prompts(clap(folder), ["a dog", "a dog barks at the rain for ever and ever"])
    assert capsys.readouterr().err == "warning: 1 of 2 prompts are longer than the 32 tokens this reward reads\n"


def test_pixels_alone_are_refused() -> None:
    from rats_video.methods.scoring import score_pixels

    class Hearing:
        hears = True

    with pytest.raises(UserError, match=r"^reward: hears clips, and these have no sound"):
        score_pixels(Hearing(), torch.zeros(1, 2, 3, 4, 4), ["a"])  # type: ignore[arg-type]
