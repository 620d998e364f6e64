"""Death at a chosen moment."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch


def killed(act: Callable[[], None], target: str, calls: int) -> None:
    """Do it in a fork that is killed instead of the `calls`-th call of `target`."""
    if pid := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, target
        return
    try:
        with pytest.MonkeyPatch.context() as patch:
            left, module = calls, target
            original = _find(target)

            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **options)

            patch.setattr(module, call)
            act()
    finally:
        os._exit(1)


@contextmanager
def dying_in_every_second_step() -> Iterator[None]:
    """A training that is stopped by Ctrl-C in the second step of each of its sessions."""
    step, steps = torch.optim.Optimizer.zero_grad, 0

    def killed(optimizer: Any, *_: Any, **options: Any) -> None:
        nonlocal steps
        steps += 1
        if steps % 2 == 0:
            raise KeyboardInterrupt
        step(optimizer, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Optimizer, "zero_grad", killed)
        yield


def _find(target: str) -> Any:
    from importlib import import_module

    parts = target.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            found = import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for name in parts[end:]:
            found = getattr(found, name)
        return found
    raise LookupError(target)
