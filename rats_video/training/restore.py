"""Goes on from a checkpoint: the newest undamaged one, on as many processes as there are now."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rats_video.errors import UserError, first_line, warn
from rats_video.files import remove
from rats_video.reading import read_json
from rats_video.runtime import ALONE, Runtime, is_split
from rats_video.training.checkpoint import DIGESTS, STATE, Trained, Weights, find_damage, list_checkpoints, steps_done


def resume(
    folder: Path,
    student: Weights,
    teacher: Weights | None,
    optimizer: torch.optim.Optimizer,
    runtime: Runtime = ALONE,
    is_exact: Callable[[int], bool] = lambda _: True,
    critics: Mapping[str, Trained] | None = None,
) -> dict[str, Any]:
    """Restore everything in place from a checkpoint; all processes call it together.

    It takes the newest undamaged one of a step from which a run continues exactly, or else the newest undamaged one.
    Later checkpoints are deleted: their steps will be done again.

    Returns:
        Its state; `{"step": 0}` where there is no checkpoint.

    Raises:
        UserError: there are checkpoints, but all are damaged, or the one chosen does not fit.
    """
    chosen = runtime.broadcast(_choose(folder, is_exact) if runtime.is_main else None)
    if chosen is None:
        return {"step": 0}
    state = load_checkpoint(chosen, student, teacher, optimizer, critics)
    runtime.barrier()
    if runtime.is_main:
        for path in list_checkpoints(folder):
            if steps_done(path) > state["step"]:
                remove(path)
    return state


def _choose(folder: Path, is_exact: Callable[[int], bool]) -> Path | None:
    found = sorted(list_checkpoints(folder), key=lambda path: (is_exact(steps_done(path)), steps_done(path)))
    for path in reversed(found):
        if damage := find_damage(path):
            warn(f"damaged, the one before it is taken: {damage}", where=str(path))
            continue
        if not is_exact(steps_done(path)):
            warn("amid the use of one teacher rollout: a new one takes its place, the run will differ", where=str(path))
        return path
    if found:
        raise UserError("all checkpoints are damaged", where=str(folder), fix="start anew with --overwrite")
    return None


def load_checkpoint(
    path: Path,
    student: Weights,
    teacher: Weights | None,
    optimizer: torch.optim.Optimizer,
    critics: Mapping[str, Trained] | None = None,
) -> dict[str, Any]:
    """Restore everything in place and return the state; raises UserError if the checkpoint does not fit."""
    weights, optimizers = {"student": student}, {"optimizer": optimizer}
    if teacher is not None:
        weights["teacher"] = teacher
    for name, (its_weights, its_optimizer) in (critics or {}).items():
        weights[name], optimizers[f"{name}-optimizer"] = its_weights, its_optimizer
    try:
        for part, tensors in _load(path, weights, optimizers).items():
            _restore_optimizer(optimizers[part], tensors)
        state: dict[str, Any] = read_json(path / STATE)
        return {key: value for key, value in state.items() if key != DIGESTS} | {"step": int(state["step"])}
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        reason = first_line(error)
        raise UserError(
            f"cannot resume from it: {reason}", where=str(path), fix="start anew with --overwrite"
        ) from error


def load_student_weights(path: Path, student: Weights) -> None:
    """Restore the weights that train, and nothing else, in place."""
    _load(path, {"student": student}, {})


def _load(
    path: Path, weights: Mapping[str, Weights], optimizers: Mapping[str, torch.optim.Optimizer]
) -> dict[str, dict[str, Tensor]]:
    """Restore weights in place, and return the tensors of the optimizers' states, by part."""
    if any(path.glob("shard-*.safetensors")):
        from rats_video.training import shards

        return shards.read(path, weights, {part: _trained(optimizer) for part, optimizer in optimizers.items()})
    for part, its_weights in weights.items():
        _restore(its_weights, load_file(path / f"{part}.safetensors"))
    return {part: load_file(path / f"{part}.safetensors") for part in optimizers}


def _trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


@torch.no_grad()
def _restore(weights: Weights, saved: Weights) -> None:
    if missing := weights.keys() ^ saved.keys():
        raise KeyError(f"{min(missing)} is in the model or in the checkpoint alone")
    for name, tensor in weights.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(f"{name} is {list(saved[name].shape)}, not {list(tensor.shape)}")
        tensor.copy_(_split_like(tensor, saved[name]))


def _split_like(like: Tensor, whole: Tensor) -> Tensor:
    """This process's shard of a whole tensor, if `like` is split."""
    if not is_split(like) or is_split(whole) or whole.shape != like.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    # Every process has read the file: no need to send it around.
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    weights = _trained(optimizer)
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        index, path = key.split(".", 1)
        *outer, name = path.split("/")
        values = state.setdefault(int(index), {})
        for each in outer:
            values = values.setdefault(each, {})
        is_count = tensor.ndim == 0 and not tensor.is_floating_point()  # a Python int: bitsandbytes' step
        values[name] = int(tensor) if is_count else _split_like(weights[int(index)], tensor)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
