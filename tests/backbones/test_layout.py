"""Published folders as people have them: variants, shards, pickles, other layouts, folders around and inside."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from rats_video.backbones.folder import read_index
from rats_video.backbones.kinds import load_backbone
from rats_video.backbones.wan import WanBackbone
from rats_video.errors import UserError
from rats_video.export.comfyui import original_name

KEPT = ("time_embedder", "scale_shift_table", "norm2")  # of Wan: float32 whatever a folder is saved as


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_backbone(folder)
    return str(caught.value).removeprefix(f"{folder}")


@pytest.mark.parametrize("stored", ["fp16", "bf16"])
def test_weights_that_are_there_as_a_variant_alone(tiny_wan: Path, tmp_path: Path, stored: str) -> None:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[stored]
    pipeline = WanPipeline.from_pretrained(tiny_wan, dtype=dtype)
    pipeline.save_pretrained(tmp_path, variant=stored)
    for part in (pipeline.transformer, pipeline.text_encoder) if stored == "fp16" else ():  # in shards
        shutil.rmtree(folder := tmp_path / ("text_encoder" if part is pipeline.text_encoder else "transformer"))
        part.save_pretrained(folder, variant=stored, max_shard_size="3KB")
        assert list(folder.glob("*.safetensors.index.fp16.json"))
    ours, whole = load_backbone(tmp_path), load_backbone(tiny_wan)
    for name, weight in ours.weights.items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, whole.weights[name], atol=0, rtol=2**-8)
    text, close = whole.encode_text(["a red circle"]).embeds, ours.encode_text(["a red circle"]).embeds
    assert 0 < (text - close).abs().max() < 0.02


def test_fp16_files_are_read_into_the_runs_dtype(tiny_wan: Path, tmp_path: Path) -> None:
    """As CogVideoX-2b and HunyuanVideo's text encoder are stored. The VAE and some norms stay in float32."""
    WanPipeline.from_pretrained(tiny_wan, dtype=torch.float16).save_pretrained(tmp_path, variant="fp16")
    files = [path for path in tmp_path.rglob("*.safetensors") if path.name.endswith(".fp16.safetensors")]
    stored = {path.parent.name: load_file(path) for path in files}
    loaded = load_backbone(tmp_path, dtype=torch.bfloat16)
    for part, dtype in (("transformer", torch.bfloat16), ("text_encoder", torch.bfloat16), ("vae", torch.float32)):
        state = loaded.parts[part].state_dict()
        assert stored[part].keys() <= state.keys()
        for name, weight in stored[part].items():
            kept = part == "transformer" and weight.dtype == torch.float32
            assert kept == (part == "transformer" and any(word in name for word in KEPT)), name
            wanted = weight.to(torch.float32 if kept else dtype)
            assert state[name].dtype == wanted.dtype, (part, name)
            assert torch.equal(state[name], wanted), (part, name)
    assert loaded.encode_text(["a red circle"]).embeds.dtype == torch.bfloat16


def test_two_variants_and_nothing_else(tiny_wan: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_wan, tmp_path / "model"))
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_suffix(".bf16.safetensors"))
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    assert refusal(folder) == "/vae: holds weights as bf16, fp16 (leave the files of one of them in it)"


def test_pickles_are_refused_with_the_line_that_converts_them(tiny_wan: Path, tmp_path: Path) -> None:
    folder = tmp_path / "it's $(a) model"
    WanPipeline.from_pretrained(tiny_wan).save_pretrained(folder, safe_serialization=False)
    part, _, line = refusal(folder).partition(" (convert them once: ")
    assert part.endswith(": only has pickled weights, which can run code when they are loaded")
    _, _, code = shlex.split(line.removesuffix(")"))  # as a shell takes it
    exec(code, {})
    assert load_backbone(tmp_path / "it's $(a) model-safetensors").weights


def test_download_that_was_cut(tiny_wan: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_wan, tmp_path / "model"))
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert refusal(folder) == "/transformer: holds no weights: no .safetensors file in it (download it again)"


# ------------------------------------------------------------------------------------------------- other layouts


MADE = "give the folder that pipeline.save_pretrained or a hub download made"
WAN_14B = "80 GB: hf download Wan-AI/Wan2.1-T2V-14B-Diffusers --local-dir models/Wan2.1-T2V-14B-Diffusers"
LTX = "25 GB: hf download Lightricks/LTX-Video --exclude 'ltx*' --local-dir models/LTX-Video"


