"""The `comfyui` form, on models of the sizes that ComfyUI takes for granted."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import comfyui_tables
import pytest
import torch
from comfyui_family import A14B, COMFYUI_FAMILIES, LTX, LTX_095, WAN, WAN_5B
from diffusers.loaders.lora_conversion_utils import (
    _convert_musubi_wan_lora_to_diffusers,
    _convert_non_diffusers_wan_lora_to_diffusers,
)
from diffusers.loaders.single_file_utils import (
    convert_hunyuan_video_transformer_to_diffusers,
    convert_wan_transformer_to_diffusers,
)
from family import Family
from hunyuan_family import HUNYUAN
from safetensors import safe_open
from safetensors.torch import load_file
from wan_i2v_family import build_image_pipeline

from rats_video.backbones.compute import LoraConfig
from rats_video.backbones.hunyuan import HunyuanVideoBackbone
from rats_video.backbones.kinds import load_backbone
from rats_video.commands.export_model import ExportRequest, run_export_model
from rats_video.diffusion.schedule import sigma_grid
from rats_video.errors import UserError
from rats_video.export.comfyui import ComfyUI, kohya_name, whole_weights
from rats_video.export.comfyui_card import simple_levels
from rats_video.export.comfyui_models import MODELS, refusal
from rats_video.inference.student import StudentCard, save_student
from rats_video.seeds import seeded

SHIFT = 3.0
LORA = LoraConfig(kind="lora", rank=2, alpha=6)
Command = Callable[..., Any]


class Case(NamedTuple):
    """A family's base, and a student of each kind on it."""

    family: Family
    students: dict[str, Path]


class Export(NamedTuple):
    """An export, and what was printed."""

    folder: Path
    printed: list[str]

    @property
    def card(self) -> str:
        return (self.folder / "README.md").read_text()

    @property
    def files(self) -> list[Path]:
        return sorted((self.folder / "models").rglob("*.safetensors"))

    def header(self) -> dict[str, str]:
        with safe_open(self.files[0], "pt") as file:
            return dict(file.metadata())


@pytest.fixture(scope="module", params=COMFYUI_FAMILIES, ids=lambda family: family.name)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("comfyui")
    case = Case(request.param, {kind: folder / kind / "student" for kind in ("lora", "full")})
    base = folder / "base-model"
    case.family.build(base)
    clip = case.family.clip
    size = {"num_frames": clip.num_frames, "height": clip.height, "width": clip.width, "fps": 24.0}
    backbone = load_backbone(base)
    for kind in ("full", "lora"):
        role = backbone.with_own_denoiser() if kind == "full" else backbone.with_adapter("student", LORA)
        generator = seeded(7)
        with torch.no_grad():
            for weight in role.weights.values():
                weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
        save_student(role, StudentCard(str(base), (2, 3, 4), SHIFT, size, steps=7, seed=3), case.students[kind])
    return case


@pytest.fixture(scope="module")
def exported(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Export]:
    """The export of a student of that kind, made once; it is compared with our sampler on the way."""
    made: dict[str, Export] = {}

    def export(kind: str) -> Export:
        if kind not in made:
            output = tmp_path_factory.mktemp("exported") / kind
            student = case.students[kind]
            printed = run_export_model(ExportRequest("comfyui", str(student), output=output), "cpu")
            made[kind] = Export(output, printed)
        return made[kind]

    return export


# ---------------------------------------------------------------------------------------------- what its loaders expect


def test_a_denoiser_has_the_names_and_shapes_that_comfyui_builds(case: Case, exported: Any) -> None:
    channels = 48 if case.family is WAN_5B else 16
    table = comfyui_tables.ltx() if "ltx" in case.family.name else comfyui_tables.wan(channels)
    files = exported("full").files
    assert len(files) == (2 if case.family is A14B else 1)
    for file in files:
        assert {name: tuple(weight.shape) for name, weight in load_file(file).items()} == table


