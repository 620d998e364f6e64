"""The `comfyui` form of LTX-2: names, shapes and header as ComfyUI's model has them, and nodes of sound."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import comfyui_tables
import pytest
import torch
from ltx2_family import CLIP, build
from safetensors import safe_open
from safetensors.torch import load_file
from shared import made_once

from rats_video.backbones.compute import LoraConfig
from rats_video.backbones.kinds import load_backbone
from rats_video.commands.export_model import ExportRequest, run_export_model
from rats_video.export.comfyui_models import refusal
from rats_video.inference.student import StudentCard, save_student
from rats_video.seeds import seeded

pytestmark = pytest.mark.pipeline


def student(kind: str, base: Path, folder: Path) -> Path:
    """A student whose weights are not its base's."""
    backbone = load_backbone(base)
    lora = LoraConfig(kind="lora", rank=2, alpha=6)
    role = backbone.with_own_denoiser() if kind == "full" else backbone.with_adapter("student", lora)
    with torch.no_grad():
        for weight in role.weights.values():
            weight.add_(0.02 * torch.randn(weight.shape, generator=seeded(7)))
    size = {"num_frames": CLIP.num_frames, "height": CLIP.height, "width": CLIP.width, "fps": CLIP.fps}
    save_student(role, StudentCard(str(base), (2,), 3.0, size, steps=7, seed=3), folder)
    return folder


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_names_and_shapes_are_comfyuis(kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Exporting has sampled with the file, as diffusers' converter reads it, and found our latents."""
    base = made_once(tmp_path_factory, "ltx2-published-sound", partial(build, is_23=False, sound=(8, 64)))
    made = student(kind, base, tmp_path / "student")
    lines = run_export_model(ExportRequest("comfyui", str(made), output=tmp_path / "out"), "cpu")
    assert any("relative difference of the latents" in line for line in lines)
    (file,) = (tmp_path / "out" / "models").rglob("*.safetensors")
    shapes = {name: tuple(weight.shape) for name, weight in load_file(file).items()}
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "LTXVConcatAVLatent joins it to the pictures'" in card
    assert "LTXVConditioning with `frame_rate` 25" in card
    if kind == "lora":
        layer = "diffusion_model.transformer_blocks.1.video_to_audio_attn.to_k"
        assert shapes[f"{layer}.lora_A.weight"] == (2, 24)
        assert shapes[f"{layer}.lora_B.weight"] == (16, 2)
        table = {f"diffusion_model.{name.removesuffix('.weight')}" for name in comfyui_tables.ltx2()}
        assert {name.rpartition(".lora_")[0] for name in shapes} <= table
        return
    assert shapes == comfyui_tables.ltx2()
    sizes = json.loads(header["config"])["transformer"]
    assert sizes["audio_num_attention_heads"] == 2
    assert (sizes["rope_type"], sizes["frequencies_precision"]) == ("split", "float64")
    assert sizes["av_ca_timestep_scale_multiplier"] == 1000
    assert sizes["use_middle_indices_grid"] is sizes["causal_temporal_positioning"] is True


def test_of_ltx_2_3_a_lora_alone_can_be_checked() -> None:
    newer = {"_class_name": "LTX2VideoTransformer3DModel", "gated_attn": True, "cross_attn_mod": True}
    assert refusal(newer, is_lora=True) == ""
    assert refusal(newer, is_lora=False) == (
        "a whole LTX-2 of gated_attn True (not False), cross_attn_mod True (not False) cannot be checked: diffusers' "
        "converter cannot read it"
    )
