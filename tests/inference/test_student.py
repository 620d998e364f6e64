"""The student as an artifact: a card that says how it is sampled, and weights that stock diffusers takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rats_video.backbones.compute import LoraConfig
from rats_video.backbones.wan import WanBackbone
from rats_video.commands.students import load_student
from rats_video.diffusion.schedule import sigma_grid
from rats_video.errors import UserError
from rats_video.hub import CARD
from rats_video.inference.sampler import SamplerSpec, clip_noise, sample_videos
from rats_video.inference.student import StudentCard, load_card, save_student
from rats_video.types import ClipSpec

pytestmark = pytest.mark.pipeline

CLIP = {"num_frames": 5.0, "height": 32.0, "width": 32.0, "fps": 8.0}


@pytest.fixture
def card(tiny_wan: Path) -> StudentCard:
    return StudentCard(str(tiny_wan), num_steps=(3, 4), shift=3.0, clip=CLIP, steps=150, seed=7, embedded_guidance=4.5)


@pytest.fixture
def folder(backbone: WanBackbone, card: StudentCard, tmp_path: Path) -> Path:
    with torch.no_grad():
        backbone.denoiser.proj_out.weight.mul_(1.5)
    save_student(backbone, card, tmp_path / "run" / "student")
    return tmp_path / "run" / "student"


def test_card_comes_back(folder: Path, card: StudentCard) -> None:
    assert load_card(folder) == card


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 32), ("bfloat16", 16)])
def test_student_is_loaded_in_the_precision_it_was_trained_beside(
    backbone: WanBackbone, card: StudentCard, tmp_path: Path, dtype: str, bits: int
) -> None:
    role = backbone.with_adapter("student", LoraConfig(kind="lora", rank=2, alpha=2))
    save_student(role, replace(card, dtype=dtype), tmp_path / "lora")
    loaded = load_student(tmp_path / "lora", torch.device("cpu"))
    assert torch.finfo(loaded.base.dtype).bits == bits
    assert {weight.dtype for weight in loaded.student.weights.values()} == {torch.float32}


def test_card_tells_others_the_sigmas(folder: Path) -> None:
    content = json.loads((folder / CARD).read_text())
    assert content["sigmas"]["4"] == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-6)
    assert content["sigmas"]["3"] == sigma_grid(3, 3.0).tolist()
    assert content["guidance_scale"] == 1.0


def test_student_is_called_as_it_was_trained(folder: Path) -> None:
    loaded = load_student(folder.parent, torch.device("cpu"))
    assert (loaded.student.embedded_guidance, loaded.student.fps) == (4.5, 8.0)
    assert loaded.base.embedded_guidance == 4.5


def test_saving_again_replaces_the_whole_folder(folder: Path, backbone: WanBackbone, card: StudentCard) -> None:
    (folder / "old").write_text("")
    save_student(backbone, replace(card, steps=300), folder)
    assert sorted(path.name for path in folder.iterdir()) == [CARD, "transformer"]
    assert load_card(folder).steps == 300
    assert [path.name for path in folder.parent.iterdir()] == ["student"]


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"model": "x", "num_steps": 4}'])
def test_folder_without_a_card(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / CARD).write_text(content)
    with pytest.raises(UserError) as caught:
        load_card(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: no student here: {CARD} is missing or unreadable")


def test_stock_pipeline_samples_the_student(folder: Path, tiny_wan: Path, loaded: WanBackbone, clip: ClipSpec) -> None:
    from diffusers import WanPipeline, WanTransformer3DModel

    transformer = WanTransformer3DModel.from_pretrained(folder / "transformer")
    pipeline = WanPipeline.from_pretrained(tiny_wan, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    prompt = "a red circle"
    theirs = pipeline(
        prompt, num_inference_steps=4, guidance_scale=1.0, latents=clip_noise(loaded, clip, seed=1, index=0),
        height=32, width=32, num_frames=5, output_type="pt",
    ).frames  # fmt: skip
    (ours,) = sample_videos(loaded.load_denoiser(folder), [prompt], clip, SamplerSpec(4, 3.0), seed=1)
    (base,) = sample_videos(loaded, [prompt], clip, SamplerSpec(4, 3.0), seed=1)
    torch.testing.assert_close(ours.videos, theirs, atol=1e-5, rtol=0)
    assert (ours.videos - base.videos).abs().max() > 1e-2
