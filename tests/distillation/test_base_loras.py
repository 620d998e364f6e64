"""A LoRA of one's own under teacher and student is as the stock pipeline has it, and comes along to the end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.compute import LoraConfig
from rats_video.backbones.lora import LORA_FILE
from rats_video.backbones.low_bit import LowBitLinear
from rats_video.backbones.wan import WanBackbone
from rats_video.commands.students import load_student
from rats_video.distillation.roles import build_backbone, build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.distillation.teacher_identity import teacher_identity
from rats_video.errors import UserError
from rats_video.export.comfyui import PREFIX, kohya_name, original_name
from rats_video.seeds import seeded

pytestmark = pytest.mark.pipeline

CPU = torch.device("cpu")
SCALE = 0.75
LORA = ("student.weights.kind=lora", "student.weights.rank=2", "student.weights.alpha=2")
Make = Callable[..., DistillConfig]


@pytest.fixture(scope="module")
def files(loaded: WanBackbone, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One LoRA, rank 3 and alpha 6, under diffusers', the original and Kohya's names."""
    folder = tmp_path_factory.mktemp("styles")
    lora = LoraConfig(kind="lora", rank=3, alpha=6)  # of all layers: diffusers reads no other Kohya file of Wan
    role = loaded.with_own_denoiser().with_adapter("s", lora)
    with torch.no_grad():
        for i, weight in enumerate(role.weights.values()):
            weight.add_(0.1 * torch.randn(weight.shape, generator=seeded(7, i)))
    role.save_role(folder / "diffusers")
    named = {"diffusers": folder / "diffusers" / LORA_FILE}
    tensors = {PREFIX + original_name(loaded, key.removeprefix("transformer.")): value.contiguous()
               for key, value in load_file(named["diffusers"]).items()}  # fmt: skip
    alphas = {re.sub(r"lora_A\.weight$", "alpha", key): torch.tensor(6.0) for key in tensors if "lora_A" in key}
    for kind, name in (("original", str), ("kohya", kohya_name)):
        named[kind] = folder / f"{kind}.safetensors"
        save_file({name(key): value for key, value in (tensors | alphas).items()}, named[kind])
    return named


def under(*paths: Path) -> str:
    return f"base_loras={json.dumps([{'path': str(path), 'scale': SCALE} for path in paths])}"


def velocity(role: PipelineBackbone, text: PipelineBackbone) -> Tensor:
    noise = torch.randn(1, 4, 2, 4, 4, generator=seeded(3))
    with torch.no_grad():
        return role.velocity(noise, torch.tensor([0.7]), text.encode_text(["a red circle"]))


@pytest.fixture(scope="module")
def stock(tiny_wan: Path, files: dict[str, Path], loaded: WanBackbone) -> Tensor:
    """The velocity of the stock pipeline with `load_lora_weights`, at that scale."""
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(tiny_wan)
    pipeline.load_lora_weights(files["diffusers"].parent, weight_name=LORA_FILE, adapter_name="style")
    pipeline.set_adapters("style", SCALE)
    return velocity(WanBackbone(**{**loaded.parts, "transformer": pipeline.transformer}), loaded)


@pytest.mark.parametrize("kind", ["diffusers", "original", "kohya"])
@pytest.mark.parametrize("weights", ["full", "lora"])
def test_teacher_and_student_start_as_the_stock_pipeline_with_it(
    make_config: Make, loaded: WanBackbone, files: dict[str, Path], stock: Tensor, kind: str, weights: str
) -> None:
    cfg = make_config(*(LORA if weights == "lora" else ()), under(files[kind]))
    student, teacher = build_roles(cfg, build_backbone(cfg, CPU))
    for role in (student, teacher):
        torch.testing.assert_close(velocity(role, loaded), stock, atol=1e-5, rtol=0)
    assert (stock - velocity(loaded, loaded)).abs().max() > 0.01


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_over_a_base_in_few_bits_it_is_kept_under_every_role(
    make_config: Make, loaded: WanBackbone, files: dict[str, Path], quantization: str
) -> None:
    """The same as the dequantised weights plus scale * alpha / rank * B A; of two, both."""
    file = files["diffusers"]
    bits = (*LORA, f"compute.quantization={quantization}")
    cfg = make_config(*bits, "teacher.kind=ema", "teacher.num_steps=4", under(file, file))
    student, teacher = build_roles(cfg, build_backbone(cfg, CPU))
    plain = build_backbone(make_config(*bits), CPU)
    for path, layer in list(plain.denoiser.named_modules()):
        if isinstance(layer, LowBitLinear):
            dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            dense.weight.data, dense.bias = layer.matrix(torch.float32), layer.bias
            a, b = (load_file(file).get(f"transformer.{path}.lora_{side}.weight") for side in "AB")
            if a is not None and b is not None:
                dense.weight.data += 2 * SCALE * 6 / 3 * b @ a
            plain.denoiser.set_submodule(path, dense)
    expected = velocity(plain, loaded)
    for role in (student, teacher):
        torch.testing.assert_close(velocity(role, loaded), expected, atol=1e-5, rtol=0)
    assert student.adapters is not None
    trained = {id(weight) for weight in student.weights.values()}
    assert {id(w) for w in student.denoiser.parameters() if w.requires_grad} == trained
    student.denoiser.zero_grad()
    for weight in student.weights.values():
        weight.data += 0.1
    assert (velocity(student, loaded) - expected).abs().max() > 1e-3
    torch.testing.assert_close(velocity(teacher, loaded), expected, atol=1e-5, rtol=0)


