"""What is particular to LTX-2: clips in two parts, their sound, and guidance by up to four calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from contract import PROMPTS, Case, close
from family import Family
from ltx2_family import CLIP, LTX2, LTX23, OFF, native_run, native_sample, parts_of
from shared import made_once
from torch import Tensor

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.kinds import load_backbone
from rats_video.commands.prepare import run_prepare
from rats_video.config.guidance import AudioVideoGuidance
from rats_video.diffusion.rollout import rollout
from rats_video.distillation.folder_settings import folder_settings
from rats_video.errors import UserError
from rats_video.seeds import seeded
from rats_video.types import ClipSpec, Trajectory

pytestmark = [pytest.mark.pipeline, pytest.mark.usefixtures("no_gradient")]

FURTHER = AudioVideoGuidance(
    audio_scale=5.0, stg_scale=0.8, audio_stg_scale=1.2, modality_scale=2.0, audio_modality_scale=2.5, rescale=0.7,
    audio_rescale=0.4, stg_blocks=(1,),
)  # fmt: skip
THEIRS = {
    "audio_guidance_scale": 5.0, "stg_scale": 0.8, "audio_stg_scale": 1.2, "modality_scale": 2.0,
    "audio_modality_scale": 2.5, "guidance_rescale": 0.7, "audio_guidance_rescale": 0.4,
    "spatio_temporal_guidance_blocks": [1],
}  # fmt: skip
WITHOUT_STG = FURTHER.model_copy(update={"stg_scale": 0.0, "audio_stg_scale": 0.0})
Opened = Callable[[Family], Case]


def guided(case: Case, sigmas: Tensor, further: AudioVideoGuidance) -> Trajectory:
    backbone = case.backbone
    text, negative = backbone.encode_text(PROMPTS), backbone.encode_text([""])
    return rollout(
        backbone.velocity, case.noise, sigmas, text, negative=negative, guidance_scale=3.0,
        guide=backbone.guidance(further),
    )  # fmt: skip


def test_guidance_of_both_parts_is_the_pipelines(opened: Opened) -> None:
    case, calls = opened(LTX23), []
    theirs = native_sample(case.pipeline, case.noise, PROMPTS, 3, 3.0, **THEIRS)
    hook = case.backbone.denoiser.register_forward_pre_hook(
        lambda _, given: calls.append(len(given[0])),
    )
    ours = guided(case, theirs.sigmas, FURTHER)
    hook.remove()
    for mine, native in zip(parts_of(ours.x0), parts_of(theirs.x0), strict=True):
        assert native.std() > 0.3
        close(mine, native, 2e-5)
    assert sum(calls) == len(PROMPTS) * ours.nfe  # every clip of every call is counted
    assert ours.nfe == 3 * 4


@pytest.mark.parametrize("name", ["audio_scale", "stg_scale", "audio_stg_scale", "modality_scale", "audio_rescale"])
def test_each_scale_counts(opened: Opened, name: str) -> None:
    case, sigmas = opened(LTX23), torch.tensor([1.0, 0.5])
    changed = FURTHER.model_copy(update={name: 2 * getattr(FURTHER, name)})
    before, after = guided(case, sigmas, FURTHER).x0, guided(case, sigmas, changed).x0
    moved = {part: (tensor - case.backbone.split(before)[part]).abs().max() > 1e-3
             for part, tensor in case.backbone.split(after).items()}  # fmt: skip
    assert moved == {"video": not name.startswith("audio"), "audio": name.startswith("audio")}


def test_guidance_of_the_older_transformer(opened: Opened) -> None:
    """Which cannot skip its self-attention: the pipeline's call for that changes nothing there."""
    case = opened(LTX2)
    theirs = native_sample(case.pipeline, case.noise, PROMPTS, 2, 3.0, **THEIRS)
    ours = guided(case, theirs.sigmas, WITHOUT_STG)
    close(ours.x0, theirs.x0, 2e-5)
    assert ours.nfe == 2 * 3
    line = r"^teacher\.further_guidance\.stg_scale: this transformer cannot skip its self-attention [^\n]* to 0\)$"
    with pytest.raises(UserError, match=line):
        case.backbone.guidance(FURTHER)


