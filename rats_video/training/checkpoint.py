"""Checkpoints: written aside, then renamed; with checksums; only what trains; no pickle.

Adapters, and what is whole on each process, are one file a part, whatever the number of processes. Full weights that
are split are never gathered: each process writes its shards (`shards.py`). A run goes on from either (`restore.py`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rats_video.errors import first_line
from rats_video.files import beside, cannot_write, json_digest, remove, replacing, weights_digest, write_json
from rats_video.reading import read_json
from rats_video.runtime import ALONE, Runtime, is_split

Weights = Mapping[str, Tensor]
Trained = tuple[Weights, torch.optim.Optimizer]
STATE = "state.json"
DIGESTS = "sha256"
_NAME = re.compile(r"step-\d+")


class CheckpointWriter:
    """Writes checkpoints beside the training: the weights are copied to host memory, a thread does the rest.

    A context that leaves only when the thread is done.

    Args:
        folder: the run's checkpoint folder.
        keep: how many checkpoints stay.
        runtime: the processes, which save together; the first one writes what is whole.
    """

    def __init__(self, folder: Path, keep: int, runtime: Runtime = ALONE) -> None:
        self._folder, self._keep, self._runtime = folder, keep, runtime
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
        full = {"step": step, **(state or {})}
        if in_shards(student):
            self._pending = self._thread.submit(self._write_shards, full, *self._staged(step, content))
            return
        copies = {name: {key: self._copy(tensor) for key, tensor in part.items()} for name, part in content.items()}
        if self._runtime.is_main:
            self._pending = self._thread.submit(self._write, full, copies)

    def check(self) -> None:
        """Raise UserError if a checkpoint could not be written; all processes call it together."""
        pending = self._pending
        if self._runtime.any(pending is not None and pending.done() and pending.exception() is not None):
            self.wait()

    def wait(self) -> None:
        """Wait until everything is written; raises UserError if it could not be."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def finish(self) -> None:
        """`wait` on all processes together: none goes on while another one writes."""
        self.wait()
        self._runtime.barrier()

    def _copy(self, tensor: Tensor) -> Tensor:
        whole = _whole(tensor)
        return whole.to("cpu", copy=True).contiguous() if self._runtime.is_main else tensor

    def _staged(self, step: int, content: Mapping[str, Weights]) -> tuple[Path, dict[str, dict[str, Tensor]]]:
        """Where to write, and copies of this process's shards in host memory."""
        from rats_video.training import shards

        aside = self._runtime.broadcast(beside(_path(self._folder, step)))
        return aside, {part: shards.stage(tensors) for part, tensors in content.items()}

    def _write_shards(self, state: Mapping[str, Any], aside: Path, content: Mapping[str, dict[str, Tensor]]) -> None:
        _write_shards(self._folder, state, aside, content, self._runtime.savers)  # meddles not with the training
        if self._runtime.is_main:
            self._prune()

    def _write(self, state: Mapping[str, Any], content: Mapping[str, dict[str, Tensor]]) -> None:
        _write(self._folder, state, content)
        self._prune()

    def _prune(self) -> None:
        for old in list_checkpoints(self._folder)[: -self._keep]:
            remove(old)


def _write(folder: Path, state: Mapping[str, Any], content: Mapping[str, dict[str, Tensor]]) -> None:
    with replacing(_path(folder, state["step"]), "checkpoint") as aside:
        aside.mkdir()
        digests = {}
        for name, tensors in content.items():
            file = aside / f"{name}.safetensors"
            save_file(tensors, file)
            digests[file.name] = weights_digest([file])
        _write_state(aside, state, digests)


def _write_shards(
    folder: Path, state: Mapping[str, Any], aside: Path, content: Mapping[str, Weights], group: Any
) -> None:
    """Write each process's shards into `aside`, which becomes the checkpoint once all have written."""
    from rats_video.training import shards

    path = _path(folder, state["step"])

    def seal(digests: dict[str, str]) -> None:
        _write_state(aside, state, digests)
        with replacing(path, "checkpoint") as partial:
            aside.replace(partial)

    try:
        shards.write(aside, content, group, seal)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, "checkpoint", error) from error
    finally:  # by now nobody writes any more
        shutil.rmtree(aside, ignore_errors=True)


def _write_state(aside: Path, state: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    plain = json.loads(json.dumps(state))
    write_json(aside / STATE, {**plain, DIGESTS: {**digests, STATE: json_digest(plain)}})


def _whole(tensor: Tensor) -> Tensor:
    """The whole tensor; all processes gather a split one together."""
    return (tensor.full_tensor() if is_split(tensor) else tensor).detach()


def in_shards(weights: Weights) -> bool:
    """True if a checkpoint of these weights is in shards: full weights that are split; adapters are small."""
    return any(map(is_split, weights.values())) and not any(".lora_" in name for name in weights)


def save_weights(folder: Path, step: int, weights: Weights, runtime: Runtime = ALONE) -> None:
    """Write the weights that train, and nothing else, to `folder/step-NNNNNN`; all processes call it together."""
    if in_shards(weights):
        assert runtime.everyone is not None
        aside = runtime.broadcast(beside(_path(folder, step)))
        content = {"student": {name: weight.detach().cpu() for name, weight in weights.items()}}
        _write_shards(folder, {"step": step}, aside, content, runtime.everyone.get_group())
        return
    copies = {name: _whole(weight).cpu().contiguous() for name, weight in weights.items()}
    if runtime.is_main:
        _write(folder, {"step": step}, {"student": copies})


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def steps_done(path: Path) -> int:
    """Optimizer steps behind a checkpoint, as its name says."""
    return int(path.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), key=steps_done)


def find_damage(path: Path) -> str | None:
    """The damage of a checkpoint's files, one clause; None if they are as they were written."""
    try:
        if (path / ".metadata").exists():
            return "it has torch's pickled .metadata, which may run code"
        state = read_json(path / STATE)
        digests = state.pop(DIGESTS, {})  # older ones have none
        if state["step"] != steps_done(path):
            return f"it says that it is of step {state['step']}"
        if missing := [name for name in digests if not (path / name).is_file()]:
            return f"{missing[0]} is missing"
        for name, digest in digests.items():
            if digest != (json_digest(state) if name == STATE else weights_digest([path / name])):
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"unreadable: {first_line(error)}"
    return None


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
