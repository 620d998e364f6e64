"""Death at a chosen moment."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest


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