def test_blocks_that_are_not_there(opened: Opened) -> None:
    line = r"^teacher\.further_guidance\.stg_blocks: its transformer has 2 blocks, got 28 \(take 0 to 1\)$"
    with pytest.raises(UserError, match=line):
        opened(LTX23).backbone.guidance(AudioVideoGuidance())


def test_other_families_have_no_further_guidance(opened: Opened) -> None:
    from wan_family import WAN

    with pytest.raises(UserError, match=r"^teacher\.further_guidance: Wan is guided by the text alone \(set it to nul"):
        opened(WAN).backbone.guidance(FURTHER)


# ----------------------------------------------------------------------------------------------------------- sound


@pytest.mark.parametrize("family", [LTX2, LTX23], ids=lambda family: family.name)
def test_sound_is_the_pipelines(opened: Opened, family: Family) -> None:
    case = opened(family)
    theirs = native_run(case.pipeline, case.noise, PROMPTS, 2, "pt").audio
    latents = native_sample(case.pipeline, case.noise, PROMPTS, 2).x0
    sound = case.backbone.decode_sound(latents)
    assert theirs.std() > 0.05
    close(sound.waves, theirs)
    assert sound.rate == (24000 if family is LTX2 else 48000)
    assert sound.waves.shape[2] / sound.rate == pytest.approx(CLIP.num_frames / CLIP.fps, abs=0.04)


def test_gradient_of_pixels_and_sound_reaches_their_own_part(opened: Opened) -> None:
    for family in (LTX2, LTX23):
        case = opened(family)
        latents = case.noise.clone().requires_grad_()
        with torch.enable_grad():
            made = (
                case.backbone.decode(latents).square().sum(),
                case.backbone.decode_sound(latents).waves.square().sum(),
            )
        for scores, own in zip(made, ("video", "audio"), strict=True):
            gradient = case.backbone.split(torch.autograd.grad(scores, latents)[0])
            for part, values in gradient.items():
                assert (values.abs().amax(dim=(1, 3, 4)) > 0).all() == (part == own)  # in every latent frame


def test_gradient_of_sound_is_that_of_finite_differences(opened: Opened) -> None:
    backbone, latents = load_backbone(opened(LTX2).folder), opened(LTX2).noise.double()
    backbone.fps = CLIP.fps
    for name in ("audio_vae", "vocoder"):
        backbone.parts[name].double()
    direction = torch.randn(latents.shape, generator=seeded(4)).double()
    with torch.enable_grad():
        waves = backbone.decode_sound(latents.requires_grad_()).waves
        (gradient,) = torch.autograd.grad(waves.square().mean(), latents)
    above, below = (backbone.decode_sound(latents + step * direction).waves.square().mean() for step in (1e-6, -1e-6))
    assert float((gradient * direction).sum()) == pytest.approx(float(above - below) / 2e-6, rel=1e-4)


# ------------------------------------------------------------------------------------------------- parts of latents


def test_parts_are_one_tensor(opened: Opened) -> None:
    backbone, noise = opened(LTX23).backbone, opened(LTX23).noise
    parts = backbone.split(noise)
    assert {name: tuple(part.shape) for name, part in parts.items()} == {
        "video": (2, 8, 3, 2, 2), "audio": (2, 4, 17, 1, 1),
    }  # fmt: skip
    assert torch.equal(backbone.join(**parts), noise)
    video, sound = parts_of(noise)
    assert torch.equal(parts["video"], video)
    assert torch.equal(parts["audio"][..., 0, 0].transpose(1, 2).unflatten(2, (2, 2)).transpose(1, 2), sound)
    numbers = sum(part.numel() for part in parts.values())
    assert int((noise != 0).sum()) == numbers  # the rest is 0, and no call moves it
    assert int((opened(LTX23).velocity(backbone) != 0).sum()) == numbers


