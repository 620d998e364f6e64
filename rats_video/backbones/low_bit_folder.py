"""Reads a denoiser into few bits: quantised matrix by matrix as it is read, or as it was stored."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rats_video.backbones.layout import weight_files, weights_variant
from rats_video.backbones.low_bit import BLOCKS, NF4_BLOCK, LowBitLinear, bits_of
from rats_video.errors import UserError
from rats_video.reading import check_plain_file, read_sizes

WHERE = "compute.quantization"
_STATE = "quant_state.bitsandbytes__nf4"


def load_low_bit(
    kind: Any, folder: Path, device: torch.device | str, dtype: torch.dtype, quantization: str
) -> nn.Module | None:
    """A denoiser of class `kind` whose blocks' matrices are in few bits; they are never there in full all at once.

    Args:
        kind: a diffusers model's class.
        folder: of its configuration and weights.
        device: where it goes.
        dtype: of what is not quantised, but for the layers that its class keeps in float32.
        quantization: `int8` or `nf4`; `none` takes a quantised folder as it is.

    Returns:
        The network; None where the folder is not quantised and shall not be.

    Raises:
        UserError: the folder is quantised, but otherwise.
        ValueError: it lacks weights, or has one of another shape.
    """
    stored = read_sizes(folder / "config.json").get("quantization_config")
    if stored is None:
        return None if quantization == "none" else _read(kind, folder, device, dtype, quantization)
    stored = stored if isinstance(stored, dict) else {}
    if stored.get("quant_method") == "torchao":
        network = _from_torchao(kind, folder, dtype).to(device)
    elif stored.get("load_in_4bit") is True and stored.get("bnb_4bit_quant_type") == "nf4":
        network = _read(kind, folder, device, dtype, "none")
    else:
        raise _refuse(folder, f"is quantised by {stored.get('quant_method', 'an unknown method')}")
    if quantization not in {"none", bits_of(network)}:
        raise UserError(
            f"is {quantization}, but {folder} holds {bits_of(network)}", where=WHERE,
            fix="set it to none, or give the model that is not quantised",
        )  # fmt: skip
    return network


def check_quantiser(quantization: str) -> None:
    """Raise UserError, before anything is read, where the library is missing that makes such bits."""
    if quantization == "int8" and importlib.util.find_spec("torchao") is None:
        raise UserError("int8 needs torchao", where=WHERE, fix="pip install 'rats-video[quant]', or take nf4")


def refuse_low_bit(network: nn.Module, *, where: str) -> None:
    """Raise UserError for a network in few bits, whose weights cannot train; `where` chooses their kind."""
    if (bits := bits_of(network)) != "none":
        raise UserError(f"full trains all weights, and the base's are in {bits}", where=where,
                        fix="set it to lora, or give a model that is not quantised")  # fmt: skip


def _refuse(folder: Path, what: str) -> UserError:
    fix = "give the model that is not quantised, int8 or fp8 of torchao (weights alone), or nf4 of bitsandbytes"
    return UserError(what, where=str(folder), fix=fix)


@torch.no_grad()
def _read(kind: Any, folder: Path, device: torch.device | str, dtype: torch.dtype, quantization: str) -> nn.Module:
    """The network, filled tensor by tensor."""
    weights_variant(folder)  # raises for pickles, and where there is nothing
    network = _empty(kind, folder, dtype)
    wanted = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    kept = set(kind._keep_in_fp32_modules or ())  # noqa: SLF001  # what diffusers itself reads
    with _Tensors(folder) as tensors:
        if missing := sorted(name for name, _ in network.named_parameters() if name not in tensors.files):
            raise ValueError(f"no weights for {missing[0]}")
        for key in sorted(wanted.keys() & tensors.files.keys()):
            path, _, name = key.rpartition(".")
            module, precision = network.get_submodule(path), torch.float32 if kept & set(key.split(".")) else dtype
            stored = tensors.nf4(key, tuple(wanted[key].shape)) if f"{key}.absmax" in tensors.files else None
            value = tensors.get(key).to(device, precision) if stored is None else stored.to(device).matrix(precision)
            if value.shape != wanted[key].shape:
                raise ValueError(f"{key} is {list(value.shape)}, not {list(wanted[key].shape)}")
            is_low_bit = name == "weight" and re.fullmatch(BLOCKS, path) and (stored or quantization != "none")
            if isinstance(module, nn.Linear) and is_low_bit:
                layer = LowBitLinear.of(value, quantization) if stored is None else stored.to(device)
                layer.register_parameter("bias", module.bias)
                network.set_submodule(path, layer)
            else:
                setattr(module, name, nn.Parameter(value) if isinstance(wanted[key], nn.Parameter) else value)
    return network.to(device).eval()


def _empty(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """The network as `from_pretrained` builds it before it reads: parameters on `meta`, buffers computed."""
    from accelerate import init_empty_weights

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights(include_buffers=False):
            network: nn.Module = kind.from_config(read_sizes(folder / "config.json"))
    finally:
        torch.set_default_dtype(before)
    return network


class _Tensors(ExitStack):
    """The tensors of a folder's files, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.files: dict[str, Any] = {}
        for path in weight_files(folder):
            check_plain_file(path)
            file = self.enter_context(safe_open(path, framework="pt"))
            self.files |= dict.fromkeys(file.keys(), file)

    def get(self, key: str) -> Tensor:
        """One of them."""
        tensor: Tensor = self.files[key].get_tensor(key)
        return tensor

    def nf4(self, key: str, shape: tuple[int, ...]) -> LowBitLinear:
        """A matrix of this shape as bitsandbytes stores it: codes, and scales that may be in 8 bits themselves."""
        state = json.loads(bytes(self.get(f"{key}.{_STATE}").tolist()))
        if (state["blocksize"], tuple(state["shape"])) != (NF4_BLOCK, shape):
            found = f"{state['shape']} in blocks of {state['blocksize']}"
            raise ValueError(f"{key} is {found}, not {list(shape)} of {NF4_BLOCK}")
        scale = self.get(f"{key}.absmax")
        if "nested_blocksize" in state:
            levels = self.get(f"{key}.nested_quant_map")[scale.int()]
            outer = self.get(f"{key}.nested_absmax").repeat_interleave(state["nested_blocksize"])
            scale = levels * outer[: len(levels)] + state["nested_offset"]
        codes = self.get(key).flatten()
        if len(scale) != -(-math.prod(shape) // NF4_BLOCK) or 2 * len(codes) != NF4_BLOCK * len(scale):
            raise ValueError(f"{key} has {len(codes)} bytes and {len(scale)} scales for {list(shape)}")
        return LowBitLinear((shape[0], shape[1]), codes, scale.float(), None)


def _from_torchao(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A network that diffusers reads, its torchao tensors turned into layers of ours bit by bit."""
    from torchao.quantization import Float8Tensor, Int8Tensor
    from torchao.utils import TorchAOBaseTensor

    network: nn.Module
    network, info = kind.from_pretrained(
        folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(f"no weights for {min(info['missing_keys'])}")
    for path, module in list(network.named_modules()):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, TorchAOBaseTensor):
            continue
        is_plain = isinstance(weight, Int8Tensor | Float8Tensor) and weight.act_quant_kwargs is None
        if not is_plain or weight.scale.shape not in {(len(weight), 1), (1, 1)} or _is_shifted(weight):
            raise _refuse(folder, f"{path} is a {type(weight).__name__} of a kind that is not read here")
        layer = LowBitLinear(tuple(weight.shape), weight.qdata, weight.scale.float(), module.bias)
        if re.fullmatch(BLOCKS, path) is None:
            module.weight = nn.Parameter(layer.matrix(dtype))
        else:
            network.set_submodule(path, layer)
    return network.eval()


def _is_shifted(weight: Any) -> bool:
    """True for integers that do not mean zero by zero."""
    zero = getattr(weight, "zero_point", None)
    return zero is not None and bool(zero.any())