@pytest.mark.parametrize(
    ("given", "files", "message"),
    [
        ("empty", [], f"it is empty ({MADE})"),
        ("notes", ["README.md"], f"no model_index.json in it ({MADE})"),
        ("wan", ["model_index.json"], f"its model_index.json cannot be read ({MADE})"),
        ("run/student", ["rats.json"], "it is a student (give the folder of its base, which its rats.json names)"),
        ("wan/vae", ["config.json", "../model_index.json"], "it is the vae of one (give {root}/wan)"),
        ("cache", ["snapshots/r/model_index.json"], "no model_index.json in it (give {root}/cache/snapshots/r)"),
        ("around", ["wan/model_index.json"], "no model_index.json in it (give {root}/around/wan)"),
        (
            "Wan2.1-T2V-14B", ["Wan2.1_VAE.pth", "config.json", "google/umt5-xxl/spiece.model"],
            "it holds Wan2.1_VAE.pth and no model_index.json, as the original authors' layout does {wan}",
        ),
        (
            "ltx-video", ["ltxv-13b.safetensors"],
            "it holds ltxv-13b.safetensors and no model_index.json, as the original authors' layout does {ltx}",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)  # fmt: skip
def test_folder_that_is_no_pipeline_is_told_for_what_it_is(
    tmp_path: Path, given: str, files: list[str], message: str
) -> None:
    folder = tmp_path / given
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    with pytest.raises(UserError) as caught:
        read_index(folder)
    nearest = {name: f"(give one, such as that of: {line})" for name, line in (("wan", WAN_14B), ("ltx", LTX))}
    assert str(caught.value) == f"{folder}: not a diffusers pipeline: {message.format(root=tmp_path, **nearest)}"


# ------------------------------------------------------------------------------------------- told by its networks


def relabelled(folder: Path, target: Path, pipeline: str, **config: object) -> Path:
    shutil.copytree(folder, target)
    index = target / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": pipeline}))
    path = target / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


def test_another_pipeline_of_the_same_networks_loads(tiny_wan: Path, tmp_path: Path) -> None:
    folder = relabelled(tiny_wan, tmp_path / "model", "WanVideoToVideoPipeline")
    assert load_backbone(folder).family == "Wan"


@pytest.mark.parametrize(
    ("pipeline", "taken", "message"),
    [
        ("WanVideoToVideoPipeline", 36, "it needs an image or a video to start from (give a text-to-video model)"),
        ("WanImageToVideoPipeline", 16, "it has none for a picture (give an image-to-video model)"),
    ],
)
def test_other_channels_are_refused_before_weights_are_read(
    tiny_wan: Path, tmp_path: Path, pipeline: str, taken: int, message: str
) -> None:
    folder = relabelled(tiny_wan, tmp_path / "model", pipeline, in_channels=taken, out_channels=16)
    assert refusal(folder) == f": its transformer takes {taken} channels and makes 16: {message}"


def test_other_networks_are_refused_by_the_name_of_their_pipeline(tiny_wan: Path, tmp_path: Path) -> None:
    folder = relabelled(tiny_wan, tmp_path / "model", "MochiPipeline")
    index = folder / "model_index.json"
    content = json.loads(index.read_text())
    content["transformer"] = ["diffusers", "MochiTransformer3DModel"]
    index.write_text(json.dumps(content))
    assert refusal(folder).startswith(": is a MochiPipeline (give one of: WanPipeline, WanImageToVideoPipeline, ")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_single_file_becomes_a_folder_by_the_lines_in_the_docs(tiny_wan: Path, tmp_path: Path, prefix: str) -> None:
    weights = load_file(tiny_wan / "transformer" / "diffusion_pytorch_model.safetensors")
    tuned = {name: weight + 0.01 for name, weight in weights.items()}
    names = {prefix + original_name(WanBackbone, name): weight for name, weight in tuned.items()}  # type: ignore[arg-type]
    save_file(names, tmp_path / "finetune.safetensors")
    page = Path(__file__).parents[2] / "docs" / "models.md"
    (lines,) = re.findall(r"```python\n(import diffusers\n.*?)```", page.read_text(), re.DOTALL)
    for ours, theirs in (
        (tiny_wan, "models/Wan2.1-T2V-1.3B-Diffusers"), (tmp_path / "finetune.safetensors", "finetune.safetensors"),
        (tmp_path / "made", "models/finetune"),
    ):  # fmt: skip
        lines = lines.replace(f'"{theirs}"', repr(str(ours)))
    exec(lines, {})
    loaded = load_backbone(tmp_path / "made").denoiser.state_dict()
    assert loaded.keys() == tuned.keys()
    assert all(torch.equal(loaded[name], weight.bfloat16().float()) for name, weight in tuned.items())
