"""A diffusers pipeline folder: its index and its parts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rats_video.errors import AsUserError, UserError
from rats_video.reading import DAMAGED, check_finite, read_json, read_sizes


def read_index(folder: Path, accepted: Sequence[str]) -> dict[str, Any]:
    """`model_index.json`: the pipeline's `_class_name`, each part's class, and plain settings.

    Raises:
        UserError: the folder is no diffusers pipeline, or one of another family than `accepted`.
    """
    try:
        index = dict(read_json(folder / "model_index.json"))
        name = str(index["_class_name"])
    except DAMAGED as error:
        raise UserError(
            "not a diffusers pipeline: no readable model_index.json in it",
            where=str(folder), fix="give the folder that pipeline.save_pretrained or a hub download made",
        ) from error  # fmt: skip
    if name not in accepted:
        raise UserError(f"is a {name}", where=str(folder), fix=f"give one of: {', '.join(accepted)}")
    return index


def load_parts(
    folder: Path,
    classes: Mapping[str, Any],
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    family: str,
    fix: str,
    shapes: Collection[str] = (),
) -> dict[str, Any]:
    """The parts of a pipeline folder by name, in `dtype` but for the VAE, which stays in float32.

    Args:
        folder: of the pipeline.
        classes: the class of each part.
        device: where they go.
        dtype: of all but the VAE.
        family: for messages.
        fix: what to give instead where a part is missing.
        shapes: parts that are wanted without their weights, on the meta device.

    Raises:
        UserError: one is missing, is of another kind, is damaged, lacks weights, or has some that are not finite.
    """
    from transformers.utils import logging

    for name in classes:
        if not (folder / name).is_dir():
            raise UserError(f"no {name}/ in it", where=str(folder), fix=fix)
    logging.disable_progress_bar()
    return {
        name: _load_shapes(kind, folder / name, dtype, family=family)
        if name in shapes
        else _load_part(kind, folder / name, device, torch.float32 if name == "vae" else dtype, family=family)
        for name, kind in classes.items()
    }


def _load_shapes(kind: Any, folder: Path, dtype: torch.dtype, *, family: str) -> Any:
    """A diffusers model of class `kind` on the meta device: all but its weights."""
    with AsUserError(f"cannot load it as a {family} pipeline: {folder.name}/", where=str(folder.parent)):
        config = read_sizes(folder / "config.json")
        with torch.device("meta"):
            return torch.nn.Module.to(kind.from_config(config), dtype).eval()  # diffusers' own warns of rounding


def _load_part(kind: Any, folder: Path, device: torch.device | str, dtype: torch.dtype, *, family: str) -> Any:
    """A model of class `kind`, ready to be called, or a tokenizer."""
    is_model = hasattr(kind, "forward")
    # Without these a model without safetensors is unpickled, and a tokenizer asks on the terminal to run its own code.
    options = (
        {"torch_dtype": dtype, "output_loading_info": True, "use_safetensors": True}
        if is_model
        else {"trust_remote_code": False}
    )
    with AsUserError(f"cannot load it as a {family} pipeline: {folder.name}/", where=str(folder.parent)):
        if is_model:
            read_sizes(folder / "config.json")
        loaded = kind.from_pretrained(folder, local_files_only=True, **options)
        if not is_model:
            return loaded
        if missing := sorted(loaded[1]["missing_keys"]):
            raise ValueError(f"no weights for {missing[0]}")  # diffusers would make some up
    model = loaded[0].to(device).eval()
    check_finite(model.state_dict().items(), where=folder)
    return model
