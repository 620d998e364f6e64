"""The Wan adapter against the stock pipeline: same samples, same text features, same pixels; and its own promises."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor

from rats_video.backbones.wan import TEXT_LENGTH, WanBackbone
from rats_video.diffusion.rollout import rollout
from rats_video.diffusion.schedule import sigma_grid
from rats_video.errors import UserError
from rats_video.seeds import seeded
from rats_video.types import ClipSpec, TextCondition

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


@pytest.mark.parametrize(("num_steps", "scale"), [(1, 1.0), (4, 1.0), (4, 3.0)])
def test_samples_are_the_pipelines(
    loaded: WanBackbone, pipeline: Any, noise: Tensor, num_steps: int, scale: float
) -> None:
    options = {"num_inference_steps": num_steps, "guidance_scale": scale, "height": 32, "width": 32, "num_frames": 5}
    theirs = pipeline(PROMPTS, latents=noise, output_type="latent", **options).frames
    with torch.no_grad():
        path = rollout(
            loaded.velocity, noise, sigma_grid(num_steps, 3.0), loaded.encode_text(PROMPTS),
            negative=loaded.encode_text([""]), guidance_scale=scale,
        )  # fmt: skip
        videos = loaded.decode(path.x0)
    assert theirs.std() > 0.3
    close(path.x0, theirs)
    if num_steps == 4:
        close(videos, pipeline(PROMPTS, latents=noise, output_type="pt", **options).frames)


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
        more_zeros = TextCondition(whole[:, : min(TEXT_LENGTH, text.embeds.shape[1] + 9)])
        close(loaded.velocity(noise, sigma, more_zeros), theirs)  # as guidance pads


def test_the_prompt_matters(loaded: WanBackbone, noise: Tensor) -> None:
    with torch.no_grad():
        one, other = (
            loaded.velocity(noise, torch.full((2,), 0.5), loaded.encode_text([p, p])) for p in ("a red circle", "")
        )
    assert (one - other).abs().max() > 1e-3


def raw(loaded: WanBackbone, latents: Tensor) -> Tensor:
    mean, std = (torch.tensor(loaded.vae.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    return latents * std + mean


def test_decode_is_the_vaes_after_its_clamp(loaded: WanBackbone, pipeline: Any, noise: Tensor) -> None:
    with torch.no_grad():
        ours = loaded.decode(4 * noise)
        theirs = pipeline.vae.decode(raw(loaded, 4 * noise), return_dict=False)[0].transpose(1, 2) / 2 + 0.5
    assert ours.shape == (2, 5, 3, 32, 32)
    assert 0.001 < (theirs <= 0).float().mean() + (theirs >= 1).float().mean() < 0.9
    close(ours, theirs)
    assert ours.min() >= 0
    assert ours.max() <= 1


def test_saturated_pixels_carry_gradient(loaded: WanBackbone, pipeline: Any, noise: Tensor) -> None:
    latents = (4 * noise).requires_grad_()
    videos = loaded.decode(latents)
    saturated = (videos <= 0) | (videos >= 1)
    (ours,) = torch.autograd.grad(videos[saturated].sum(), latents)
    assert ours.abs().max() > 1e-4
    stock = pipeline.vae.decode(raw(loaded, latents), return_dict=False)[0].transpose(1, 2)
    (theirs,) = torch.autograd.grad(stock[stock.abs() >= 1].sum(), latents)
    assert not theirs.any()  # why we decode ourselves


def test_encode_is_the_vaes_normalised_mean(loaded: WanBackbone, pipeline: Any) -> None:
    videos = torch.rand(2, 9, 3, 32, 32, generator=seeded(4))
    latents = loaded.encode(videos)
    assert latents.shape == (2, 4, 3, 4, 4)
    with torch.no_grad():
        close(raw(loaded, latents), pipeline.vae.encode(videos.transpose(1, 2) * 2 - 1).latent_dist.mean)
    assert loaded.decode(latents).shape == videos.shape


def test_decode_is_causal(loaded: WanBackbone) -> None:
    latents = torch.randn(1, 4, 4, 2, 2, generator=seeded(5))
    with torch.no_grad():
        before = loaded.decode(latents)
        assert before.shape[1] == 13
        for changed in range(4):
            other = latents.clone()
            other[:, :, changed] += 1
            differs = (loaded.decode(other) != before).flatten(2).any(2)[0].tolist()
            assert differs == [(frame + 3) // 4 >= changed for frame in range(13)]


# ------------------------------------------------------------------------------------------------- shapes and noise


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (5, 2), (17, 5), (81, 21)])
def test_latent_shape(loaded: WanBackbone, frames: int, latent_frames: int) -> None:
    assert loaded.latent_shape(ClipSpec(frames, 64, 32, 8.0)) == (4, latent_frames, 8, 4)


@pytest.mark.parametrize(
    ("size", "line"),
    [
        ((4, 32, 32), "clip.num_frames: num_frames must be 1 + a multiple of 4, got 4"),
        ((5, 40, 32), "clip.height: must be a multiple of 16, got 40"),
        ((5, 32, 8), "clip.width: must be a multiple of 16, got 8"),
    ],
)
def test_clip_that_does_not_divide(loaded: WanBackbone, size: tuple[int, int, int], line: str) -> None:
    with pytest.raises(UserError) as caught:
        loaded.latent_shape(ClipSpec(*size, 8.0))
    assert str(caught.value) == line


def test_noise_is_standard_and_seeded(loaded: WanBackbone) -> None:
    big = ClipSpec(17, 64, 64, 8.0)
    noise = loaded.sample_noise(8, big, seeded(1))
    assert noise.shape == (8, 4, 5, 8, 8)
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    assert torch.equal(noise, loaded.sample_noise(8, big, seeded(1)))


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


# ---------------------------------------------------------------------------------------------------------- loading


def test_twin_has_its_own_denoiser_and_shares_the_rest(loaded: WanBackbone) -> None:
    twin = loaded.twin()
    assert twin.vae is loaded.vae
    assert twin.parts["text_encoder"] is loaded.parts["text_encoder"]
    before = loaded.denoiser.proj_out.weight.clone()
    with torch.no_grad():
        assert torch.equal(twin.denoiser.proj_out.weight, before)
        twin.denoiser.proj_out.weight.zero_()
    assert torch.equal(loaded.denoiser.proj_out.weight, before)


def test_only_the_denoiser_trains(loaded: WanBackbone) -> None:
    assert all(p.requires_grad for p in loaded.denoiser.parameters())
    frozen = [*loaded.vae.parameters(), *loaded.parts["text_encoder"].parameters()]
    assert not any(p.requires_grad for p in frozen)


def test_load_denoiser(loaded: WanBackbone, noise: Tensor, tmp_path: Path) -> None:
    other = loaded.twin()
    with torch.no_grad():
        other.denoiser.proj_out.weight.mul_(2)
    other.denoiser.save_pretrained(tmp_path / "transformer")
    again = loaded.load_denoiser(tmp_path)
    sigma, text = torch.full((2,), 0.5), loaded.encode_text(PROMPTS)
    with torch.no_grad():
        assert torch.equal(again.velocity(noise, sigma, text), other.velocity(noise, sigma, text))
    with pytest.raises(UserError, match="transformer/"):
        loaded.load_denoiser(tmp_path / "nowhere")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer"])
def test_folder_without_a_component(tiny_wan: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(tiny_wan, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    with pytest.raises(UserError, match=f"model: no {part}/ in it"):
        WanBackbone.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer"])
def test_folder_with_a_damaged_component(tiny_wan: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(tiny_wan, tmp_path / "model")
    for file in (tmp_path / "model" / part).iterdir():
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match="model: cannot load it as a Wan pipeline") as caught:
        WanBackbone.from_pretrained(tmp_path / "model")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_folder_with_truncated_weights(tiny_wan: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(tiny_wan, tmp_path / "model")
    for file in (tmp_path / "model" / part).glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="model: cannot load it as a Wan pipeline"):
        WanBackbone.from_pretrained(tmp_path / "model")


def test_denoiser_is_counted_as_the_transformer(loaded: WanBackbone) -> None:
    assert isinstance(loaded.denoiser, WanTransformer3DModel)
    assert loaded.device == torch.device("cpu")
