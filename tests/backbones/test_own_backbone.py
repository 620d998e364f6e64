"""A family of the user's own: a run of the example from `distill` to its export, and how mistakes are told."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from rats_video.backbones.architecture import build_on_meta, find_architecture
from rats_video.backbones.custom import CustomBackboneConfig
from rats_video.backbones.kinds import find_family, load_backbone
from rats_video.backbones.wan import WanBackbone
from rats_video.distillation.resume import changed_keys
from rats_video.distillation.settings import DistillConfig
from rats_video.distillation.teacher_identity import teacher_identity
from rats_video.errors import UserError
from rats_video.methods.teacher import FrozenTeacherConfig

MakeConfig = Callable[..., DistillConfig]
EXAMPLES = Path(__file__).parent.parent.parent / "examples"
TARGET = 'backbone={kind: custom, target: "own_backbone:SkyReels"}'
MODULE = """
import torch
from rats_video.backbones.wan import WanBackbone
from rats_video.backbones.base import PipelineBackbone

class Told(WanBackbone):
    def __init__(self, scale=1.0, **parts):
        super().__init__(**parts)
        self.parts["scale"] = scale

    def _velocity(self, latents, sigma, text):
        return self.parts["scale"] * super()._velocity(latents, sigma, text)

class Half(PipelineBackbone):
    family = "Half"

class Breaks(WanBackbone):
    def _velocity(self, latents, sigma, text):
        return 1 / 0

class Strict(WanBackbone):
    def __init__(self, **parts):
        raise ValueError("no such model")

