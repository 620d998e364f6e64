"""What only Wan does: text folded into few rows, encoding, words; test_contract.py has what every family promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor

from rats_video.backbones.wan import TEXT_LENGTH, WanBackbone
from rats_video.condition import Condition
from rats_video.errors import UserError
from rats_video.seeds import seeded
from rats_video.types import ClipSpec

pytestmark = pytest.mark.pipeline

PROMPTS = ["a fast red circle moving left on a gray background", "a slow green square"]


@pytest.fixture(scope="module")
def pipeline(tiny_wan: Path) -> Any:
    """What a user of diffusers loads from the same folder: nothing of ours in it."""
    pipeline = WanPipeline.from_pretrained(tiny_wan)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def noise(loaded: WanBackbone, clip: ClipSpec) -> Tensor:
    return loaded.sample_noise(2, clip, seeded(3))


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


# --------------------------------------------------------------------------------------------- the stock pipeline


@pytest.mark.parametrize("prompts", [PROMPTS, [""], ["a " * 511], ["a " * 700, "a red circle"]])
def test_text_features_are_the_pipelines(loaded: WanBackbone, pipeline: Any, prompts: list[str]) -> None:
    theirs, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)
    ours = loaded.encode_text(prompts).embeds
    rows = ours.shape[1]
    assert rows == min(TEXT_LENGTH, max(len(prompt.split()) for prompt in prompts) + 2)  # the words, </s> and one zero
    close(ours, theirs[:, :rows], 1e-4)  # 512 tokens are summed in another order
    assert not theirs[:, rows:].any()
    if rows < TEXT_LENGTH:
        assert not ours[:, -1].any()


@pytest.mark.parametrize("prompts", [PROMPTS, ["a " * 510, ""], ["a " * 700, "a red circle"]])
def test_compact_text_equals_all_512_rows(
    loaded: WanBackbone, pipeline: Any, noise: Tensor, prompts: list[str]
) -> None:
    text, sigma = loaded.encode_text(prompts), torch.tensor([0.3, 0.9])
    whole = torch.zeros(2, TEXT_LENGTH, text.embeds.shape[2])
    whole[:, : text.embeds.shape[1]] = text.embeds
    with torch.no_grad():
        theirs = pipeline.transformer(noise, sigma * 1000, whole, return_dict=False)[0]
        close(loaded.velocity(noise, sigma, text), theirs)
        more_zeros = Condition(whole[:, : min(TEXT_LENGTH, text.embeds.shape[1] + 9)])
        close(loaded.velocity(noise, sigma, more_zeros), theirs)  # as guidance pads


def raw(loaded: WanBackbone, latents: Tensor) -> Tensor:
    mean, std = (torch.tensor(loaded.vae.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    return latents * std + mean


def test_stock_decode_has_no_gradient_where_saturated(loaded: WanBackbone, pipeline: Any, noise: Tensor) -> None:
    latents = (4 * noise).requires_grad_()
    stock = pipeline.vae.decode(raw(loaded, latents), return_dict=False)[0]
    (gradient,) = torch.autograd.grad(stock[stock.abs() >= 1].sum(), latents)
    assert not gradient.any()  # why we decode ourselves


def test_encode_is_the_vaes_normalised_mean(loaded: WanBackbone, pipeline: Any) -> None:
    videos = torch.rand(2, 9, 3, 32, 32, generator=seeded(4))
    latents = loaded.encode(videos)
    assert latents.shape == (2, 4, 3, 4, 4)
    with torch.no_grad():
        close(raw(loaded, latents), pipeline.vae.encode(videos.transpose(1, 2) * 2 - 1).latent_dist.mean)
    assert loaded.decode(latents).shape == videos.shape


# ------------------------------------------------------------------------------------------------ shapes and words


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (5, 2), (17, 5), (81, 21)])
def test_latent_shape(loaded: WanBackbone, frames: int, latent_frames: int) -> None:
    assert loaded.latent_shape(ClipSpec(frames, 64, 32, 8.0)) == (4, latent_frames, 8, 4)


def test_no_clip_is_larger_than_the_positions_that_the_model_has(loaded: WanBackbone) -> None:
    assert loaded.denoiser.config.rope_max_seq_len == 32
    assert loaded.latent_shape(ClipSpec(125, 512, 512, 8)) == (4, 32, 64, 64)
    for name, larger, most in (("num_frames", 129, 125), ("height", 528, 512), ("width", 528, 512)):
        size = {"num_frames": 17, "height": 64, "width": 64, name: larger}
        with pytest.raises(UserError, match=rf"^clip\.{name}: {larger} is more than .* \(at most {most}\)$"):
            loaded.latent_shape(ClipSpec(**size, fps=8))


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        (PROMPTS[0], []),
        ("A RED circle", []),
        ("a red zebra on Mars", ["zebra", "Mars"]),
        ("red, circle.", ["red,", "circle."]),
    ],
)
def test_unknown_words(loaded: WanBackbone, prompt: str, unknown: list[str]) -> None:
    assert loaded.unknown_words(prompt) == unknown


def test_denoiser_is_counted_as_the_transformer(loaded: WanBackbone) -> None:
    assert isinstance(loaded.denoiser, WanTransformer3DModel)
    assert loaded.device == torch.device("cpu")
