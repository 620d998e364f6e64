"""A base in few bits computes as its dequantised weights do, whatever it was read from, and is never there twice."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import LORA, PROMPTS, Case, disturb
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.kinds import load_backbone
from rats_video.backbones.low_bit import LowBitLinear, bits_of, low_bit_layers, quantise, to_nf4
from rats_video.errors import UserError
from rats_video.reading import read_json
from rats_video.seeds import seeded

CUBE = torch.linspace(-1, 1, 128).view(2, 64) ** 3
CUBE[1] *= 0.5
CUBE[1, -1] = 0.5
# By bitsandbytes 0.50.2: quantize_4bit(CUBE, quant_type="nf4", blocksize=64), plain and with compress_statistics.
CODES = bytes.fromhex(
    "00001111112222233333444445555556666666666777777777777777777777777777777777777777777777888888888999999aaaaabbbbccccdddddeeeeeffff"
)
NESTED = {"absmax": [255, 0], "nested_absmax": [0.25], "nested_offset": 0.75, "levels": (-0.992968738079071, 1.0)}
NESTED_SUM = -7.962165858596563  # of its dequantised weights


# ------------------------------------------------------------------------------------------------------- arithmetic


def test_nf4_is_the_one_of_bitsandbytes() -> None:
    codes, scale = to_nf4(CUBE)
    assert bytes(codes.tolist()) == CODES
    assert scale.tolist() == [1.0, 0.5]
    assert LowBitLinear.of(CUBE, "nf4").matrix(torch.float32).double().sum().item() == pytest.approx(-7.991089906543493)


def test_nf4_of_zeros_and_of_a_part_of_a_block() -> None:
    assert not LowBitLinear.of(torch.zeros(4, 64), "nf4").matrix(torch.float32).any()
    odd = torch.randn(3, 7, generator=seeded(0))  # 21 weights: a third of a block
    matrix = LowBitLinear.of(odd, "nf4").matrix(torch.float32)
    assert matrix.shape == (3, 7)
    assert (matrix - odd).abs().max() <= 0.16 * odd.abs().max()  # half of the widest gap between levels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_the_one_of_torchao(dtype: torch.dtype) -> None:
    from torchao.quantization import Int8Tensor, PerRow

    weight = torch.randn(24, 40, generator=seeded(0)).to(dtype)
    assert torch.equal(LowBitLinear.of(weight, "int8").matrix(dtype), Int8Tensor.from_hp(weight, PerRow()).dequantize())


@pytest.mark.parametrize("quantization", ["int8", "fp8", "nf4"])
def test_a_layer_is_the_linear_layer_of_its_matrix_and_saves_no_matrix(quantization: str) -> None:
    bias = nn.Parameter(torch.randn(48, generator=seeded(1)))
    layer = LowBitLinear.of(torch.randn(48, 64, generator=seeded(0)), quantization, bias)
    inputs = torch.randn(2, 5, 64, generator=seeded(2))
    ours, theirs = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        out = layer(ours)
    assert sum(tensor.nbytes for tensor in saved) == layer.weight.nbytes + layer.scale.nbytes
    plain = nn.functional.linear(theirs, layer.matrix(torch.float32), bias)
    assert torch.equal(out, plain)
    out.square().sum().backward()
    plain.square().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    bits = 8 * (layer.weight.nbytes + layer.scale.nbytes) / (48 * 64)
    assert bits == pytest.approx({"int8": 8.5, "fp8": 8.5, "nf4": 4.25}[quantization])  # a float32 each row of 64
    assert not any(weight.requires_grad for weight in layer.parameters())


# ----------------------------------------------------------------------------------------------------- every family


def dequantised(backbone: PipelineBackbone) -> PipelineBackbone:
    """The same model with plain layers in place of those in few bits."""
    other = copy.copy(backbone)
    for network in other.denoisers.values():
        for path, module in list(network.named_modules()):
            if isinstance(module, LowBitLinear):
                plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
                plain.weight.data = module.matrix(network.dtype)
                plain.bias = module.bias
                network.set_submodule(path, plain)
    return other


def adapter_gradients(case: Case, backbone: PipelineBackbone) -> list[Tensor]:
    torch.manual_seed(3)
    student = backbone.with_adapter("student", LORA)
    with torch.no_grad():
        disturb(student)
    loss = student.velocity(case.noise, case.sigma, case.backbone.encode_text(PROMPTS)).square().mean()
    weights = list(student.weights.values())  # not all are used: the last block's text goes nowhere in some families
    return [loss.detach(), *torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_adapters_train_as_on_the_dequantised_base(case: Case, quantization: str) -> None:
    base = load_backbone(case.folder, with_text=False, quantization=quantization)
    own = dict(case.backbone.denoiser.named_parameters()) | dict(case.backbone.denoiser.named_buffers())
    layers = {id(weight) for layer in low_bit_layers(base.denoiser) for weight in (layer.weight, layer.scale)}
    assert len(layers) > 0
    for name, weight in (*base.denoiser.named_parameters(), *base.denoiser.named_buffers()):
        if id(weight) not in layers:
            assert torch.equal(weight, own[name]), name
            assert weight.dtype == own[name].dtype
    for name, layer in base.denoiser.named_modules():
        if isinstance(layer, LowBitLinear):  # the nearest that there is
            error = (layer.matrix(torch.float32) - own[f"{name}.weight"]).norm() / own[f"{name}.weight"].norm()
            assert error < {"int8": 0.01, "nf4": 0.12}[quantization], name
    again = load_backbone(case.folder, with_text=False, quantization=quantization)
    base.fps = again.fps = case.backbone.fps
    ours, theirs = adapter_gradients(case, base), adapter_gradients(case, dequantised(again))
    assert max(float(gradient.abs().max()) for gradient in ours[1:]) > 1e-4
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def folder(tiny_wan: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_wan, tmp_path / "model"))


def say(folder: Path, **config: Any) -> None:
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(read_json(file) | config))


def matrices(backbone: PipelineBackbone) -> dict[str, Tensor]:
    modules = backbone.denoiser.named_modules()
    return {name: layer.matrix(torch.float32) for name, layer in modules if isinstance(layer, LowBitLinear)}


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_a_folder_of_torchao_is_taken_as_it_is(folder: Path, quantization: str) -> None:
    from diffusers import TorchAoConfig, WanTransformer3DModel
    from torchao.quantization import Float8WeightOnlyConfig, FqnToConfig, Int8WeightOnlyConfig

    kind = Int8WeightOnlyConfig if quantization == "int8" else Float8WeightOnlyConfig
    config = TorchAoConfig(FqnToConfig({r"re:.*blocks\.\d+\..*": kind(), "proj_out": kind()}))
    plain = load_backbone(folder)
    quantise(plain.denoiser, quantization)
    network = WanTransformer3DModel.from_pretrained(
        folder / "transformer", torch_dtype=torch.float32, quantization_config=config
    )
    network.save_pretrained(folder / "transformer")
    stored = load_backbone(folder)
    assert bits_of(stored.denoiser) == quantization
    ours, theirs = matrices(stored), matrices(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert type(stored.denoiser.proj_out) is nn.Linear  # outside the blocks in full
    assert torch.equal(stored.denoiser.proj_out.weight, network.proj_out.weight.dequantize())
    with pytest.raises(UserError, match=rf"^compute.quantization: is nf4, but .*transformer holds {quantization} \("):
        load_backbone(folder, quantization="nf4")


def as_bitsandbytes(folder: Path, *, nested: bool) -> dict[str, Tensor]:
    """Rewrite a denoiser's linear layers as `BitsAndBytesConfig(load_in_4bit=True)` stores them: all CUBE."""
    file = next((folder / "transformer").glob("*.safetensors"))
    tensors, replaced = load_file(file), {}
    for name in [name for name in tensors if name.endswith("to_q.weight")]:
        rows, columns = tensors[name].shape
        count = rows * columns // 64
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [rows, columns]}
        tensors[name] = torch.tensor(list(CODES)).to(torch.uint8).repeat(count // 2)[:, None]
        tensors[f"{name}.quant_map"] = torch.zeros(16)
        if nested:
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": NESTED["nested_offset"]}
            levels = torch.zeros(256)
            levels[0], levels[255] = NESTED["levels"]
            tensors[f"{name}.absmax"] = torch.tensor(NESTED["absmax"]).to(torch.uint8).repeat(count // 2)
            tensors[f"{name}.nested_absmax"] = torch.tensor(NESTED["nested_absmax"])
            tensors[f"{name}.nested_quant_map"] = levels
        else:
            tensors[f"{name}.absmax"] = torch.tensor([1.0, 0.5]).repeat(count // 2)
        packed = torch.tensor(list(json.dumps(state).encode())).to(torch.uint8)
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = packed
        replaced[name.removesuffix(".weight")] = tensors[name]
    save_file(tensors, file)
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    say(folder, quantization_config=method)
    return replaced


@pytest.mark.parametrize("expected", [-7.991089906543493, NESTED_SUM], ids=["plain", "nested"])
def test_a_folder_of_bitsandbytes_is_taken_as_it_is(folder: Path, expected: float) -> None:
    replaced = as_bitsandbytes(folder, nested=expected == NESTED_SUM)
    stored = load_backbone(folder, quantization="nf4")
    found = matrices(stored)
    assert found.keys() == replaced.keys()
    for matrix in found.values():
        assert matrix.double().sum().item() / (matrix.numel() / 128) == pytest.approx(expected)
    assert type(stored.denoiser.blocks[0].attn1.to_k) is nn.Linear


def damage(change: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        as_bitsandbytes(folder, nested=False)
        file = next((folder / "transformer").glob("*.safetensors"))
        tensors = load_file(file)
        name = "blocks.0.attn1.to_q.weight"
        if change == "scales":
            tensors[f"{name}.absmax"] = tensors[f"{name}.absmax"][:1]
        elif change == "state":
            tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.zeros(3, dtype=torch.uint8)
        else:
            del tensors[name]
        save_file(tensors, file)

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage("scales"), r"blocks.0.attn1.to_q.weight has 128 bytes and 1 scales for \[16, 16\]"),
        (damage("state"), "cannot load it as a Wan pipeline: transformer/: Expecting value"),
        (damage("weight"), "no weights for blocks.0.attn1.to_q.weight"),
        (lambda folder: say(folder, quantization_config={"quant_method": "gguf"}), "is quantised by gguf .give the"),
        (lambda folder: say(folder, quantization_config=3), "is quantised by an unknown method"),
        (
            lambda folder: say(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
            "is quantised by bitsandbytes .give the model that is not quantised, int8 or fp8 of torchao",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_read_gets_a_line(folder: Path, change: Callable[[Path], None], message: str) -> None:
    change(folder)
    with pytest.raises(UserError, match=message):
        load_backbone(folder)


def test_the_base_is_never_there_in_full(folder: Path) -> None:
    from diffusers import WanTransformer3DModel

    config = read_json(folder / "transformer" / "config.json")
    shape = {"num_layers": 3, "num_attention_heads": 8, "attention_head_dim": 32, "ffn_dim": 512}
    wide = WanTransformer3DModel.from_config(config | shape)
    wide.save_pretrained(folder / "transformer")
    in_full = sum(weight.nbytes for weight in wide.parameters())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        base = load_backbone(folder, with_text=False, quantization="nf4")
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    (mapped,) = (file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))
    live = peak = 0
    for event in sorted((each for each in events if each.nbytes() != mapped), key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    held = sum(weight.nbytes for weight in (*base.denoiser.parameters(), *base.vae.parameters()))
    largest = max(weight.nbytes for weight in wide.parameters())
    assert held < 0.4 * in_full
    assert peak < held + 3 * largest < 0.75 * in_full
