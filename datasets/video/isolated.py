"""A function in processes of its own, each of which may hang, crash or eat memory without harm to the others.

Why no library: `pebble` and `concurrent.futures` hand tasks out through one queue that all workers lock, so that a
worker killed at the wrong moment can stop the rest; none watches memory, and results go through a pipe in pieces. Here
every worker has its own socket, and a result's large buffers come as one nameless memory file (`memfd`): nothing is
left in /dev/shm whoever dies.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import wait
from typing import Any, Generic, Self, TypeVar

from rats_video.datasets.video.isolated_worker import Caught, Failure, receive, serve

Task = TypeVar("Task")
Result = TypeVar("Result")

TOO_LONG = "takes too long"  # the reason of a task that was killed at its time
_AHEAD = 2  # tasks per worker that are begun before the first of them is asked for
_LEFT_TO_PARENT = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


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
                with Caught() as caught:
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
        """Wait for an answer or a deadline, and handle it."""
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
        self._process = context.Process(target=serve, args=(theirs, *setup), daemon=True)
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
            outcome, self.ended = receive(self.connection)
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


@contextmanager
def _signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_PARENT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
