"""Devices and processes of a command."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch

from rats_video.backbones.compute import ParallelConfig
from rats_video.errors import UserError
from rats_video.runtime import PATIENCE, Runtime


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU, or the CPU where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"no such device: {name!r}", where="--device", fix="auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"{name} is not here: {torch.cuda.device_count()} GPUs seen", where="--device", fix="use cpu")
    return device


def start_runtime(device: str, parallel: ParallelConfig | None = None) -> Runtime:
    """This process's place among those of a launcher, read from its environment; alone without a launcher.

    Raises:
        UserError: there are fewer devices here than processes, or the processes cannot be split as `parallel` says.
    """
    parallel = parallel or ParallelConfig()
    split = {"context": parallel.context, "reward_ranks": parallel.reward_ranks}
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Runtime.join(pick_device(device), **split)
    from accelerate import PartialState

    check_processes(device, int(os.environ["LOCAL_WORLD_SIZE"]), where="--gpus")
    state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
    return Runtime.join(state.device, **split)


def check_processes(device: str, count: int, *, where: str) -> None:
    """Refuse more processes on this machine than it has GPUs; the CPU takes any number."""
    if device.startswith("cuda:"):
        raise UserError(f"{device} is one GPU for {count} processes", where="--device", fix="use cuda or cpu")
    here = torch.cuda.device_count()
    if device != "cpu" and count > here:
        raise UserError(
            f"{count} processes need {count} GPUs, {here} seen", where=where, fix="start fewer, or use --device cpu"
        )


@contextlib.contextmanager
def explain_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Turn an out-of-memory error into one line with advice, which is computed only then."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError("out of GPU memory", fix=advice()) from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):  # torch's words on a CPU
            raise
        raise UserError("out of memory", fix=advice()) from error
