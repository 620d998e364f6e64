"""The worker process of an `IsolatedPool`: answers tasks and sends the results back."""

from __future__ import annotations

import io
import mmap
import os
import pickle
import tempfile
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from rats_video.errors import first_line


@dataclass(frozen=True)
class Failure:
    """Why a task has no result; `reason` is one clause, equal for equal causes."""

    reason: str
    detail: str = ""


class Caught(AbstractContextManager["Caught"]):
    """Turns whatever a function raises at a stranger's file into a `Failure`."""

    outcome: Any = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        reason = getattr(error, "reason", None)  # of `Unreadable`
        if isinstance(reason, str):
            self.outcome = Failure(reason, str(getattr(error, "detail", "")))
        else:
            self.outcome = Failure("its reader failed", f"{type(error).__name__}: {first_line(error)}")
        return True


def serve(connection: Connection, function: Callable[[Any], Any], max_tasks: int, max_growth: int) -> None:
    """Answer tasks until enough was done or the parent is gone."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # there are as many processes as should compute
    connection.send(True)  # noqa: FBT003  # ready
    most = _resident() + max_growth
    for done in range(1, max_tasks + 1):
        try:
            task = connection.recv()
        except EOFError:  # the parent is gone
            return
        with Caught() as caught:
            caught.outcome = function(task)
        _send(connection, caught.outcome, last=done == max_tasks or _resident() > most)
        del task, caught


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _resident() -> int:
    """Bytes of memory this process holds; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


class _Pickler(pickle.Pickler):
    """Leaves the bytes of tensors out of the pickle."""

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, Tensor) and value.dtype != torch.bfloat16:
            return torch.from_numpy, (value.detach().contiguous().numpy(),)
        return NotImplemented


def _send(connection: Connection, outcome: object, *, last: bool) -> None:
    buffers: list[pickle.PickleBuffer] = []
    head = io.BytesIO()
    with Caught() as caught:
        _Pickler(head, protocol=5, buffer_callback=buffers.append).dump(outcome)
    if caught.outcome is not None:
        head, buffers = io.BytesIO(pickle.dumps(caught.outcome)), []
    raws = [buffer.raw() for buffer in buffers]
    connection.send(([raw.nbytes for raw in raws], last, head.getvalue()))
    if raws:
        with _memory_file() as file:
            for raw in raws:
                file.write(raw)
            file.flush()
            send_handle(connection, file.fileno(), None)


def _memory_file() -> Any:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("result"), "wb")
    return tempfile.TemporaryFile()


def receive(connection: Connection) -> tuple[object, bool]:
    """The outcome, and whether it is the worker's last; its buffers stay in the memory file that they came in."""
    sizes, last, head = connection.recv()
    buffers: list[memoryview] = []
    if sizes:
        handle = recv_handle(connection)
        try:
            view = memoryview(mmap.mmap(handle, sum(sizes)) if sum(sizes) else b"")
        finally:
            os.close(handle)
        for size in sizes:
            buffers.append(view[:size])
            view = view[size:]
    return pickle.loads(head, buffers=buffers), last  # noqa: S301  # from our own process
