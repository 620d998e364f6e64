"""What every command's builder needs: devices, folders, records."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch

from rats_video.config.compute import ParallelConfig
from rats_video.config.load import load_config
from rats_video.config.schema import Config
from rats_video.errors import Interrupted, UserError, warn
from rats_video.files import LOCK, locked, write_json
from rats_video.runtime import ALONE, Runtime
from rats_video.training.run_folder import CONFIG, read_sessions

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
    """Versions, command and hardware, for the record."""
    packages = ("rats-video", "torch", "diffusers", "transformers")
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return {
        **{name: version(name) for name in packages},
        "code": code_version(),
        "command": shlex.join(["rats-video", *sys.argv[1:]]),
        "host": platform.node(),
        "python": platform.python_version(),
        "device": f"{device.type}: {hardware}",
        "threads": str(torch.get_num_threads()),
    }


def code_version() -> str:
    """The git commit of a checkout, `-dirty` where files were changed since; else the package's version."""
    try:
        # Tracked: an installed package may lie in somebody else's checkout.
        _git("ls-files", "--error-unmatch", __file__)
        return f"git {_git('describe', '--always', '--dirty', '--abbrev=40', '--exclude=*')}"
    except (OSError, subprocess.SubprocessError):
        return f"rats-video {version('rats-video')}"


def _git(*arguments: str) -> str:
    done = subprocess.run(  # noqa: S603
        ["git", *arguments],  # noqa: S607
        cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def record_session(path: Path, session: Mapping[str, object]) -> None:
    """Add what a run computes with this time to the list at `path`; a damaged list gives way to a new one."""
    try:
        sessions = read_sessions(path)
    except ValueError:
        warn("unreadable, begun anew", where=str(path))
        sessions = []
    write_json(path, [*sessions, session])


def load_seeded(
    model: type[ConfigT], config: str, *, group: str, overrides: Sequence[str], seed: int | None
) -> ConfigT:
    """The configuration a command was given; `--seed` is its last override."""
    extra = [] if seed is None else [f"seed={seed}"]
    return load_config(model, config, group=group, overrides=[*overrides, *extra])


def claim_folder(folder: Path, *, overwrite: bool) -> None:
    """Make an output folder ours; raises UserError if it holds something and `overwrite` is off."""
    check_free(folder, overwrite=overwrite)
    held = sorted(holdings(folder), key=Path.is_dir)  # files first: what is half deleted is no run
    if held and folder.is_symlink():
        raise UserError("is a link", where=str(folder), fix=f"give what it points to: {folder.readlink()}")
    for path in held:
        if path.is_dir() and not path.is_symlink():  # links go, never what they point to
            shutil.rmtree(path)
        else:
            path.unlink()
    make_folder(folder)


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Raise UserError if a file is where an output folder is to be, or it holds something and `overwrite` is off."""
    if folder.exists() and not folder.is_dir():
        raise UserError("is a file", where=str(folder), fix="give another --output")
    if holdings(folder) and not overwrite:
        raise UserError("already exists and is not empty", where=str(folder), fix="add --overwrite or another --output")


def claim_run(folder: Path, *, resume: bool, overwrite: bool) -> bool:
    """Whether there is a run to go on with in an output folder; else it is made ours, to begin one.

    Raises:
        UserError: it holds something, and neither flag is given or there is no run to resume.
    """
    is_run = (folder / CONFIG).is_file()
    if resume and is_run:
        return True
    if resume and holdings(folder):
        raise UserError(f"not a run: it has no {CONFIG}", where=str(folder), fix="check --output")
    if is_run and not overwrite:
        raise UserError("holds a run", where=str(folder), fix="--resume goes on with it, --overwrite replaces it")
    claim_folder(folder, overwrite=overwrite)
    return False


def refuse_changes(folder: Path, changed: Sequence[str]) -> None:
    """Raise UserError if a run's configuration differs from the one it is to go on with."""
    if changed:
        raise UserError(
            f"holds a run of another configuration: {', '.join(changed)} differ",
            where=str(folder), fix="give the same options, another --output, or --overwrite to start anew",
        )  # fmt: skip


def holdings(folder: Path) -> list[Path]:
    """What lies in a folder, but for our own lock on it."""
    return [path for path in folder.iterdir() if path.name != LOCK] if folder.is_dir() else []


def working_in(folder: Path, runtime: Runtime = ALONE) -> contextlib.AbstractContextManager[None]:
    """Context in which no other process works in an output folder; one process of `runtime` locks it for all.

    Raises:
        UserError: another process works there.
    """
    return locked(folder) if runtime.is_main else contextlib.nullcontext()


@contextlib.contextmanager
def stoppable(output: Path) -> Iterator[None]:
    """Ctrl-C stops at once: what is noted as done is whole."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(f"stopped; {output} keeps what is done, and the same command makes the rest") from stop


def make_folder(folder: Path) -> None:
    """Make a folder and its parents; raises UserError where a file is in the way or writing is not allowed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make this folder: {error.strerror}", where=str(folder), fix="give another --output"
        ) from error
