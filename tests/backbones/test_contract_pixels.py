"""What every family promises of pixels, latents, shapes and noise: see `Family`."""

from __future__ import annotations

import copy
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contract import PROMPTS, Case, close
from torch import Tensor

from rats_video.backbones.kinds import load_backbone
from rats_video.diffusion.causal import pool_to_latent_frames
from rats_video.errors import UserError
from rats_video.seeds import seeded
from rats_video.types import ClipSpec

pytestmark = pytest.mark.usefixtures("no_gradient")


def test_decode_is_the_vaes_after_its_clamp(case: Case) -> None:
    theirs = case.family.native_sample(case.pipeline, 4 * case.noise, PROMPTS, 1)
    ours = case.backbone.decode(theirs.x0)
    clip = case.family.clip
    assert ours.shape == (2, clip.num_frames, 3, clip.height, clip.width)
    assert 0.001 < ((theirs.videos <= 0) | (theirs.videos >= 1)).float().mean() < 0.9
    close(ours, theirs.videos)
    assert ours.min() >= -1e-6
    assert ours.max() <= 1 + 1e-6


@pytest.mark.parametrize("checkpoint", [False, True])
def test_saturated_pixels_carry_gradient(case: Case, checkpoint: bool) -> None:  # noqa: FBT001
    backbone = copy.copy(case.backbone)
    backbone.decoding = backbone.decoding.model_copy(update={"checkpoint": checkpoint})
    latents = (4 * case.noise).requires_grad_()
    with torch.enable_grad():
        videos = backbone.decode(latents)
        saturated = (videos <= 0) | (videos >= 1)
        (gradient,) = torch.autograd.grad(videos[saturated].sum(), latents)
    gradient = backbone.split(gradient)["video"][:, :, case.family.hidden_frames :]
    assert gradient.abs().amax(dim=(1, 3, 4)).min() > 1e-4  # every latent frame's
    again = case.backbone.decode(latents)
    assert torch.equal(videos, again)  # and twice the same


