"""A diffusers pipeline folder: its index and its parts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from rats_video.backbones.layout import refuse_layout, weights_variant
from rats_video.backbones.low_bit_folder import load_low_bit
from rats_video.backbones.words import loses_spaces
from rats_video.errors import AsUserError, UserError
from rats_video.hub import INDEX
from rats_video.reading import DAMAGED, check_finite, read_json, read_sizes

DECODERS = ("vae", "audio_vae", "vocoder")  # what makes pixels and sound stays in float32


def read_index(folder: Path) -> dict[str, Any]:
    """`model_index.json`: the pipeline's `_class_name`, each part's library and class, and plain settings.

    Raises:
        UserError: the folder is no diffusers pipeline; says what it is.
    """
    try:
        index = dict(read_json(folder / INDEX))
        index["_class_name"] = str(index["_class_name"])
    except DAMAGED as error:
        raise refuse_layout(folder, INDEX) from error
    return index


def read_configs(folder: Path, family: str) -> dict[str, dict[str, Any]]:
    """The `config.json` or `scheduler_config.json` of each part.

    Raises:
        UserError: one of them is damaged, or claims sizes that no network has.
    """
    configs = {}
    for path in sorted((*folder.glob("*/config.json"), *folder.glob("*/scheduler_config.json"))):
        with AsUserError(f"cannot load it as a {family} pipeline: {path.parent.name}/", where=str(folder)):
            configs[path.parent.name] = read_sizes(path)
    return configs


def load_parts(
    folder: Path,
    classes: Mapping[str, Any],
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    family: str,
    fix: str,
    shapes: Collection[str] = (),
    bits: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """The parts of a pipeline folder by name, in `dtype` but for what decodes, which stays in float32.

    Args:
        folder: of the pipeline.
        classes: the class of each part.
        device: where they go.
        dtype: of all but `DECODERS`.
        family: for messages.
        fix: what to give instead where a part is missing.
        shapes: parts that are wanted without their weights, on the meta device.
        bits: of parts that may be in few: `int8`, `nf4`, or `none` for a quantised folder as it is.

    Raises:
        UserError: one is missing, is of another kind, is damaged, lacks weights, or has some that are not finite.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging

    for name in classes:
        if not (folder / name).is_dir():
            raise UserError(f"no {name}/ in it", where=str(folder), fix=fix)
    for library in (logging, diffusers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()  # they warn of published folders as they are
    precision = {name: torch.float32 if name in DECODERS else dtype for name in classes}
    return {
        name: _load_shapes(kind, folder / name, dtype, family=family)
        if name in shapes
        else _load_part(kind, folder / name, device, precision[name], bits.get(name), family=family)
        for name, kind in classes.items()
    }


def _load_shapes(kind: Any, folder: Path, dtype: torch.dtype, *, family: str) -> Any:
    """A diffusers model of class `kind` on the meta device: all but its weights."""
    with AsUserError(f"cannot load it as a {family} pipeline: {folder.name}/", where=str(folder.parent)):
        config = read_sizes(folder / "config.json")
        with torch.device("meta"):
            return torch.nn.Module.to(kind.from_config(config), dtype).eval()  # diffusers' own warns of rounding


def _load_part(
    kind: Any, folder: Path, device: torch.device | str, dtype: torch.dtype, quantization: str | None, *, family: str
) -> Any:
    """A model of class `kind`, ready to be called, or a tokenizer."""
    # Without these a model without safetensors is unpickled, and a tokenizer asks on the terminal to run its own code.
    options: dict[str, Any] = {"trust_remote_code": False}
    with AsUserError(f"cannot load it as a {family} pipeline: {folder.name}/", where=str(folder.parent)):
        if quantization is not None:
            network = load_low_bit(kind, folder, device, dtype, quantization)
            if network is not None:
                check_finite(network.state_dict().items(), where=folder)
                return network
        if is_model := hasattr(kind, "forward"):
            read_sizes(folder / "config.json")
            options = {"torch_dtype": dtype, "output_loading_info": True, "use_safetensors": True}
            options |= {"variant": weights_variant(folder)}
        loaded = kind.from_pretrained(folder, local_files_only=True, **options)
        if not is_model:
            if hasattr(loaded, "backend_tokenizer") and loses_spaces(loaded):
                raise UserError(
                    "its tokenizer drops the spaces between words", where=str(folder),
                    fix="pip install 'transformers>=5.22', or set tokenizer_class to TokenizersBackend in its "
                    "tokenizer_config.json",
                )  # fmt: skip
            return loaded
        unread = {name for name, weight in loaded[0].named_parameters() if weight.is_meta}  # named by an index alone
        if missing := sorted(unread | set(loaded[1]["missing_keys"])):
            raise ValueError(f"no weights for {missing[0]}")  # diffusers would make some up
    model = loaded[0].to(device).eval()
    check_finite(model.state_dict().items(), where=folder)
    return model
