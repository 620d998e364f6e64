"""A LoRA of somebody else's, such as a style: under teacher and student as they train, or beside a finished student."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.experts import HIGH_NOISE, LOW_NOISE
from rats_video.backbones.lora import Adapters
from rats_video.backbones.low_bit import LowBitLinear, bits_of
from rats_video.config.fields import Config
from rats_video.errors import AsUserError, UserError
from rats_video.files import weights_digest
from rats_video.reading import check_plain_file

_NAME = "style"
_OF_THIS_BASE = "give one that was trained on this base"
_SCALED = re.compile(r"(?P<file>.+):(?P<scale>-?\d+(\.\d*)?|-?\.\d+)", re.DOTALL)
_LOW, _HIGH = re.compile(r"low[-_]?noise", re.IGNORECASE), re.compile(r"high[-_]?noise", re.IGNORECASE)


class BaseLoraConfig(Config):
    """A LoRA that teacher and student have under them, as a part of the base."""

    path: str = Field(description="its file, under diffusers', the model's original or Kohya's names")
    scale: float = Field(1.0, allow_inf_nan=False, description="how many times its change is taken")


@dataclass(frozen=True)
class Style:
    """A LoRA file, and how many times its change is taken."""

    file: Path
    scale: float = 1.0

    @staticmethod
    def parse(text: str) -> Style:
        """`FILE` or `FILE:SCALE`.

        Raises:
            UserError: there is no such file.
        """
        scaled = None if Path(text).is_file() else _SCALED.fullmatch(text)
        style = Style(Path(text)) if scaled is None else Style(Path(scaled["file"]), float(scaled["scale"]))
        if not style.file.is_file():
            raise UserError(f"no such file: {style.file}", where="--lora", fix="give FILE or FILE:SCALE")
        return style

    @property
    def identity(self) -> tuple[str, float]:
        """What tells it from others: its bytes, and the scale."""
        return weights_digest([self.file]), self.scale


def base_styles(loras: Sequence[BaseLoraConfig], *, where: str) -> tuple[Style, ...]:
    """The LoRAs of a base; raises UserError for a file that is not there."""
    styles = tuple(Style(Path(lora.path).expanduser(), lora.scale) for lora in loras)
    for i, style in enumerate(styles):
        if not style.file.is_file():
            raise UserError(f"no such file: {style.file}", where=f"{where}.{i}.path", fix="give a LoRA's .safetensors")
    return styles


def add_style(model: PipelineBackbone, style: Style, *, where: str = "--lora") -> None:
    """Add a LoRA to the weights of a denoiser that has no adapter yet, in place.

    Over weights in few bits, which cannot hold its change, it stays an adapter that every role has under its own.
    diffusers reads the file, under its own names or those the model was published with. Of two experts a file whose
    name says `high_noise` or `low_noise` is for that one, any other for both.

    Raises:
        UserError: it is no LoRA, or one of another model.
    """
    import diffusers

    where = f"{where} {style.file}"
    is_kept = bits_of(model.denoiser) != "none"
    name = f"{_NAME}-{len(model.adapters.kept) if model.adapters else 0}"
    with AsUserError("diffusers cannot read it as a LoRA", where=where, fix="give a .safetensors file of this family"):
        check_plain_file(style.file)
        tensors, metadata = getattr(diffusers, model.pipelines[0]).lora_state_dict(
            style.file.parent, weight_name=style.file.name, use_safetensors=True, local_files_only=True,
            return_lora_metadata=True,
        )  # fmt: skip
    for part in experts_of(style.file.name, tuple(model.denoisers), tensors):
        network = model.denoisers[part]
        is_whole = any(key.startswith(f"{LOW_NOISE}.") for key in tensors)  # both experts' in one file
        prefix = part if is_whole else HIGH_NOISE
        own = {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")}
        _check(network, own, where)
        with AsUserError("diffusers cannot load it", where=where):
            network.load_lora_adapter(dict(tensors), prefix=prefix, adapter_name=name, metadata=metadata)
        if not is_kept:
            network.fuse_lora(lora_scale=style.scale, adapter_names=[name])
            network.unload_lora()
    if is_kept:
        model.adapters = model.adapters or Adapters(model.denoisers)
        model.adapters.keep(name, style.scale)


def experts_of(name: str, parts: tuple[str, ...], tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """The denoising parts that a LoRA file of this name is for."""
    if len(parts) == 1 or any(key.startswith(f"{LOW_NOISE}.") for key in tensors):
        return parts
    if _LOW.search(name):
        return (LOW_NOISE,)
    return (HIGH_NOISE,) if _HIGH.search(name) else parts


def _check(network: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse a LoRA of other layers or sizes: diffusers would load what fits, or nothing, without an error."""
    sizes = {name.removesuffix(".weight"): weight.shape for name, weight in network.named_parameters()}
    for name, layer in network.named_modules():
        if isinstance(layer, LowBitLinear):  # which a LoRA before this one may have wrapped
            sizes[name.removesuffix(".base_layer")] = torch.Size((layer.out_features, layer.in_features))
    if not tensors:
        raise UserError(f"holds nothing for a {type(network).__name__}", where=where, fix=_OF_THIS_BASE)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, matrix = key.partition(".lora_")
        if name not in sizes:
            raise UserError(f"was trained on another model: this one has no {name}", where=where, fix=_OF_THIS_BASE)
        layers.setdefault(name, {})[matrix.replace("down.", "A.").replace("up.", "B.")] = tensor
    for name, matrices in layers.items():
        _check_layer(name, matrices, sizes[name], where)


def _check_layer(name: str, matrices: Mapping[str, Tensor], size: torch.Size, where: str) -> None:
    """Refuse half of a layer's two matrices, widths that are not the layer's, and two ranks."""
    for side, weight in (("lora_A", "A.weight"), ("lora_B", "B.weight")):
        if weight not in matrices:
            raise UserError(f"is not whole: {name} lacks {side}", where=where, fix="download or save it again")
    down, up = matrices["A.weight"], matrices["B.weight"]
    for theirs, ours in ((down.shape[1], size[1]), (up.shape[0], size[0])):
        if theirs != ours:
            raise UserError(
                f"was trained on another model: {name} has {theirs} channels there, {ours} here", where=where,
                fix=_OF_THIS_BASE,
            )  # fmt: skip
    if len(down) != up.shape[1]:
        ranks = f"rank {len(down)} in lora_A and {up.shape[1]} in lora_B"
        raise UserError(f"is damaged: {name} has {ranks}", where=where, fix="download or save it again")