def test_a_lora_has_the_names_and_shapes_of_its_layers(case: Case, exported: Any) -> None:
    is_ltx = "ltx" in case.family.name
    table = comfyui_tables.ltx() if is_ltx else comfyui_tables.wan(16)
    layers = r"transformer_blocks.*(to_\w+|to_out\.0|net\.0\.proj|net\.2)" if is_ltx else r"blocks.*(\.[qkvo]|ffn\.\d)"
    expected = {}
    for name, (out, *of) in table.items():
        if re.fullmatch(rf"{layers}\.weight", name):
            layer = f"diffusion_model.{name.removesuffix('.weight')}"
            expected |= {f"{layer}.lora_A.weight": (2, *of), f"{layer}.lora_B.weight": (out, 2)}
            expected |= {} if is_ltx else {f"{layer}.alpha": ()}
    for file in exported("lora").files:
        assert {name: tuple(weight.shape) for name, weight in load_file(file).items()} == expected


def test_header(case: Case, exported: Any) -> None:
    """ComfyUI reads LTX's sizes from it, and where a latent frame lies: since 0.9.5 at its first pixel frame."""
    header = exported("full").header()
    about = json.loads(header["rats_video"])
    assert about["sigmas"]["4"] == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert about.get("boundary_ratio") == (0.875 if case.family is A14B else None)
    if case.family not in (LTX, LTX_095):
        assert "config" not in header
        return
    assert json.loads(header["config"]) == {"transformer": {
        "in_channels": 8, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "num_layers": 2,
        "caption_channels": 16, "causal_temporal_positioning": case.family is LTX_095,
    }}  # fmt: skip
    assert "config" not in exported("lora").header()


def test_diffusers_converters_give_the_student_back(case: Case, exported: Any) -> None:
    if case.family is not WAN:
        pytest.skip("exporting has sampled with the converted file")
    (file,) = exported("full").files
    back = convert_wan_transformer_to_diffusers(dict(load_file(file)))
    there = load_file(case.students["full"] / "transformer" / "diffusion_pytorch_model.safetensors")
    assert back.keys() == there.keys()
    assert all(torch.equal(back[name], weight) for name, weight in there.items())
    (file,) = exported("lora").files
    tensors = load_file(file)
    assert {float(tensor) for name, tensor in tensors.items() if name.endswith("alpha")} == {2.0}  # the rank
    there = load_file(case.students["lora"] / "pytorch_lora_weights.safetensors")
    back = _convert_non_diffusers_wan_lora_to_diffusers(dict(tensors))
    assert back.keys() == there.keys()
    a, b = (f"transformer.blocks.1.attn2.to_k.lora_{x}.weight" for x in "AB")
    torch.testing.assert_close(back[b] @ back[a], there[b] @ there[a] * 6 / 2)


def test_a_lora_for_musubi_tuner(case: Case, exported: Any) -> None:
    """The same under Kohya's names, by diffusers' converter of musubi-tuner's files; its alpha is the rank."""
    export = exported("lora")
    files = sorted((export.folder / "musubi-tuner").glob("*"))
    if "ltx" in case.family.name:
        assert files == []
        return
    assert [file.name for file in files] == [file.name for file in export.files]
    for file, same in zip(files, export.files, strict=True):
        kohya = _convert_musubi_wan_lora_to_diffusers(dict(load_file(file)))
        ours = _convert_non_diffusers_wan_lora_to_diffusers(dict(load_file(same)))
        assert kohya.keys() == ours.keys()
        assert all(torch.equal(kohya[name], weight) for name, weight in ours.items())
    assert kohya_name("diffusion_model.blocks.1.self_attn.q.lora_A.weight") == (
        "lora_unet_blocks_1_self_attn_q.lora_down.weight"
    )


def test_files_of_two_students_have_two_names(case: Case, exported: Any) -> None:
    for kind, end in (("full", ""), ("lora", "-lora")):
        stem = f"base-model-2-3-4steps-student{end}"
        experts = ("-high-noise", "-low-noise") if case.family is A14B else ("",)
        assert [file.name for file in exported(kind).files] == [f"{stem}{each}.safetensors" for each in experts]


