"""Converts a published pickle to safetensors: the one place that opens a pickle, and only for tensors."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rats_video.errors import UserError, warn
from rats_video.files import replacing
from rats_video.reading import DAMAGED
from rats_video.rewards.files import ORIGIN

_CONTAINERS = ("state_dict", "model", "module")


def convert_checkpoint(source: Path, output: Path) -> Path:
    """Write the tensors of a pickled checkpoint, under their own names and types, to `output/model.safetensors`.

    The pickle is read with `weights_only`, which runs none of its code. The weights are its whole content, or its entry
    `state_dict`, `model` or `module`. The rest (a step count, an optimizer) is skipped with a warning. The file's name
    is kept in the header (`checkpoint_origin`).

    Returns:
        The file written, complete or not at all.

    Raises:
        UserError: it cannot be read, needs code to be run, or holds no tensors; or the file cannot be written.
    """
    content, left_out = _read(source), 0
    while inner := _container(content):
        left_out += len(content) - 1
        content = inner
    entries = content.items() if isinstance(content, Mapping) else ()
    tensors = {name: value for name, value in entries if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise UserError("holds no named tensors", where=str(source))
    if left_out := left_out + len(entries) - len(tensors):
        warn(f"{left_out} entries that are no weights are left out", where=str(source))
    target = output / "model.safetensors"
    with replacing(target, "weights") as partial:
        save_file(_apart(tensors), partial, metadata={"format": "pt", ORIGIN: source.name})
    return target


def _read(source: Path) -> Any:
    try:
        # Files of torch before 1.6 are no archives and cannot be mapped into memory.
        return torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    except pickle.UnpicklingError as error:
        raise UserError("refused: it is no checkpoint, or loading it would run code", where=str(source)) from error
    except (*DAMAGED, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"cannot be read: {reason}", where=str(source)) from error


def _container(content: object) -> Mapping[str, Any] | None:
    if not isinstance(content, Mapping):
        return None
    return next((content[key] for key in _CONTAINERS if isinstance(content.get(key), Mapping)), None)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without shared memory, which safetensors refuses: tied weights become copies."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone(memory_format=torch.contiguous_format) if memory in seen else tensor.contiguous()
        seen.add(memory)
    return apart
