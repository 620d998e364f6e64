"""A clip is a function of model, prompt, seed and its place: not of the batch it was sampled in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rats_video.backbones.wan import WanBackbone
from rats_video.inference.sampler import SamplerSpec, clip_noise, sample_videos
from rats_video.types import ClipSpec

SPEC = SamplerSpec(2, 3.0, guidance_scale=2.0)
RENOISE = SamplerSpec(3, 3.0, sampler="renoise")


def sample(
    backbone: WanBackbone, prompts: tuple[str, ...], clip: ClipSpec, *, seed: int, batch_size: int,
    spec: SamplerSpec = SPEC,
) -> Tensor:  # fmt: skip
    parts = list(sample_videos(backbone, prompts, clip, spec, seed=seed, batch_size=batch_size))
    assert [prompt for part in parts for prompt in part.prompts] == list(prompts)
    assert all(part.seconds_per_clip > 0 for part in parts)
    return torch.cat([part.videos for part in parts])


@pytest.fixture
def prompts(captions: tuple[str, ...]) -> tuple[str, ...]:
    return (*captions[:3], "a red circle", "")  # of unequal length: padding must not show


@pytest.mark.parametrize(("batch_size", "spec"), [(1, SPEC), (2, SPEC), (2, RENOISE)])
def test_split_batches_equal_the_whole(
    loaded: WanBackbone, clip: ClipSpec, prompts: tuple[str, ...], batch_size: int, spec: SamplerSpec
) -> None:
    whole = sample(loaded, prompts, clip, seed=1, batch_size=5, spec=spec)
    assert whole.shape == (5, 5, 3, 32, 32)
    parts = sample(loaded, prompts, clip, seed=1, batch_size=batch_size, spec=spec)
    torch.testing.assert_close(parts, whole, atol=2e-6, rtol=0)


def test_seed_repeats_and_differs(loaded: WanBackbone, clip: ClipSpec, prompts: tuple[str, ...]) -> None:
    one, again, other = (sample(loaded, prompts, clip, seed=seed, batch_size=5) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert ((one - other).abs().amax(dim=(1, 2, 3, 4)) > 1e-3).all()


def test_two_models_start_from_the_same_noise(loaded: WanBackbone, clip: ClipSpec) -> None:
    assert torch.equal(clip_noise(loaded, clip, 3, 7), clip_noise(loaded.with_own_denoiser(), clip, 3, 7))
    noises = {float(clip_noise(loaded, clip, seed, index)[0, 0, 0, 0, 0]) for seed in (3, 4) for index in (0, 1, 2)}
    assert len(noises) == 6