def test_stored_rollouts_of_a_teacher_without_it_do_not_count(make_config: Make, files: dict[str, Path]) -> None:
    one, other = make_config(under(files["diffusers"])), make_config(under(files["kohya"]))
    ids = [teacher_identity(cfg, cfg.teacher) for cfg in (make_config(), one, other)]  # type: ignore[arg-type]
    assert "base_loras" not in ids[0]
    assert ids[1]["base_loras"] != ids[2]["base_loras"]


def changed(folder: Path, file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    save_file({key: value.contiguous() for key, value in change(load_file(file)).items()}, folder / "odd.safetensors")
    return folder / "odd.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda all_: {k: v for k, v in all_.items() if "blocks.1.attn1.to_q.lora_B" not in k},
         r"is not whole: blocks.1.attn1.to_q lacks lora_B \(download or save it again\)"),
        (lambda all_: {k: v[:2] if "blocks.1.attn1.to_q.lora_A" in k else v for k, v in all_.items()},
         r"is damaged: blocks.1.attn1.to_q has rank 2 in lora_A and 3 in lora_B"),
        (lambda all_: {k.replace("blocks.1.attn1", "single_transformer_blocks.1.attn"): v for k, v in all_.items()},
         r"was trained on another model: this one has no single_transformer_blocks.1.attn.to_[kq] \(give one that"),
        (lambda all_: {k: v.repeat(1, 2) if "lora_A" in k else v for k, v in all_.items()},
         r"was trained on another model: blocks.0.attn1.to_[kq] has 32 channels there, 16 here"),
        (lambda _: {"nothing": torch.zeros(1)}, "holds nothing for a WanTransformer3DModel"),
    ],
    ids=["half a pair", "two ranks", "another family", "another size", "no LoRA"],
)  # fmt: skip
def test_what_does_not_fit_gets_a_line(
    make_config: Make, files: dict[str, Path], tmp_path: Path, change: Any, message: str
) -> None:
    file = changed(tmp_path, files["diffusers"], change)
    with pytest.raises(UserError, match=rf"^base_loras {file}: {message}"):
        build_backbone(make_config(under(file)), CPU)


def test_a_file_that_is_not_there_is_told_before_anything_is_loaded(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^base_loras.1.path: no such file: {tmp_path}/gone \(give a LoRA's"):
        build_backbone(make_config(under(Path(__file__), tmp_path / "gone")), CPU)


def test_it_comes_along_to_sample_and_export(
    command: Callable[..., Any], config_file: Path, files: dict[str, Path], tmp_path: Path, loaded: WanBackbone
) -> None:
    run, file = tmp_path / "run", files["kohya"]
    options = [part for each in (*LORA, under(file), "training.steps=1") for part in ("--set", each)]
    done = command("distill", "--config", config_file, "--output", run, *options)
    assert done.code == 0, done.err
    student = load_student(run, CPU)
    assert [lora.path for lora in student.card.base_loras] == [str(file)]
    for kind in ("lora", "merged"):  # each is compared with the stock pipeline
        exported = command("export", "model", run, "--format", kind, "--output", tmp_path / kind)
        assert exported.code == 0, exported.err
        card = (tmp_path / kind / "README.md").read_text()
        assert f"- over {file.name}, a LoRA, at scale 0.75" in card
    note = f"it was trained over {file.name} at scale 0.75, which belongs under it"
    assert f"Mind: {note}." in (tmp_path / "lora" / "README.md").read_text()
    assert "Mind:" not in card
    merged = load_file(next((tmp_path / "merged" / "transformer").glob("*.safetensors")))
    key, style, own = "blocks.0.attn1.to_q", load_file(files["diffusers"]), load_file(run / "student" / LORA_FILE)
    deltas = [(own, 1.0), (style, SCALE * 6 / 3)]
    expected = loaded.weights[f"{key}.weight"].detach().clone()
    for tensors, factor in deltas:
        expected += factor * tensors[f"transformer.{key}.lora_B.weight"] @ tensors[f"transformer.{key}.lora_A.weight"]
    torch.testing.assert_close(merged[f"{key}.weight"], expected, atol=1e-6, rtol=0)
    (run / "student" / "rats.json").write_text(
        (run / "student" / "rats.json").read_text().replace(file.name, "gone.safetensors")
    )
    gone = command("sample", "--model", run, "--prompt", "a red circle", "--output", tmp_path / "clips")
    assert gone.code == 2
    assert re.search(r"rats.json: base_loras.0.path: no such file: .*gone.safetensors", gone.err)
