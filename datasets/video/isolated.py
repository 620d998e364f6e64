"""A function in processes of its own, each of which may hang, crash or eat memory without harm to the others.

Why no library: `pebble` and `concurrent.futures` hand tasks out through one queue that all workers lock, so that a
worker killed at the wrong moment can stop the rest; none watches memory, and results go through a pipe in pieces. Here
every worker has its own socket, and a result's large buffers come as one nameless memory file (`memfd`): nothing is
left in /dev/shm whoever dies.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from rats_video.errors import first_line

Task = TypeVar("Task")
Result = TypeVar("Result")

TOO_LONG = "takes too long"  # the reason of a task that was killed at its time
_AHEAD = 2  # tasks per worker that are begun before the first of them is asked for
_LEFT_TO_PARENT = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


@dataclass(frozen=True)
class Failure:
    """Why a task has no result; `reason` is one clause, equal for equal causes."""

    reason: str
    detail: str = ""


@dataclass
class _Job(Generic[Task, Result]):
    task: Task
    outcome: Result | Failure | None = None
    done: bool = False


class IsolatedPool(Generic[Task, Result]):
    """Runs a function on tasks in worker processes.

    A task that takes longer than its time, or whose process dies, gives a `Failure` and the worker is replaced. So is
    one that is done with `max_tasks`, or has grown by `max_growth`: decoders leak.

    Args:
        function: picklable by its name; what it raises becomes a `Failure`, too.
        workers: processes; 0 runs the function in this one, without a limit of time.
        timeout_seconds: of one task.
        max_tasks: after which a worker is replaced.
        max_growth: bytes of resident memory over what it began with, after which a worker is replaced.
    """

    def __init__(
        self,
        function: Callable[[Task], Result],
        *,
        workers: int,
        timeout_seconds: float,
        max_tasks: int = 1000,
        max_growth: int = 2**30,
    ) -> None:
        self._function, self._timeout = function, timeout_seconds
        self._setup = (function, max_tasks, max_growth)
        self._count = workers
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill all workers."""
        while self._workers:
            self._workers.pop().kill()

    def imap(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Result | Failure]]:
        """Each task with its result, in the order of the tasks; at most two tasks per worker are begun ahead.

        Closing the iterator, or an error in whoever iterates, kills the workers.

        Raises:
            RuntimeError: workers die before their first task: the function cannot be imported there.
        """
        if not self._count:
            for task in tasks:
                with _Caught() as caught:
                    caught.outcome = self._function(task)
                yield task, caught.outcome
            return
        try:
            yield from self._run(iter(tasks))
        finally:
            self.close()

    def _run(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Result | Failure]]:
        window: deque[_Job[Task, Result]] = deque()
        waiting: deque[_Job[Task, Result]] = deque()
        more = True
        while more or window:
            while more and len(window) < _AHEAD * self._count:
                try:
                    job: _Job[Task, Result] = _Job(next(tasks))
                except StopIteration:
                    more = False
                else:
                    window.append(job)
                    waiting.append(job)
            while len(self._workers) < min(self._count, len(window)):
                self._workers.append(_Worker(self._setup))
            for worker in self._workers:
                if waiting and worker.ready and not worker.job:
                    worker.give(waiting.popleft(), self._timeout)
            if window and not window[0].done:
                self._wait()
            while window and window[0].done:
                job = window.popleft()
                yield job.task, job.outcome  # type: ignore[misc]  # None is a result like any other

    def _wait(self) -> None:
        """Wait until something happens, and take it in."""
        busy = [worker for worker in self._workers if worker.job or not worker.ready]
        nearest = min(worker.deadline for worker in busy)
        pause = None if nearest == float("inf") else max(0.0, nearest - time.monotonic())
        answered = wait([worker.connection for worker in busy], pause)
        for worker in busy:
            if worker.connection in answered:
                worker.take()
            elif worker.deadline <= time.monotonic():
                worker.fail(Failure(TOO_LONG, f"over {self._timeout:g} s"))
            if worker.ended:
                worker.kill()
                self._workers.remove(worker)


class _Worker:
    """A process, seen from outside."""

    def __init__(self, setup: tuple[Callable[[Any], Any], int, int]) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, *setup), daemon=True)
        with _signals_blocked():  # the process inherits this: what stops a run is its parent's to hear
            self._process.start()
        theirs.close()
        self.ready = self.ended = False
        self.job: _Job[Any, Any] | None = None
        self.deadline = float("inf")

    def give(self, job: _Job[Any, Any], timeout: float) -> None:
        self.job, self.deadline = job, time.monotonic() + timeout
        try:
            self.connection.send(job.task)
        except OSError:
            self._died()

    def take(self) -> None:
        """Receive what the process sent, or find that it is dead."""
        try:
            if not self.ready:
                self.ready = self.connection.recv()
                return
            outcome, self.ended = _receive(self.connection)
        except (EOFError, OSError):
            self._died()
            return
        self._finish(outcome)

    def fail(self, failure: Failure) -> None:
        self.ended = True
        self._finish(failure)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        self.connection.close()

    def _finish(self, outcome: object) -> None:
        assert self.job is not None
        self.job.outcome, self.job.done = outcome, True
        self.job, self.deadline = None, float("inf")

    def _died(self) -> None:
        self._process.join()
        code = self._process.exitcode or 0
        if not self.ready:
            raise RuntimeError(f"a worker ended with code {code} before its first task; see above")
        said = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        self.fail(Failure("its process died", f"{said}, out of memory?" if code == -signal.SIGKILL else said))


class _Caught(AbstractContextManager["_Caught"]):
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


@contextmanager
def _signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_PARENT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ------------------------------------------------------------------------------------------- in the process


def _serve(connection: Connection, function: Callable[[Any], Any], max_tasks: int, max_growth: int) -> None:
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
        with _Caught() as caught:
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
    with _Caught() as caught:
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


def _receive(connection: Connection) -> tuple[object, bool]:
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
