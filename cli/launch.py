"""Several processes for one command: `--gpus`, `--nodes`, and how a launched process says how it ended."""

import contextlib
import functools
import inspect
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from rats_video.cli.options import (
    Command,
    GpusOption,
    NodeRankOption,
    NodesOption,
    RendezvousOption,
    RestartsOption,
    add_options,
)
from rats_video.errors import REQUEUE, Interrupted, UserError, warn

_ENDINGS = "RATS_VIDEO_ENDINGS"  # folder in which launched processes leave how they ended
_MISTAKE, _BUG = 2, 1  # exit codes
_GRAVEST_FIRST = (_MISTAKE, _BUG, 130, REQUEUE)  # a bug is often of a process that another one's mistake left alone
_SIGNALS = "SIGTERM,SIGINT,SIGUSR1,SIGHUP,SIGQUIT"  # that the launcher passes on
_OPTIONS: dict[str, tuple[Any, Any]] = {
    "gpus": (GpusOption, 1),
    "nodes": (NodesOption, 1),
    "node_rank": (NodeRankOption, None),
    "rendezvous": (RendezvousOption, None),
}


def distributed(command: Command) -> Command:
    """Give a command the options that start it on several processes, each of which runs the same command line.

    One that can resume can also be restarted when a process is lost.
    """
    can_resume = "resume" in inspect.signature(command).parameters

    @functools.wraps(command)
    def launched(
        *, gpus: int, nodes: int, node_rank: int | None, rendezvous: str | None, restarts: int = 0, **options: Any
    ) -> None:
        if node_rank is not None and node_rank >= nodes:
            raise UserError(
                f"{node_rank} is none of the {nodes} machines, which count from 0", where="--node-rank",
                fix="check --nodes",
            )  # fmt: skip
        if "WORLD_SIZE" in os.environ:  # started by this or another launcher
            if can_resume and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
                _check_restart(restarts)
                options |= {"resume": True, "overwrite": False}
            command(**options)
        elif gpus * nodes == 1 and not restarts:
            command(**options)
        else:
            _launch(options["device"], gpus, nodes, node_rank, rendezvous, restarts)

    chosen = _OPTIONS | ({"restarts": (RestartsOption, 0)} if can_resume else {})
    return add_options(launched, command, chosen)


def _launch(device: str, gpus: int, nodes: int, node_rank: int | None, rendezvous: str | None, restarts: int) -> None:
    """Run this command line on `gpus` processes here through torch's elastic launcher, and end as they do."""
    if nodes > 1 and not re.fullmatch(r"[\w.-]+:\d+", rendezvous or ""):
        raise UserError(
            f"{nodes} nodes must know where to meet, got {rendezvous or 'nothing'}", where="--rendezvous",
            fix="give HOST:PORT of one of them, the same on all",
        )  # fmt: skip
    from rats_video.commands.device import check_processes

    check_processes(device, gpus, where="--gpus")
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // gpus)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")  # s: a stopped run finishes its step and saves
    # Or restarted processes meet in the store where the addresses of those before them still stand.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with tempfile.TemporaryDirectory(prefix="rats-video-") as folder, _launcher(folder):
        config = LaunchConfig(
            min_nodes=nodes, max_nodes=nodes, nproc_per_node=gpus, max_restarts=restarts, run_id="rats-video",
            rdzv_backend="c10d" if node_rank is None else "static", rdzv_endpoint=rendezvous or "localhost:0",
            rdzv_configs={} if node_rank is None else {"rank": node_rank},
            local_addr="localhost" if nodes == 1 else None, logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle=_SIGNALS,
        )  # fmt: skip
        try:
            elastic_launch(config, sys.executable)("-m", "rats_video.cli", *sys.argv[1:])
        except SignalException as stop:
            _end(Path(folder), f"stopped by {stop.sigval.name}", 130 if stop.sigval == signal.SIGINT else REQUEUE)
        except ChildFailedError as error:
            lost = {rank: failure for rank, failure in error.failures.items() if failure.exitcode < 0}
            rank, failure = next(iter(lost.items()), error.get_first_failure())
            _end(Path(folder), f"process {rank} was lost: {failure.message}", 2, was_lost=bool(lost))


def _end(folder: Path, otherwise: str, code: int, *, was_lost: bool = False) -> NoReturn:
    """End as the launched processes did: one's mistake first, then its bug; each would end the others too.

    How the others ended after one was lost says nothing, unless it was a mistake.
    """
    endings: list[dict[str, Any]] = [json.loads(path.read_text()) for path in folder.glob("*.ending")]
    endings = [each for each in endings if not was_lost or each["code"] == _MISTAKE]
    endings.sort(key=lambda each: (_GRAVEST_FIRST.index(each["code"]), each["time"]))
    first = (*endings, {"text": otherwise, "code": code})[0]
    if first["code"] == _MISTAKE:
        raise UserError(first["text"])
    if first["code"] == _BUG:
        sys.stderr.write(first["text"])
        sys.exit(_BUG)
    raise Interrupted(first["text"], first["code"])


@contextlib.contextmanager
def _launcher(folder: str) -> Iterator[None]:
    """Children leave their endings in `folder`, and elastic keeps its own long account of a failure to itself."""
    os.environ[_ENDINGS] = folder
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        del os.environ[_ENDINGS]


# ------------------------------------------------------------------------------------------------ launched processes


def _check_restart(restarts: int) -> None:
    """End like the process before this one, or another beside it, if that ended by a mistake: it would be made again.

    What is left of other endings says nothing any more.
    """
    for path in Path(os.environ.get(_ENDINGS, os.devnull)).glob("*.ending"):
        with contextlib.suppress(FileNotFoundError):  # another one was faster
            if json.loads(path.read_text())["code"] == _MISTAKE:
                sys.exit(_MISTAKE)
            path.unlink()
    count = os.environ["TORCHELASTIC_RESTART_COUNT"]
    warn(f"a process was lost: going on from the last checkpoint, restart {count} of {restarts}")


class RankZeroOutput:
    """Context of a command: only the first of its processes prints, and a bug's traceback is left to the launcher."""

    def __init__(self, known: tuple[type[BaseException], ...]) -> None:
        self._known = known
        self._redirected = contextlib.ExitStack()

    def __enter__(self) -> None:
        if os.environ.get("RANK", "0") != "0":
            nowhere = self._redirected.enter_context(Path(os.devnull).open("w"))
            self._redirected.enter_context(contextlib.redirect_stdout(nowhere))
            self._redirected.enter_context(contextlib.redirect_stderr(nowhere))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._redirected.close()  # what ends a process is said even if it is not the first
        if error is not None and not isinstance(error, self._known):
            record_exit("".join(traceback.format_exception(error)), 1)


def record_exit(text: str, code: int) -> None:
    """Tell the launcher, where we are one of its processes, how this one ended, and end."""
    if folder := os.environ.get(_ENDINGS):
        ending = {"text": text, "code": code, "time": time.monotonic()}
        path = Path(folder) / f"{os.environ['RANK']}.ending"
        path.with_suffix(".partial").write_text(json.dumps(ending))
        path.with_suffix(".partial").replace(path)  # whole, should we be killed now
        sys.exit(code)
