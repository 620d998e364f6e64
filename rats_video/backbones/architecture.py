"""The models of a run as shapes on the meta device: from config files or a preset, never from weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from rats_video.assets import find_hub_id, is_embedded, resolve_folder
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.folder import DECODERS, read_configs, read_index
from rats_video.backbones.kinds import AUTO, BackboneConfig, family_of
from rats_video.backbones.low_bit import quantise, stored_bits
from rats_video.errors import AsUserError, UserError
from rats_video.hub import cached, fetch
from rats_video.meta import LongPrompts, empty_model


@dataclass(frozen=True)
class Architecture:
    """A pipeline without its weights.

    Args:
        source: where it was read, for messages.
        index: its `model_index.json`; of a preset, the name of its class and plain values.
        parts: the `config.json` of each part.
        folder: the pipeline's own folder, where its tokenizer is; None for a preset.
        backbone: the family that loads it.
    """

    source: str
    index: Mapping[str, Any]
    parts: Mapping[str, Mapping[str, Any]]
    folder: Path | None = None
    backbone: BackboneConfig = AUTO

    @property
    def family(self) -> type[PipelineBackbone]:
        """The adapter that would load it."""
        return family_of(self.index, self.backbone.families(), where=self.source)

    @property
    def denoiser_parts(self) -> list[str]:
        """Its denoiser, or its experts."""
        return [name for name in ("transformer", "transformer_2") if name in self.parts]

    @property
    def depths(self) -> dict[str, int]:
        """Repetitions of the denoiser's blocks by key; experts are alike."""
        denoiser = self.parts[self.denoiser_parts[0]]
        return {key: int(denoiser[key]) for key in self.family.depth_keys if denoiser.get(key)}

    @property
    def quantization(self) -> str:
        """The bits that its denoiser's matrices are stored in; `none` in full."""
        return stored_bits(self.parts[self.denoiser_parts[0]])

    def cut(self, depths: Mapping[str, int]) -> Architecture:
        """The same with other numbers of blocks."""
        cut = {name: {**part, **depths} if name in self.denoiser_parts else part for name, part in self.parts.items()}
        return replace(self, parts=cut)


def find_architecture(model: str, preset: str | None, backbone: BackboneConfig = AUTO) -> Architecture:
    """The configuration files of the folder `model` if it is there, or else the preset, or else those on the hub.

    Raises:
        UserError: none is there, or the folder is no pipeline.
    """
    if preset is not None:
        read_preset(preset)  # a misspelt name is told even where the folder is there
    folder = None
    if is_embedded(model) or Path(model).expanduser().exists():
        folder = resolve_folder(model, where="model")
    elif hub := find_hub_id(model):
        folder = fetch(hub, where="model", weights=False) if preset is None else cached(hub)
    if folder is not None:
        return Architecture(str(folder), read_index(folder), read_configs(folder, "diffusers"), folder, backbone)
    if preset is not None:
        return replace(read_preset(preset), backbone=backbone)
    raise UserError(
        f"no such folder: {model}", where="model", fix=f"or set architecture to one of: {', '.join(preset_names())}"
    )


def preset_names() -> list[str]:
    """The presets that ship with the package."""
    folder = resources.files("rats_video.configs") / "architectures"
    return sorted(Path(str(path)).stem for path in folder.iterdir() if str(path).endswith(".yaml"))


def read_preset(name: str) -> Architecture:
    """A preset by name.

    Raises:
        UserError: there is none of that name.
    """
    names = preset_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        fix = f"did you mean {close[0]}?" if close else f"one of: {', '.join(names)}"
        raise UserError(f"no such preset: {name}", where="architecture", fix=fix)
    text = (resources.files("rats_video.configs") / "architectures" / f"{name}.yaml").read_text(encoding="utf-8")
    tree = yaml.safe_load(text)
    parts = {part: tree.pop(part) for part in list(tree) if isinstance(tree[part], dict)}
    return Architecture(f"preset {name}", {"_class_name": tree.pop("pipeline"), **tree}, parts)


def build_on_meta(architecture: Architecture, dtype: torch.dtype) -> PipelineBackbone:
    """The family's adapter around models without numbers; the VAE in float32, as `from_pretrained` has it.

    Raises:
        UserError: a part has no configuration, or one that its class does not take.
    """
    family = architecture.family
    family.check(architecture.index, architecture.parts, architecture.source)
    parts = {key: architecture.index[key] for key in family.settings if key in architecture.index}
    parts |= family.options
    for name, kind in family.classes_in(architecture.index).items():
        if not hasattr(kind, "forward"):
            parts[name] = _small_part(kind, architecture, name)
        elif name in architecture.parts:
            parts[name] = _part(architecture, name, kind, torch.float32 if name in DECODERS else dtype)
        elif name not in family.optional_parts:
            raise UserError(f"no {name}/config.json in it", where=architecture.source)
    return family(**parts)


def with_depths(
    base: PipelineBackbone, architecture: Architecture, depths: Mapping[str, int], quantization: str = "none"
) -> PipelineBackbone:
    """The same model with denoisers of that many blocks, in these bits; all else is shared."""
    cut, classes = architecture.cut(depths), base.component_classes()
    networks = {name: _part(cut, name, classes[name], base.dtype) for name in architecture.denoiser_parts}
    for network in networks.values():
        quantise(network, quantization)
    return type(base)(**{**base.parts, **networks})


def _part(architecture: Architecture, name: str, kind: Any, dtype: torch.dtype) -> nn.Module:
    model = empty_model(kind, architecture.parts[name], where=f"{architecture.source}: {name}")
    return _cast(model, dtype)


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast as `from_pretrained(dtype=...)` does: all but the modules that their class keeps in float32."""
    from diffusers import ModelMixin

    key = "_keep_in_fp32_modules" if isinstance(model, ModelMixin) else "_keep_in_fp32_modules_strict"
    kept = set(getattr(model, key, None) or ())
    for name, parameter in model.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


def _small_part(kind: Any, architecture: Architecture, name: str) -> Any:
    """A tokenizer or a scheduler."""
    if architecture.folder is not None and (architecture.folder / name).is_dir():
        options = {} if hasattr(kind, "from_config") else {"trust_remote_code": False}
        with AsUserError("cannot load it", where=f"{architecture.source}: {name}"):
            return kind.from_pretrained(architecture.folder / name, local_files_only=True, **options)
    if name in architecture.parts:
        return kind.from_config(dict(architecture.parts[name]))
    return LongPrompts()
