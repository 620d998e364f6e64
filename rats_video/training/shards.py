"""Checkpoints of split weights: each process writes its shards by torch.distributed.checkpoint, and reads its share.

In torch's safetensors layout, whose JSON headers say where in a tensor a shard lies, for any number of readers. torch's
default layout has a pickled `.metadata`, which may run code when it is read: it is neither written nor read here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save

from rats_video.errors import UserError
from rats_video.files import weights_digest
from rats_video.runtime import is_split

Weights = Mapping[str, Tensor]
_FILE_BYTES = 2**31  # of one process's file: safetensors copies a file's tensors in host memory while it writes them


class _Writer(HuggingFaceStorageWriter):
    """Gives the digests of all files to `seal`, on the first process, once all processes have written and synced."""

    def __init__(self, folder: Path, files: dict[str, int], seal: Callable[[dict[str, str]], None]) -> None:
        super().__init__(str(folder), files, save_distributed=True)
        self._folder, self._seal = folder, seal

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Write this process's shards; the future holds the digests of its files."""
        names = {result.storage_data.relative_path for result in super().write_data(plan, planner).value()}
        done: torch.futures.Future[Any] = torch.futures.Future()
        done.set_result({name: weights_digest([self._folder / name]) for name in names})
        return done

    def finish(self, metadata: Any, results: Any) -> None:  # noqa: ARG002  # torch's
        """Seal the checkpoint."""
        digests = {name: digest for of_process in results for name, digest in of_process.items()}
        if lost := sorted(name for name in digests if not (self._folder / name).is_file()):
            raise UserError(
                f"cannot write the checkpoint: {lost[0]} of another process is not here",
                where=str(self._folder.parent), fix="give an --output on a disk that all machines share",
            )  # fmt: skip
        self._seal(digests)


def stage(tensors: Weights) -> dict[str, Tensor]:
    """A copy in host memory, of split tensors of this process's shards alone."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def write(folder: Path, parts: Mapping[str, Weights], group: Any, seal: Callable[[dict[str, str]], None]) -> None:
    """Write tensors into a folder, each process its shards; all processes of the group call it together.

    Args:
        folder: where the files go, the same for all.
        parts: the tensors by part and name.
        group: the processes.
        seal: called on the first process with the digests of all files, by name, before any process returns.

    Raises:
        OSError: a process cannot write; raised on all.
        UserError: as `seal` raises it, or the files of a process are on another disk.
    """
    tensors = {f"{part}/{name}": tensor for part, content in parts.items() for name, tensor in content.items()}
    writer = _Writer(folder, _files(tensors, dist.get_world_size(group)), seal)
    try:
        save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        raise _cause(error) from None


def _files(tensors: Weights, processes: int) -> dict[str, int]:
    """In which of each process's files, the first is 1, a tensor goes."""
    before, files = 0, {}
    for name, tensor in tensors.items():
        files[name] = 1 + before // (processes * _FILE_BYTES)
        before += tensor.numel() * tensor.element_size()
    return files


def read(
    path: Path, weights: Mapping[str, Weights], optimizers: Mapping[str, Sequence[Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Fill weights in place from a checkpoint of any number of processes; each process reads on its own.

    Args:
        path: the checkpoint.
        weights: what to fill, by part and name.
        optimizers: the weights that each of these parts' state belongs to, in the optimizer's order.

    Returns:
        The state of the optimizers, by part and name, split as its weights are.

    Raises:
        OSError: it cannot be read.
        KeyError: it has other tensors.
        ValueError: a tensor has another shape, or lacks shards.
    """
    saved = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    targets = {f"{part}/{name}": each.detach() for part, them in weights.items() for name, each in them.items()}
    if odd := {key for key in saved if key.split("/")[0] in weights} ^ targets.keys():
        raise KeyError(f"{min(odd)} is in the model or in the checkpoint alone")
    state: dict[str, dict[str, Tensor]] = {part: {} for part in optimizers}
    for key, each in saved.items():
        part, _, name = key.partition("/")
        assert isinstance(each, TensorStorageMetadata), "safetensors hold nothing else"
        if sum(math.prod([*chunk.sizes]) for chunk in each.chunks) != math.prod([*each.size]):
            raise ValueError(f"{key} lacks shards")
        if part in optimizers:
            like = optimizers[part][int(name.split(".")[0])].detach()
            is_like = is_split(like) and like.shape == each.size
            dtype = each.properties.dtype
            empty = torch.empty_like(like, dtype=dtype) if is_like else torch.empty(each.size, dtype=dtype)
            targets[key] = state[part][name] = empty
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each process reads on its own
        try:
            state_dict_loader.load(targets, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
        except CheckpointException as error:
            raise _cause(error) from None
    return state


def _cause(error: CheckpointException) -> BaseException:
    """What went wrong on the first process that failed."""
    cause: BaseException = next(iter(error.failures.values()))[0]
    return cause
