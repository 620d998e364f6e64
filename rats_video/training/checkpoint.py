"""Checkpoints of a distillation: written aside, then renamed; only what trains; no pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rats_video.errors import UserError
from rats_video.files import replacing, write_json

Weights = Mapping[str, Tensor]


def save_checkpoint(
    folder: Path, step: int, student: Weights, teacher: Weights | None, optimizer: torch.optim.Optimizer, keep: int
) -> Path:
    """Write `folder/step-NNNNNN` whole or not at all, then drop all but the newest `keep`.

    Args:
        folder: the run's checkpoint folder.
        step: optimizer steps done.
        student: the weights that train.
        teacher: the EMA teacher's weights; None for a frozen teacher, which the run can rebuild.
        optimizer: its state is flattened into tensors.
        keep: how many checkpoints stay.
    """
    target = folder / f"step-{step:06d}"
    with replacing(target, "checkpoint") as aside:
        aside.mkdir()
        save_file(_tensors(student), aside / "student.safetensors")
        if teacher is not None:
            save_file(_tensors(teacher), aside / "teacher.safetensors")
        save_file(_optimizer_tensors(optimizer), aside / "optimizer.safetensors")
        write_json(aside / "state.json", {"step": step})
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())


def load_checkpoint(path: Path, student: Weights, teacher: Weights | None, optimizer: torch.optim.Optimizer) -> int:
    """Restore everything in place and return the steps done; raises UserError if the checkpoint does not fit."""
    try:
        _restore(student, load_file(path / "student.safetensors"))
        if teacher is not None:
            _restore(teacher, load_file(path / "teacher.safetensors"))
        _restore_optimizer(optimizer, load_file(path / "optimizer.safetensors"))
        return int(json.loads((path / "state.json").read_text())["step"])
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot resume from it: {reason}", where=str(path), fix="start anew with --overwrite"
        ) from error


def _tensors(weights: Weights) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


@torch.no_grad()
def _restore(weights: Weights, saved: Weights) -> None:
    if missing := weights.keys() ^ saved.keys():
        raise KeyError(f"{min(missing)} is in the model or in the checkpoint alone")
    for name, tensor in weights.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(f"{name} is {list(saved[name].shape)}, not {list(tensor.shape)}")
        tensor.copy_(saved[name])


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state by path, `0.exp_avg` or `0.quantized/absmax1`."""

    def flatten(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Tensor]:
        flat: dict[str, Tensor] = {}
        for name, value in values.items():
            if isinstance(value, Mapping):
                flat |= flatten(value, f"{prefix}{name}/")
            else:
                flat[f"{prefix}{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
        return flat

    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    # Cloned, because a file cannot hold one tensor twice: 8-bit states share their code book.
    return {f"{i}.{name}": value.clone() for i, values in state.items() for name, value in flatten(values).items()}


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        index, path = key.split(".", 1)
        *outer, name = path.split("/")
        values = state.setdefault(int(index), {})
        for each in outer:
            values = values.setdefault(each, {})
        is_count = tensor.ndim == 0 and not tensor.is_floating_point()  # a Python int: bitsandbytes' step
        values[name] = int(tensor) if is_count else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
