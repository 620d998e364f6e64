"""Several processes for one command: `--gpus`, `--nodes`, and how a launched process says how it ended."""

import contextlib
import functools
import inspect
import json
import logging
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from rats_video.cli.options import GpusOption, NodeRankOption, NodesOption, RendezvousOption
from rats_video.errors import Interrupted, UserError

_ENDINGS = "RATS_VIDEO_ENDINGS"  # folder in which launched processes leave how they ended
_GRAVEST_FIRST = (2, 1, 130)  # a mistake, a bug (often of a process that another one's mistake left alone), a stop
_OPTIONS: dict[str, tuple[Any, Any]] = {
    "gpus": (GpusOption, 1),
    "nodes": (NodesOption, 1),
    "node_rank": (NodeRankOption, None),
    "rendezvous": (RendezvousOption, None),
}


def distributed(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that start it on several processes, each of which runs the same command line."""

    @functools.wraps(command)
    def launched(*, gpus: int, nodes: int, node_rank: int | None, rendezvous: str | None, **options: Any) -> None:
        if node_rank is not None and node_rank >= nodes:
            raise UserError(
                f"{node_rank} is none of the {nodes} machines, which count from 0", where="--node-rank",
                fix="check --nodes",
            )  # fmt: skip
        if gpus * nodes == 1 or "WORLD_SIZE" in os.environ:  # alone, or started by this or another launcher
            command(**options)
        else:
            _launch(options["device"], gpus, nodes, node_rank, rendezvous)

    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in _OPTIONS.items()
    ]
    signature = inspect.signature(command)
    # Typer reads both.
    launched.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *extra])  # type: ignore[attr-defined]
    launched.__annotations__ = command.__annotations__ | {name: kind for name, (kind, _) in _OPTIONS.items()}
    return launched


def _launch(device: str, gpus: int, nodes: int, node_rank: int | None, rendezvous: str | None) -> None:
    """Run this command line on `gpus` processes here through torch's elastic launcher, and end as they do."""
    if nodes > 1 and not re.fullmatch(r"[\w.-]+:\d+", rendezvous or ""):
        raise UserError(
            f"{nodes} nodes must know where to meet, got {rendezvous or 'nothing'}", where="--rendezvous",
            fix="give HOST:PORT of one of them, the same on all",
        )  # fmt: skip
    from rats_video.build.common import check_processes

    check_processes(device, gpus, where="--gpus")
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // gpus)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")  # s: a stopped run finishes its step and saves
    with tempfile.TemporaryDirectory(prefix="rats-video-") as folder, _launcher(folder):
        config = LaunchConfig(
            min_nodes=nodes, max_nodes=nodes, nproc_per_node=gpus, max_restarts=0, run_id="rats-video",
            rdzv_backend="c10d" if node_rank is None else "static", rdzv_endpoint=rendezvous or "localhost:0",
            rdzv_configs={} if node_rank is None else {"rank": node_rank},
            local_addr="localhost" if nodes == 1 else None, logs_specs=DefaultLogsSpecs(log_dir=folder),
        )  # fmt: skip
        try:
            elastic_launch(config, sys.executable)("-m", "rats_video.cli", *sys.argv[1:])
        except SignalException:
            _end(Path(folder), "interrupted", 130)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            _end(Path(folder), f"process {rank} was lost: {failure.message}", 2)


def _end(folder: Path, otherwise: str, code: int) -> NoReturn:
    """End as the launched processes did: one's mistake first, then its bug; each would end the others too."""
    endings: list[dict[str, Any]] = [json.loads(path.read_text()) for path in folder.glob("*.ending")]
    endings.sort(key=lambda each: (_GRAVEST_FIRST.index(each["code"]), each["time"]))
    first = (*endings, {"text": otherwise, "code": code})[0]
    match first["code"]:
        case 1:
            sys.stderr.write(first["text"])
            sys.exit(1)
        case 130:
            raise Interrupted(first["text"])
        case _:
            raise UserError(first["text"])


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


class OneVoice:
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
            leave_ending("".join(traceback.format_exception(error)), 1)


def leave_ending(text: str, code: int) -> None:
    """Tell the launcher, where we are one of its processes, how this one ended, and end."""
    if folder := os.environ.get(_ENDINGS):
        ending = {"text": text, "code": code, "time": time.time()}
        path = Path(folder) / f"{os.environ['RANK']}.ending"
        path.with_suffix(".partial").write_text(json.dumps(ending))
        path.with_suffix(".partial").replace(path)  # whole, should we be killed now
        sys.exit(code)
