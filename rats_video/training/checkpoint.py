"""Checkpoints: written aside, then renamed; with checksums; only what trains; no pickle.

A checkpoint looks the same whatever the number of processes and however the weights are split over them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rats_video.errors import UserError, first_line, warn
from rats_video.files import json_digest, remove, replacing, weights_digest, write_json
from rats_video.reading import read_json
from rats_video.runtime import ALONE, Runtime, is_split

Weights = Mapping[str, Tensor]
Trained = tuple[Weights, torch.optim.Optimizer]
STATE = "state.json"
_DIGESTS = "sha256"
_NAME = re.compile(r"step-\d+")


class CheckpointWriter:
    """Writes checkpoints beside the training: the weights are copied to host memory, a thread does the rest.

    A context that leaves only when the thread is done.

    Args:
        folder: the run's checkpoint folder.
        keep: how many checkpoints stay.
        writes: True on one process; the others only send their shards of split weights.
    """

    def __init__(self, folder: Path, keep: int, *, writes: bool = True) -> None:
        self._folder, self._keep, self._writes = folder, keep, writes
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()

    def save(
        self,
        step: int,
        student: Weights,
        teacher: Weights | None,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any] | None = None,
        critics: Mapping[str, Trained] | None = None,
    ) -> None:
        """Start to write `folder/step-NNNNNN`, whole or not at all; waits for the checkpoint before it.

        Args:
            step: optimizer steps done.
            student: the weights that train.
            teacher: the EMA teacher's weights; None for a frozen teacher, which the run can rebuild.
            optimizer: its state is flattened into tensors.
            state: everything else that a resumed run needs, as JSON.
            critics: other networks that train, by name.

        Raises:
            UserError: the checkpoint before this one could not be written.
        """
        self.wait()
        content = {"student": student, "optimizer": _optimizer_tensors(optimizer)}
        if teacher is not None:
            content["teacher"] = teacher
        for name, (weights, its_optimizer) in (critics or {}).items():
            content |= {name: weights, f"{name}-optimizer": _optimizer_tensors(its_optimizer)}
        copies = {name: {key: self._copy(tensor) for key, tensor in part.items()} for name, part in content.items()}
        if self._writes:
            self._pending = self._thread.submit(self._write, {"step": step, **(state or {})}, copies)

    def wait(self) -> None:
        """Wait until everything is written; raises UserError if it could not be."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _copy(self, tensor: Tensor) -> Tensor:
        whole = _whole(tensor)
        return whole.to("cpu", copy=True).contiguous() if self._writes else tensor

    def _write(self, state: Mapping[str, Any], content: Mapping[str, dict[str, Tensor]]) -> None:
        _write(self._folder, state, content)
        for old in list_checkpoints(self._folder)[: -self._keep]:
            remove(old)


def _write(folder: Path, state: Mapping[str, Any], content: Mapping[str, dict[str, Tensor]]) -> None:
    with replacing(folder / f"step-{state['step']:06d}", "checkpoint") as aside:
        aside.mkdir()
        digests = {}
        for name, tensors in content.items():
            file = aside / f"{name}.safetensors"
            save_file(tensors, file)
            digests[file.name] = weights_digest([file])
        plain = json.loads(json.dumps(state))
        write_json(aside / STATE, {**plain, _DIGESTS: {**digests, STATE: json_digest(plain)}})


def _whole(tensor: Tensor) -> Tensor:
    """The whole tensor; all processes gather a split one together."""
    return (tensor.full_tensor() if is_split(tensor) else tensor).detach()


def save_weights(folder: Path, step: int, weights: Weights, *, writes: bool) -> None:
    """Write the weights that train, and nothing else, to `folder/step-NNNNNN`; all processes call it together."""
    copies = {name: _whole(weight).cpu().contiguous() for name, weight in weights.items()}
    if writes:
        _write(folder, {"step": step}, {"student": copies})


def steps_done(path: Path) -> int:
    """Optimizer steps behind a checkpoint, as its name says."""
    return int(path.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), key=steps_done)


def find_damage(path: Path) -> str | None:
    """The damage of a checkpoint's files, one clause; None if they are as they were written."""
    try:
        state = read_json(path / STATE)
        digests = state.pop(_DIGESTS, {})  # older ones have none
        if state["step"] != steps_done(path):
            return f"it says that it is of step {state['step']}"
        for name, digest in digests.items():
            if digest != (json_digest(state) if name == STATE else weights_digest([path / name])):
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"unreadable: {first_line(error)}"
    return None


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
    try:
        load_student_weights(path, student)
        if teacher is not None:
            _restore(teacher, load_file(path / "teacher.safetensors"))
        _restore_optimizer(optimizer, load_file(path / "optimizer.safetensors"))
        for name, (weights, its_optimizer) in (critics or {}).items():
            _restore(weights, load_file(path / f"{name}.safetensors"))
            _restore_optimizer(its_optimizer, load_file(path / f"{name}-optimizer.safetensors"))
        state: dict[str, Any] = read_json(path / STATE)
        return {key: value for key, value in state.items() if key != _DIGESTS} | {"step": int(state["step"])}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = first_line(error)
        raise UserError(
            f"cannot resume from it: {reason}", where=str(path), fix="start anew with --overwrite"
        ) from error


def load_student_weights(path: Path, student: Weights) -> None:
    """Restore the weights that train, and nothing else, in place."""
    _restore(student, load_file(path / "student.safetensors"))


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
    if not is_split(like) or whole.shape != like.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    # Every process has read the file: no need to send it around.
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state by path, `0.exp_avg` or `0.quantized/absmax1`."""

    def flatten(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Tensor]:
        flat: dict[str, Tensor] = {}
        for name, value in values.items():
            if isinstance(value, Mapping):
                flat |= flatten(value, f"{prefix}{name}/")
            else:
                flat[f"{prefix}{name}"] = torch.as_tensor(value)
        return flat

    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    # A file cannot hold one tensor twice, and 8-bit states share their code book: the copies to host memory are apart.
    return {f"{i}.{name}": value for i, values in state.items() for name, value in flatten(values).items()}


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
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