# ------------------------------------------------------------------------------------------------------------- the card


def test_each_line_of_the_card_says_for_how_many_calls_it_is(case: Case, exported: Any) -> None:
    """With two experts also where to split, by the levels of 0.875 and more: 1, 0.9, 0.75, 0.5 or 1, 0.857, 0.6."""
    splits = {2: 1, 3: 1, 4: 2}
    for steps, split in splits.items():
        where = f", SplitSigmas at step {split}" if case.family is A14B else ""
        line = ", ".join(f"{sigma:.8f}" for sigma in sigma_grid(steps, SHIFT).tolist())
        assert f"{steps} calls{where}:\n\n```text\n{line}\n```" in exported("full").card
        assert f"ManualSigmas for {steps} calls{where}: {line}" in exported("full").printed


def test_card_speaks_of_the_nodes_of_its_model(case: Case, exported: Any) -> None:
    for kind, loader in (("lora", "LoraLoaderModelOnly"), ("full", "Load Diffusion Model")):
        card = exported(kind).card
        assert loader in card
        assert "from 0.7.0 on" in card
        assert ("There is no ready workflow" in card) == (case.family in (LTX, LTX_095))  # of 8 channels
        assert ("with `add_noise` off" in card) == (case.family is A14B)
        is_ltx = case.family in (LTX, LTX_095)
        assert ("LTXVConditioning with `frame_rate` 24 behind the prompt" in card) == is_ltx
        assert ("Use no ModelSamplingSD3: it ruins the clip" in card) == is_ltx
        assert ("ModelSamplingSD3 with shift 3 behind the model" in card) != is_ltx
        assert (
            "These are the same noise levels for 2, 4 calls. For 3 calls they are up to 0.00072 off" in card
        ) != is_ltx
        assert "Pipeline must be told" not in "\n".join([card, *exported(kind).printed])  # which is no node


def test_levels_of_comfyuis_simple_scheduler() -> None:
    """A model of 1000 timesteps, every 1000 / N-th from the last on; where N divides 1000 these are ours."""
    assert simple_levels(4, 3.0) == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert simple_levels(3, 1.0) == pytest.approx([1, 0.667, 0.334, 0])
    for steps in (1, 2, 4, 5, 8):
        assert simple_levels(steps, 5.0) == pytest.approx(sigma_grid(steps, 5.0).tolist(), abs=1e-6)


# -------------------------------------------------------------------------------------------------- what it cannot load


def test_sizes_that_comfyui_does_not_build_are_refused(command: Command, tmp_path: Path) -> None:
    code, out, err = command("export", "model", "tiny-wan-student", "--format", "comfyui", "--output", tmp_path / "new")
    assert (code, out) == (2, "")
    assert err.endswith(
        "tiny-wan/transformer/config.json: ComfyUI cannot load a Wan of attention_head_dim 64 (not 128), text_dim 64 "
        "(not 4096), out_channels 4 (not 16 or 48) (take --format diffusers or merged)\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("WanTransformer3DModel", "freq_dim", 128),
        ("WanTransformer3DModel", "eps", 1e-5),
        ("WanTransformer3DModel", "cross_attn_norm", False),
        ("LTXVideoTransformer3DModel", "patch_size_t", 2),
        ("LTXVideoTransformer3DModel", "attention_bias", False),
    ],
)
def test_each_fixed_value_counts(kind: str, key: str, value: object) -> None:
    model = MODELS[kind]
    good = {name: values[0] for name, values in model.fixed.items()}
    assert refusal({"_class_name": kind, **good}, is_lora=True) == ""
    found = refusal({"_class_name": kind, **good, key: value}, is_lora=False)
    assert found.startswith(f"ComfyUI cannot load a {model.name} of {key} {value} (not ")


