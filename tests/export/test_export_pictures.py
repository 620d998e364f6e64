"""Students that start from a picture, in each form: the stock image-to-video pipeline gives our sampler's clips."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cogvideox_i2v_family
import pytest
import torch
from cogvideox_family import CLIP
from ltx2_family import LTX2, LTX23
from ltx_family import LTX_095, LTX_FAMILIES
from shared import made_once
from wan22_family import build
from wan_i2v_family import build_image_pipeline

from rats_video.backbones.compute import LoraConfig
from rats_video.backbones.kinds import load_backbone
from rats_video.commands.export_model import ExportRequest, run_export_model
from rats_video.datasets.video.pictures import read_picture
from rats_video.export.pictures import plain_picture
from rats_video.inference.student import StudentCard, save_student
from rats_video.seeds import seeded
from rats_video.types import ClipSpec

LORA = LoraConfig(kind="lora", rank=2, alpha=6)
WAN = ClipSpec(num_frames=9, height=32, width=64, fps=8.0)


class Kind(NamedTuple):
    build: Any
    pipeline: str
    clip: ClipSpec = WAN


KINDS = {
    "wan21": Kind(partial(build_image_pipeline, clip_sees=1, experts=False), "WanImageToVideoPipeline"),
    "wan21-first-last": Kind(partial(build_image_pipeline, clip_sees=2, experts=False), "WanImageToVideoPipeline"),
    "wan22-a14b": Kind(partial(build_image_pipeline, clip_sees=0, experts=True), "WanImageToVideoPipeline"),
    "wan22-5b": Kind(partial(build, experts=False), "WanImageToVideoPipeline"),
    "ltx": Kind(LTX_FAMILIES[0].build, "LTXImageToVideoPipeline", LTX_FAMILIES[0].clip),
    "ltx-0.9.5": Kind(LTX_095.build, "LTXConditionPipeline", LTX_095.clip),
    "ltx2": Kind(LTX2.build, "LTX2ImageToVideoPipeline", LTX2.clip),
    "ltx2.3": Kind(LTX23.build, "LTX2ImageToVideoPipeline", LTX23.clip),
    "cogvideox-5b": Kind(partial(cogvideox_i2v_family.build, paired=False), "CogVideoXImageToVideoPipeline", CLIP),
    "cogvideox-1.5": Kind(partial(cogvideox_i2v_family.build, paired=True), "CogVideoXImageToVideoPipeline", CLIP),
}


class Case(NamedTuple):
    kind: Kind
    students: dict[str, Path]


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    kind = KINDS[request.param]
    base = made_once(tmp_path_factory, f"i2v-{request.param}", kind.build)
    backbone, folder = load_backbone(base), tmp_path_factory.mktemp("students")
    size = {name: float(getattr(kind.clip, name)) for name in ("num_frames", "height", "width", "fps")}
    card = StudentCard(str(base), (2, 4), 2.0, size, steps=7, seed=3, first_frame=True)
    for weights in ("full", "lora"):
        role = backbone.with_own_denoiser() if weights == "full" else backbone.with_adapter("student", LORA)
        with torch.no_grad():
            for weight in role.weights.values():
                weight.add_(0.05 * torch.randn(weight.shape, generator=seeded(7)))
        save_student(role, card, folder / weights)
    return Case(kind, {weights: folder / weights for weights in ("full", "lora")})


@pytest.mark.parametrize(("form", "weights"), [("diffusers", "full"), ("lora", "lora")])
def test_the_stock_pipeline_makes_our_clips(case: Case, tmp_path: Path, form: str, weights: str) -> None:
    """`run_export_model` compares them, and keeps nothing where they differ."""
    lines = run_export_model(ExportRequest(form, str(case.students[weights]), output=tmp_path / "e"), "cpu")
    assert any(line.startswith(f"stock {case.kind.pipeline} against our sampler, 1 clip") for line in lines)
    card = (tmp_path / "e/README.md").read_text()
    assert "pipeline_tag: image-to-video" in card
    assert f"{case.kind.pipeline}.from_pretrained(" in card
    if form == "diffusers":
        assert json.loads((tmp_path / "e/model_index.json").read_text())["_class_name"] == case.kind.pipeline
    shown = read_picture(tmp_path / "e/picture.png", case.kind.clip, where="")
    torch.testing.assert_close(shown, plain_picture(case.kind.clip), atol=1 / 255, rtol=0)
