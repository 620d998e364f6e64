"""What a card says of the programs that take its files, as they were run: each has its own names for the weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rats_video.backbones.stock import StockCall
from rats_video.export.base import ExportedStudent
from rats_video.export.kinds import find_form
from rats_video.export.pictures import ExportPictures, plain_picture
from rats_video.files import write_json
from rats_video.inference.student import StudentCard
from rats_video.types import ClipSpec

WAN, LTX, QWEN, SD3 = (
    "WanTransformer3DModel", "LTXVideoTransformer3DModel", "QwenImageTransformer2DModel", "SD3Transformer2DModel",
)  # fmt: skip


def exported(base: Path, kind: str, *, is_lora: bool) -> ExportedStudent:
    write_json(base / "transformer/config.json", {"_class_name": kind})
    card = StudentCard(str(base), (4,), 3.0, {"num_frames": 9, "height": 64, "width": 64, "fps": 8.0}, 1, 0)
    return ExportedStudent(
        card=card, base=base, run="mine", pipeline="", networks={"transformer": kind}, stock=StockCall(None, {}),
        sigmas={}, boundary=None, is_lora=is_lora, prompts=("",), noises=(), clips=None,
    )  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base/transformer").mkdir(parents=True)
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("form", "kind", "weights", "said"),
    [
        (
            "comfyui", WAN, "lora", ("This is for ComfyUI, LightX2V and DiffSynth-Studio, which take it as it is. For "
            "musubi-tuner there is the same under its names in `musubi-tuner`. Diffusers takes it too; `--format lora` "
            "has its own names."),
        ),
        (
            "comfyui", LTX, "lora", ("This is for ComfyUI. LightX2V, DiffSynth-Studio and musubi-tuner have no "
            "LTX-Video. Diffusers takes it too; `--format lora` has its own names."),
        ),
        ("comfyui", WAN, "full", "This is for ComfyUI. Diffusers takes `--format diffusers` or `merged`."),
        (
            "lora", WAN, "lora", ("This is for diffusers alone, whose names its weights have. ComfyUI, LightX2V, "
            "DiffSynth-Studio and musubi-tuner would apply nothing of a LoRA under them, DiffSynth-Studio without a "
            "word; take `--format comfyui` there."),
        ),
        (
            "merged", WAN, "full", ("This is for diffusers alone, whose names its weights have. ComfyUI cannot tell "
            "what model it is (`Could not detect model type`); take `--format comfyui` there."),
        ),
        ("lora", SD3, "lora", "This is for diffusers and ComfyUI, whose LoraLoaderModelOnly takes it as it is."),
        (
            "lora", QWEN, "lora", ("This is for diffusers and ComfyUI, whose LoraLoaderModelOnly takes it as it is. "
            "LightX2V, DiffSynth-Studio and musubi-tuner apply nothing of it."),
        ),
        (
            "diffusers", SD3, "full",
            "This is for diffusers and ComfyUI; weights in several files have to be joined for ComfyUI.",
        ),
        ("int8", SD3, "full", "This is for diffusers alone, which reads torchao's 8 bits."),
        (
            "fp8", WAN, "full",
            "This is for diffusers alone, which reads torchao's 8 bits; take `--format comfyui` for other programs.",
        ),
    ],
)  # fmt: skip
def test_programs_of_a_form(base: Path, form: str, kind: str, weights: str, said: str) -> None:
    assert find_form(form).programs(exported(base, kind, is_lora=weights == "lora")) == said


def test_a_clip_from_a_picture_changes_none_of_the_names(base: Path) -> None:
    """LightX2V, DiffSynth-Studio and musubi-tuner applied every layer of Wan 2.1 I2V's too."""
    text, picture = exported(base, WAN, is_lora=True), plain_picture(ClipSpec(1, 8, 8, 1.0))
    pictured = replace(text, pictures=ExportPictures(picture[None], None, picture))
    form = find_form("comfyui")
    assert form.programs(pictured) == form.programs(text)
