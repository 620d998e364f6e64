"""What is particular to the families of images: one frame, their shifts, and their guidance."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import PROMPTS, Case, close
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from family import Family
from flux2_family import FLUX2
from flux_family import FLUX
from flux_family import build as build_flux
from qwen_image_family import QWEN_IMAGE
from sd3_family import SD3
from shared import made_once
from torch import Tensor

from rats_video.backbones.compute import DecodeConfig
from rats_video.backbones.flux import FluxBackbone
from rats_video.backbones.image import pack, unpack
from rats_video.backbones.kinds import load_backbone
from rats_video.diffusion.guidance import plain_guidance
from rats_video.diffusion.rollout import rollout
from rats_video.distillation.folder_settings import folder_settings
from rats_video.errors import UserError
from rats_video.inference.plain import plain_card
from rats_video.methods.horizon import match_horizons
from rats_video.seeds import seeded
from rats_video.types import ClipSpec

pytestmark = pytest.mark.pipeline

IMAGES = (FLUX, SD3, QWEN_IMAGE, FLUX2)
MEGAPIXEL = ClipSpec(num_frames=1, height=1024, width=1024, fps=1.0)
Opened = Callable[[Family], Case]


def shift_of(case: Case, clip: ClipSpec) -> float:
    (shift,) = folder_settings(case.folder, case.backbone, clip).values()
    return shift


def test_shift_grows_with_the_image_as_in_the_pipeline(opened: Opened) -> None:
    """`FlowMatchEulerDiscreteScheduler` is told mu; our grid has its levels."""
    for family in (FLUX, QWEN_IMAGE):
        case = opened(family)
        native = family.native_sample(case.pipeline, case.noise, PROMPTS, 4).sigmas
        close(case.backbone.sigmas(4, shift_of(case, family.clip)), native, 1e-6)
    assert shift_of(opened(FLUX), MEGAPIXEL) == pytest.approx(math.exp(1.15))
    assert shift_of(opened(QWEN_IMAGE), MEGAPIXEL) == pytest.approx(math.exp(0.5 + 0.4 * 3840 / 7936))
    assert shift_of(opened(SD3), MEGAPIXEL) == 3.0


@pytest.mark.parametrize(("is_distilled", "steps"), [(False, 50), (True, 4)])
def test_shift_of_klein_is_that_of_its_published_steps(opened: Opened, is_distilled: bool, steps: int) -> None:  # noqa: FBT001
    case = opened(FLUX2)
    case.backbone.parts["is_distilled"] = is_distilled
    shift = shift_of(case, MEGAPIXEL)
    assert shift == pytest.approx(math.exp(compute_empirical_mu(64 * 64, steps)))
    teacher = case.backbone.sigmas(24, shift)
    for few in (3, 4, 8):  # one shift for every number of steps: horizons nest
        assert match_horizons(case.backbone.sigmas(few, shift), teacher).residual == 0
    other = case.backbone.sigmas(3, math.exp(compute_empirical_mu(64 * 64, 3)))
    assert match_horizons(other, teacher).residual > 5e-4  # as the pipeline would have it
    case.backbone.parts["is_distilled"] = False


def test_guidance_of_qwen_image_keeps_each_tokens_length(opened: Opened) -> None:
    cond, uncond = torch.randn(2, 2, 4, 1, 4, 6, generator=seeded(0))
    guided = opened(QWEN_IMAGE).backbone.guide(cond, uncond, 4.0)
    plain = plain_guidance(cond, uncond, 4.0)
    close(pack(guided).norm(dim=-1), pack(cond).norm(dim=-1))
    close(torch.cosine_similarity(pack(guided), pack(plain), dim=-1), torch.ones(2, 6))
    assert torch.equal(opened(FLUX).backbone.guide(cond, uncond, 4.0), plain)
    assert torch.equal(unpack(pack(cond), 2), cond)


@torch.no_grad()
def test_a_flux_that_takes_no_guidance_is_told_none(tmp_path: Path) -> None:
    build_flux(tmp_path, guidance_embeds=False)
    backbone, seen = FluxBackbone.from_pretrained(tmp_path), []
    backbone.denoiser.register_forward_pre_hook(lambda _, given: seen.append(given[6]))
    noise = backbone.sample_noise(2, FLUX.clip, seeded(3))
    native = FLUX.native_sample(FLUX.load(tmp_path), noise, PROMPTS, 2)
    close(rollout(backbone.velocity, noise, native.sigmas, backbone.encode_text(PROMPTS)).x0, native.x0)
    assert seen == [None, None]
    assert backbone.stock_call(4, 3.0).call["guidance_scale"] == 1.0


@torch.no_grad()
def test_embedded_guidance_reaches_flux(opened: Opened) -> None:
    case = opened(FLUX)
    before = case.velocity(case.backbone)
    other = case.backbone.with_own_denoiser()
    other.embedded_guidance = 2.0
    assert (case.velocity(other) - before).abs().max() > 1e-3
    assert other.stock_call(4, 3.0).call["guidance_scale"] == 2.0


def test_an_image_too_large_for_its_positions(opened: Opened) -> None:
    large = replace(SD3.clip, height=272)  # 16 patches of 2 latents of 8 pixels are known
    with pytest.raises(UserError, match=r"^clip: 272 x 48 is larger than [^\n]* \(at most 256 pixels a side\)$"):
        opened(SD3).backbone.latent_shape(large)


def test_a_denoiser_that_takes_an_image_too_is_refused_before_it_is_read(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    for family, taken in ((FLUX, 24), (QWEN_IMAGE, 24)):
        folder = made_once(tmp_path_factory, family.name, family.build)
        config = json.loads((folder / "transformer" / "config.json").read_text())
        config |= {"in_channels": taken, "out_channels": config["out_channels"] or 16}
        part = tmp_path / family.name / "transformer"
        part.mkdir(parents=True)
        (part / "config.json").write_text(json.dumps(config))
        (part.parent / "model_index.json").write_bytes((folder / "model_index.json").read_bytes())
        with pytest.raises(UserError, match=rf"takes {taken} channels and makes 16: [^\n]*give a text-to-image model"):
            load_backbone(part.parent)


def test_plain_pipelines_are_sampled_as_their_classes_are_by_default(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    def card(folder: Path) -> tuple[Any, ...]:
        found = plain_card(folder, "float32")
        assert found.clip == {"num_frames": 1, "height": 1024, "width": 1024, "fps": 1.0}
        return found.num_steps, found.guidance_scale, found.embedded_guidance

    cards = [card(made_once(tmp_path_factory, family.name, family.build)) for family in IMAGES]
    assert cards == [((28,), 1.0, 3.5), ((28,), 7.0, 7.0), ((50,), 4.0, 4.0), ((50,), 4.0, 4.0)]
    partial(FLUX2.build, is_distilled=True)(tmp_path)
    assert card(tmp_path)[1] == 1.0


def test_images_are_decoded_in_tiles(opened: Opened) -> None:
    """The VAE's own; small ones are one tile."""
    for family in IMAGES:
        fresh = load_backbone(opened(family).folder)
        latents = opened(family).noise
        with torch.no_grad():
            plain = fresh.decode(latents)
            fresh.use_tiles()
            close(fresh.decode(latents), plain)


def gradient(case: Case, *, checkpoint: bool) -> Tensor:
    backbone = load_backbone(case.folder)
    backbone.decoding = DecodeConfig(checkpoint=checkpoint)
    latents = case.noise.clone().requires_grad_()
    return torch.autograd.grad(backbone.decode(latents).square().sum(), latents)[0]


def test_recomputed_decodes_have_the_same_gradient(opened: Opened) -> None:
    for family in IMAGES:
        plain = gradient(opened(family), checkpoint=False)
        assert plain.abs().max() > 1e-2
        close(gradient(opened(family), checkpoint=True), plain, 1e-4)


def test_no_window_of_an_image(opened: Opened) -> None:
    for family in IMAGES:
        with pytest.raises(ValueError, match="no window"):
            opened(family).backbone.decode(opened(family).noise, range(1))