def function(): pass
"""


@pytest.fixture(scope="module")
def skyreels(tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Wan with a denoiser of SkyReels-V2's class, as `diffusers.SkyReelsV2Pipeline` loads it."""
    from diffusers import SkyReelsV2Transformer3DModel

    folder = tmp_path_factory.mktemp("models") / "tiny-skyreels"
    shutil.copytree(tiny_wan, folder)
    wan = json.loads((folder / "transformer" / "config.json").read_text())
    shutil.rmtree(folder / "transformer")
    torch.manual_seed(0)
    known = SkyReelsV2Transformer3DModel._get_init_keys(SkyReelsV2Transformer3DModel)
    SkyReelsV2Transformer3DModel(**{key: value for key, value in wan.items() if key in known}).save_pretrained(
        folder / "transformer"
    )
    index = json.loads((folder / "model_index.json").read_text())
    parts = {name: index[name] for name in ("scheduler", "text_encoder", "tokenizer", "vae")}
    denoiser = {"_class_name": "SkyReelsV2Pipeline", "transformer": ["diffusers", "SkyReelsV2Transformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps(parts | denoiser))
    return folder


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATS_VIDEO_TRUST_CODE", "1")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.chdir(EXAMPLES)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`own(name, **options)`: settings of a class of `MODULE`."""
    monkeypatch.setenv("RATS_VIDEO_TRUST_CODE", "1")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.chdir(tmp_path)
    module = f"families_{abs(hash(request.node.name))}"  # a module is imported once a process
    (tmp_path / f"{module}.py").write_text(MODULE)
    return lambda name, **options: CustomBackboneConfig(kind="custom", target=f"{module}:{name}", options=options)


# ------------------------------------------------------------------------------------------------------------- a run


@pytest.mark.usefixtures("trusted")
def test_a_run_of_the_example(
    command: Any, config_file: Path, skyreels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, export, settings = tmp_path / "run", tmp_path / "export", ["--set", f"model={skyreels}", "--set", TARGET]
    library = "diffusers.pipelines.skyreels_v2.pipeline_skyreels_v2.ftfy"  # which this pipeline assumes to be installed
    monkeypatch.setattr(library, SimpleNamespace(fix_text=str), raising=False)
    done = command("distill", "--config", config_file, "--output", run, "--device", "cpu", *settings)
    assert done.code == 0, done.err
    assert f"backbone: runs code of {EXAMPLES / 'own_backbone.py'}" in done.err
    custom = {"kind": "custom", "target": "own_backbone:SkyReels", "options": {}}
    assert yaml.safe_load((run / "config.resolved.yaml").read_text())["backbone"] == custom
    assert json.loads((run / "student" / "rats.json").read_text())["backbone"] == custom

    for arguments in (
        ["sample", "--model", run, "--num-videos", "1", "--output", tmp_path / "clips"],
        ["evaluate", run],
        ["export", "model", run, "--format", "diffusers", "--output", export],  # sampled by diffusers' own pipeline
        ["distill", "--config", config_file, "--output", run, "--resume", *settings],
    ):
        outcome = command(*arguments, "--device", "cpu")
        assert outcome.code == 0, outcome.err
    (pixels,) = re.findall(r"largest pixel difference (\S+),", (export / "README.md").read_text())
    assert float(pixels) < 1e-4
    assert "from diffusers import SkyReelsV2Pipeline\n" in (export / "README.md").read_text()

    monkeypatch.delenv("RATS_VIDEO_TRUST_CODE")  # a student's folder may come from anybody
    refused = command("sample", "--model", run / "student", "--output", tmp_path / "more", "--device", "cpu")
    assert (refused.code, refused.out) == (2, "")
    assert f"own_backbone:SkyReels is code, in {EXAMPLES / 'own_backbone.py'}, and would run with all" in refused.err


@pytest.mark.usefixtures("trusted")
def test_plan_builds_the_example(skyreels: Path, make_config: MakeConfig) -> None:
    cfg = make_config(f"model={skyreels}", TARGET)
    base = build_on_meta(find_architecture(cfg.model, None, cfg.backbone), torch.float32)
    assert type(base.denoiser).__name__ == "SkyReelsV2Transformer3DModel"


def test_only_a_family_of_ones_own_is_written_down(make_config: MakeConfig) -> None:
    """Dumps and the identity of stored rollouts are those of before there was the key."""
    before, after = make_config(), make_config('backbone={kind: custom, target: "math:pi"}')
    assert "backbone" not in before.model_dump()
    assert isinstance(before.teacher, FrozenTeacherConfig)
    assert "backbone" not in teacher_identity(before, before.teacher)
    assert changed_keys(before, after) == ["backbone.kind"]


# ---------------------------------------------------------------------------------------------------- what goes wrong


def test_options_reach_every_copy(own: Any, tiny_wan: Path) -> None:
    backbone = load_backbone(tiny_wan, backbone=own("Told", scale=0.5))
    assert isinstance(backbone, WanBackbone)
    assert backbone.with_own_denoiser().parts["scale"] == 0.5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Half", r"^backbone\.target: \w+:Half lacks pipelines, lora_targets, text_limit, _decode, _encode"),
        ("function", r"^backbone\.target: \w+:function is no family \(name a subclass of rats_video"),
        ("Nothing", r"^backbone\.target: no 'Nothing' in "),
        ("Strict", r"^backbone \w+:Strict: fails: ValueError: no such model \(families_\d+\.py, line 23\)$"),
    ],
)
def test_a_wrong_class_is_one_line(own: Any, tiny_wan: Path, name: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_backbone(tiny_wan, backbone=own(name))


def test_code_that_fails_in_a_call_is_one_line(own: Any, tiny_wan: Path) -> None:
    backbone = load_backbone(tiny_wan, backbone=own("Breaks"))
    text = backbone.encode_text([""])
    with pytest.raises(UserError, match=r"Breaks: fails: ZeroDivisionError: division by zero \(families_\d+\.py, line"):
        backbone.velocity(torch.zeros(1, 4, 1, 4, 4), torch.ones(1), text)


def test_a_pipeline_it_does_not_load_is_one_line(own: Any, skyreels: Path) -> None:
    with pytest.raises(UserError, match=r"is a SkyReelsV2Pipeline \(give one of: WanPipeline\)$"):
        find_family(skyreels, own("Told"))
    with pytest.raises(UserError, match=r"is a SkyReelsV2Pipeline \(give one of: WanPipeline, WanImageTo"):
        find_family(skyreels)
