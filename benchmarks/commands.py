"""Commands of rats-video, run as a user would, several at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run_all(commands: Sequence[Sequence[str]], jobs: int, **environment: str) -> None:
    """Run them, `jobs` at a time; one whose `--output` is there goes on. Ends the program if one fails."""
    waiting, running = [["rats-video", *command] for command in commands], list[subprocess.Popen[bytes]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            command = waiting.pop(0)
            output = Path(command[command.index("--output") + 1])
            command += ["--resume"] if output.exists() else []
            print("+", *command, flush=True)
            variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
            running.append(subprocess.Popen(command, env=variables))  # noqa: S603  # our own command
        done = running.pop(0)
        if done.wait() != 0:
            sys.exit(f"failed: {' '.join(map(str, done.args))}")  # type: ignore[arg-type]  # a list, as given


def sets(overrides: Sequence[str]) -> list[str]:
    """`--set` before each."""
    return [item for each in overrides for item in ("--set", each)]