@pytest.mark.parametrize("fps", [8.0, 24.0, 25.0, 29.97, 60.0])
def test_shape_and_fps_tell_where_the_sound_begins(opened: Opened, fps: float) -> None:
    backbone = load_backbone(opened(LTX2).folder, with_text=False)
    backbone.fps = fps
    for frames in (9, 17, 121, 257):
        for height, width in ((64, 64), (64, 96), (512, 768)):
            clip = ClipSpec(frames, height, width, fps)
            assert backbone.num_pictures(backbone.latent_shape(clip)) == 1 + (frames - 1) // 8
    wrong = backbone.sample_noise(1, replace(CLIP, fps=fps), seeded(1))
    backbone.fps = 0.5
    with pytest.raises(ValueError, match=r"no clip at 0\.5 fps has latents of \(1, 8, "):
        backbone.split(wrong)


def test_a_clip_too_short_for_a_sound(opened: Opened) -> None:
    with pytest.raises(UserError, match=r"^clip\.num_frames: 1 are too few for a sound at 60 fps \(take 9 or more\)$"):
        opened(LTX2).backbone.latent_shape(ClipSpec(1, 64, 64, 60.0))


def test_shift_is_for_the_tokens_of_the_pictures(opened: Opened) -> None:
    case = opened(LTX23)
    theirs = native_sample(case.pipeline, case.noise, PROMPTS, 4).sigmas
    (shift,) = folder_settings(case.folder, case.backbone, CLIP).values()
    close(case.backbone.sigmas(4, shift), theirs, 1e-6)


# --------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 3.0, **THEIRS, "guidance_rescale": 0.0}])
def test_clips_from_a_picture_are_the_stock_pipelines(opened: Opened, guidance: dict[str, Any]) -> None:
    """Without `rescale` of pictures: the pipeline's spread counts what the network guesses of the given frame."""
    from diffusers import LTX2ImageToVideoPipeline

    case = opened(LTX23)
    backbone: PipelineBackbone = case.backbone
    pictures = torch.rand(2, 3, CLIP.height, CLIP.width, generator=seeded(4))
    given = backbone.given_frames(CLIP, pictures)
    noise = given.hold(case.noise)
    stock = LTX2ImageToVideoPipeline(**case.pipeline.components)
    stock.set_progress_bar_config(disable=True)
    theirs = native_sample(stock, noise, PROMPTS, 3, **{**OFF, **guidance})
    ours = rollout(
        backbone.velocity, noise, theirs.sigmas, backbone.encode_text(PROMPTS).with_given(given),
        negative=backbone.encode_text([""]), guidance_scale=guidance.get("guidance_scale", 1.0),
        guide=backbone.guidance(FURTHER.model_copy(update={"rescale": 0.0}) if guidance else None),
    )  # fmt: skip
    close(ours.x0, theirs.x0, 2e-5)
    assert torch.equal(ours.x0[:, :, 0], noise[:, :, 0])
    held = stock.vae.encode(pictures[:, :, None] * 2 - 1).latent_dist.mode()
    held = stock._normalize_latents(
        held, stock.vae.latents_mean, stock.vae.latents_std, stock.vae.config.scaling_factor
    )
    close(ours.x0[:, :, :1], held)


# ---------------------------------------------------------------------------------------------------------- refused


def test_videos_are_not_prepared(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    folder = made_once(tmp_path_factory, LTX2.name, LTX2.build)
    (tmp_path / "films").mkdir()
    zoo.write_clip(tmp_path / "films" / "a.mp4")
    with pytest.raises(UserError, match=r"^model: makes clips with sound: LTX-2's latents hold it as well"):
        run_prepare(
            source=str(tmp_path / "films"), config="ltx_video", output=tmp_path / "out", device="cpu",
            overrides=[f"model={folder}"], overwrite=False,
        )  # fmt: skip