def test_channels_that_comfyui_does_not_know_are_refused() -> None:
    config = {"_class_name": "WanTransformer3DModel", "in_channels": 52, "out_channels": 16}
    assert refusal(config, is_lora=True) == "its Wan takes 52 channels and makes 16: ComfyUI's takes 16 or 36"
    first_last = {**config, "in_channels": 36, "image_dim": 1280, "pos_embed_seq_len": 514}
    assert refusal(first_last, is_lora=True) == refusal({**first_last, "pos_embed_seq_len": None}, is_lora=False) == ""
    assert refusal(first_last, is_lora=False) == (
        "a Wan of first and last pictures cannot be checked: diffusers' converter knows no emb_pos"
    )
    cogvideox = {"_class_name": "CogVideoXTransformer3DModel", "in_channels": 32, "out_channels": 16}
    assert refusal(cogvideox, is_lora=True) == (
        "no names are known here for the weights of a CogVideoXTransformer3DModel but diffusers'"
    )


def test_an_image_to_video_model_has_its_first_names(tmp_path: Path) -> None:
    """Diffusers' converter gives back each of diffusers' weights, those that let the picture in too."""
    build_image_pipeline(tmp_path, clip_sees=1, experts=False)
    backbone = load_backbone(tmp_path)
    weights = whole_weights(backbone, "transformer")
    assert {"img_emb.proj.1.weight", "blocks.1.cross_attn.k_img.bias", "blocks.0.cross_attn.norm_k_img.weight"} <= set(
        weights
    )
    back = convert_wan_transformer_to_diffusers(dict(weights))
    there = backbone.parts["transformer"].state_dict()
    assert back.keys() == there.keys()
    assert all(torch.equal(back[name], weight) for name, weight in there.items())


def test_hunyuan_video_as_its_authors_published_it(tmp_path: Path) -> None:
    """Diffusers' converter, told this width in the place of its fixed 3072, gives back each of diffusers' weights."""
    HUNYUAN.build(tmp_path / "base")
    backbone = load_backbone(tmp_path / "base")
    source = inspect.getsource(convert_hunyuan_video_transformer_to_diffusers)
    assert source.count("3072") == 1
    found: dict[str, Any] = {"torch": torch}
    exec(source.replace("3072", "16"), found)
    weights = whole_weights(backbone, "transformer")
    back = found["convert_hunyuan_video_transformer_to_diffusers"](dict(weights))
    there = backbone.parts["transformer"].state_dict()
    assert back.keys() == there.keys()
    assert all(torch.equal(back[name], weight) for name, weight in there.items())
    assert {name: tuple(weights[f"{name}.weight"].shape) for name in (
        "double_blocks.0.img_attn_qkv", "double_blocks.0.txt_attn_qkv", "single_blocks.0.linear1",
        "txt_in.individual_token_refiner.blocks.0.self_attn_qkv",
    )} == {
        "double_blocks.0.img_attn_qkv": (48, 16), "double_blocks.0.txt_attn_qkv": (48, 16),
        "single_blocks.0.linear1": (80, 16), "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": (48, 16),
    }  # fmt: skip


def test_a_lora_that_diffusers_cannot_read_back_is_refused(tmp_path: Path) -> None:
    HUNYUAN.build(tmp_path / "base")
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(
        UserError, match=r"^--format comfyui: .*config.json: a LoRA on HunyuanVideo cannot be checked: diffusers' conv"
    ):
        ComfyUI().check(tmp_path, tmp_path / "base", HunyuanVideoBackbone, 1.0)


def test_weights_that_diffusers_cannot_read_back_are_not_kept(
    tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case.family is not WAN:
        pytest.skip("the same path")
    monkeypatch.setattr("rats_video.export.comfyui.PREFIX", "diffusion_model.odd.")
    order = ExportRequest("comfyui", str(case.students["lora"]), output=tmp_path / "out")
    with pytest.raises(UserError, match=r"^--format comfyui: stock diffusers cannot load or sample it"):
        run_export_model(order, "cpu")
    assert list(tmp_path.iterdir()) == []
