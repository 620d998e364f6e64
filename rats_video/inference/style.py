"""A LoRA of somebody else's beside a student, such as a style: merged into the denoiser before it is sampled."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.experts import HIGH_NOISE, LOW_NOISE
from rats_video.errors import AsUserError, UserError
from rats_video.files import weights_digest
from rats_video.reading import check_plain_file

_NAME = "style"
_SCALED = re.compile(r"(?P<file>.+):(?P<scale>-?\d+(\.\d*)?|-?\.\d+)", re.DOTALL)
_LOW, _HIGH = re.compile(r"low[-_]?noise", re.IGNORECASE), re.compile(r"high[-_]?noise", re.IGNORECASE)


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


def add_style(model: PipelineBackbone, style: Style) -> None:
    """Add a LoRA to the weights of a denoiser that has no adapter yet, in place.

    diffusers reads the file, under its own names or those the model was published with. Of two experts a file whose
    name says `high_noise` or `low_noise` is for that one, any other for both.

    Raises:
        UserError: it is no LoRA, or one of another model.
    """
    import diffusers

    where = f"--lora {style.file}"
    with AsUserError("diffusers cannot read it as a LoRA", where=where, fix="give a .safetensors file of this family"):
        check_plain_file(style.file)
        tensors, metadata = getattr(diffusers, model.pipelines[0]).lora_state_dict(
            style.file.parent, weight_name=style.file.name, use_safetensors=True, local_files_only=True,
            return_lora_metadata=True,
        )  # fmt: skip
    for part in _experts(style.file.name, tensors, tuple(model.denoisers)):
        network = model.denoisers[part]
        is_whole = any(key.startswith(f"{LOW_NOISE}.") for key in tensors)  # both experts' in one file
        prefix = part if is_whole else HIGH_NOISE
        own = {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")}
        _check(network, own, where)
        with AsUserError("diffusers cannot load it", where=where):
            network.load_lora_adapter(dict(tensors), prefix=prefix, adapter_name=_NAME, metadata=metadata)
            network.fuse_lora(lora_scale=style.scale, adapter_names=[_NAME])
            network.unload_lora()


def _experts(name: str, tensors: Mapping[str, Any], parts: tuple[str, ...]) -> tuple[str, ...]:
    if len(parts) == 1 or any(key.startswith(f"{LOW_NOISE}.") for key in tensors):
        return parts
    if _LOW.search(name):
        return (LOW_NOISE,)
    return (HIGH_NOISE,) if _HIGH.search(name) else parts


def _check(network: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse a LoRA of other layers or sizes: diffusers would load what fits, or nothing, without an error."""
    weights = {name.removesuffix(".weight"): weight for name, weight in network.named_parameters()}
    fix = "give one that was trained on this base"
    if not tensors:
        raise UserError(f"holds nothing for a {type(network).__name__}", where=where, fix=fix)
    for key, tensor in tensors.items():
        layer, _, matrix = key.partition(".lora_")
        found = weights.get(layer)
        if found is None:
            raise UserError(f"was trained on another model: this one has no {layer}", where=where, fix=fix)
        side = {"A.weight": 1, "down.weight": 1, "B.weight": 0, "up.weight": 0}.get(matrix)
        if side is not None and tensor.shape[side] != found.shape[side]:
            widths = f"{tensor.shape[side]} channels there, {found.shape[side]} here"
            raise UserError(f"was trained on another model: {layer} has {widths}", where=where, fix=fix)
