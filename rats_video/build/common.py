"""What every command's builder needs: devices, folders, records."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch

from rats_video.config.compute import ParallelConfig
from rats_video.config.load import load_config
from rats_video.config.schema import Config
from rats_video.errors import UserError
from rats_video.runtime import Runtime

ConfigT = TypeVar("ConfigT", bound=Config)
PATIENCE = timedelta(hours=2)  # what a reward rank waits for a slow teacher, and all for the last checkpoint


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
    """This process's place among those a launcher started, as its environment tells; alone without one.

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
    """Turn running out of memory into one line that says what would save some; `advice` is asked only then."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError("out of GPU memory", fix=advice()) from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):  # torch's words on a CPU
            raise
        raise UserError("out of memory", fix=advice()) from error


def environment(device: torch.device) -> dict[str, str]:
    """Versions and hardware, for the record."""
    packages = ("rats-video", "torch", "diffusers", "transformers")
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return {
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "device": f"{device.type}: {hardware}",
        "threads": str(torch.get_num_threads()),
    }


def load_seeded(
    model: type[ConfigT], config: str, *, group: str, overrides: Sequence[str], seed: int | None
) -> ConfigT:
    """The configuration a command was given; `--seed` is its last override."""
    extra = [] if seed is None else [f"seed={seed}"]
    return load_config(model, config, group=group, overrides=[*overrides, *extra])


def claim_folder(folder: Path, *, overwrite: bool) -> None:
    """Make an output folder ours; raises UserError if it holds something and `overwrite` is off."""
    if folder.exists() and not folder.is_dir():
        raise UserError("is a file", where=str(folder), fix="give another --output")
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise UserError(
                "already exists and is not empty",
                where=str(folder),
                fix="add --overwrite or another --output",
            )
        if folder.is_symlink():
            raise UserError("is a link", where=str(folder), fix=f"give what it points to: {folder.readlink()}")
        shutil.rmtree(folder)  # removes links, never what they point to
    make_folder(folder)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents; raises UserError where a file is in the way or writing is not allowed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make this folder: {error.strerror}", where=str(folder), fix="give another --output"
        ) from error