def test_pixel_frames_belong_to_latent_frames(case: Case) -> None:
    """Latent 0 holds pixel 0, latent f the next `temporal_stride`: the map by which frame scores are pooled."""
    family, stride = case.family, case.backbone.temporal_stride
    hidden, frames = family.hidden_frames, case.video.shape[2] - family.hidden_frames
    if case.backbone.makes == "image":
        pytest.skip("an image has one frame")
    assert frames >= 3
    owner = [(pixel + stride - 1) // stride for pixel in range(family.clip.num_frames)]
    pooled = pool_to_latent_frames(torch.tensor([owner], dtype=torch.float32), stride)
    assert pooled.tolist() == [list(range(frames))]
    before = case.backbone.decode(case.noise)
    for changed in range(-hidden, frames):
        other = case.noise.clone()
        other[:, :, hidden + changed] += 1
        differs = (case.backbone.decode(other) != before).flatten(2).any(2)
        first = frames if changed < 0 else family.decoded_from(changed)
        assert differs.tolist() == 2 * [[latent >= first for latent in owner]]
    assert case.backbone.exact_window == (family.decoded_from(frames - 1) > 0)


def test_sharing_a_clip_is_declared(case: Case) -> None:
    has_plan = getattr(case.backbone.parts["transformer"], "_cp_plan", None) is not None
    assert case.backbone.can_share_tokens == (has_plan and not case.backbone.has_sound)  # which no plan shares


def random_videos(clip: ClipSpec) -> Tensor:
    """Two clips `[2, T, 3, height, width]` whose pixels fill [0, 1]."""
    return torch.rand(2, clip.num_frames, 3, clip.height, clip.width, generator=seeded(11))


def test_encode_is_the_vae_and_the_pipelines_normalisation(case: Case) -> None:
    clip = case.family.clip
    longer = ClipSpec(2 * clip.num_frames - 1, clip.height, clip.width, clip.fps)  # more than a chunk, or a tile
    for spec in (clip, longer):
        videos = random_videos(spec)
        latents, theirs = case.backbone.encode(videos), case.family.native_latents(case.pipeline, videos)
        noise = case.backbone.sample_noise(2, spec, seeded(1))
        assert latents.shape == case.backbone.split(noise)["video"].shape
        assert theirs.std() > 0.01
        close(latents, theirs)
        close(case.backbone.encode(videos[1:]), latents[1:])  # each clip by itself


def test_encode_has_no_gradient_and_is_float32(case: Case) -> None:
    videos = random_videos(case.family.clip)
    backbone = copy.copy(case.backbone)
    backbone.vae = copy.deepcopy(case.backbone.vae).bfloat16()
    with torch.enable_grad():
        latents = backbone.encode(videos.requires_grad_())
    assert latents.dtype == torch.float32
    assert not latents.requires_grad


def test_normalisation_is_undone(case: Case) -> None:
    close(case.backbone._from_vae(case.backbone._to_vae(case.noise)), case.noise)
    assert (case.backbone._to_vae(case.noise).reshape_as(case.noise) - case.noise).abs().max() > 0.01


def test_clips_that_do_not_divide_are_not_encoded(case: Case) -> None:
    clip, image = case.family.clip, case.backbone.makes == "image"  # whose only number of frames is tested below
    for name, change in (("num_frames", (1, 0)), ("height", (0, 1)))[image:]:
        videos = torch.zeros(1, clip.num_frames + change[0], 3, clip.height + change[1], clip.width)
        with pytest.raises(
            UserError, match=rf"^clip\.{name}: must be [^\n]*multiple of \d+, got \d+ \(take \d+ or \d+\)$"
        ):
            case.backbone.encode(videos)


def test_clips_and_prompts_are_encoded_without_a_denoiser(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "weightless"
    shutil.copytree(case.folder, folder)
    for weights in folder.glob("transformer*/*.safetensors"):
        weights.unlink()
    light, videos = load_backbone(folder, with_denoiser=False), random_videos(case.family.clip)
    assert light.denoiser_parts == case.backbone.denoiser_parts
    assert {weight.device.type for weight in light.denoiser.parameters()} == {"meta"}
    assert (light.device, light.dtype) == (case.backbone.device, case.backbone.dtype)
    assert light.latent_shape(case.family.clip) == case.backbone.latent_shape(case.family.clip)
    close(light.encode(videos), case.backbone.encode(videos))
    close(light.encode_text(PROMPTS).embeds, case.backbone.encode_text(PROMPTS).embeds)


# ---------------------------------------------------------------------------------------------- shapes and noise


def test_clip_that_does_not_divide(case: Case) -> None:
    good, backbone = case.family.clip, case.backbone
    assert case.noise.shape[1:] == backbone.latent_shape(good)
    sizes = {
        "num_frames": ClipSpec(good.num_frames + 1, good.height, good.width, good.fps),
        "height": ClipSpec(good.num_frames, good.height + 1, good.width, good.fps),
        "width": ClipSpec(good.num_frames, good.height, good.width + backbone.spatial_stride // 2, good.fps),
    }
    if backbone.makes == "image":
        with pytest.raises(UserError, match=rf"^clip.num_frames: {backbone.family} makes images, .* got 2 \(take 1\)$"):
            backbone.latent_shape(sizes.pop("num_frames"))
    for name, clip in sizes.items():
        with pytest.raises(
            UserError, match=rf"^clip\.{name}: [^\n]*multiple of \d+, got {getattr(clip, name)} "
        ) as caught:
            backbone.latent_shape(clip)
        below, above = map(int, re.findall(r"\d+", str(caught.value).partition("take ")[2]))
        assert below < getattr(clip, name) < above
        for near in (below, above):  # each of the two would do
            backbone.latent_shape(replace(clip, **{name: near}))


def test_noise_is_standard_and_seeded(case: Case) -> None:
    noise = case.backbone.sample_noise(64, case.family.clip, seeded(1))
    for part in case.backbone.split(noise).values():
        assert abs(part.mean()) < 0.05
        assert abs(part.std() - 1) < 0.05
    assert torch.equal(noise, case.backbone.sample_noise(64, case.family.clip, seeded(1)))
    assert not torch.equal(noise, case.backbone.sample_noise(64, case.family.clip, seeded(2)))


def test_sigma_grids_fall_and_nest(case: Case) -> None:
    few, many = case.backbone.sigmas(4, 3.0), case.backbone.sigmas(16, 3.0)
    assert many.dtype == torch.float32
    assert many[0] == 1
    assert many[-1] == 0
    assert (many.diff() < 0).all()
    assert torch.equal(few, many[::4])


def test_the_smallest_clip_that_is_taken_is_made(case: Case) -> None:
    """Sizes are refused beforehand: one that is not comes through the denoiser and the decoder."""
    backbone, fps = case.backbone, case.family.clip.fps
    for side in range(8, 129, 8):
        clip = ClipSpec(1, side, side, fps)
        try:
            shape = backbone.latent_shape(clip)
        except UserError:
            continue
        break
    latents = torch.randn(1, *shape, generator=seeded(3))
    with torch.no_grad():
        velocity = backbone.velocity(latents, torch.tensor([0.5]), backbone.encode_text(PROMPTS[:1]))
        assert velocity.shape == latents.shape
        assert backbone.decode(latents).shape == (1, 1, 3, side, side)
