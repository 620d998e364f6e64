"""A distillation through the command line, and a disk that can be full."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from few_calls import FEW_CALLS

Command = Callable[..., Any]


@pytest.fixture
def distill(command: Command, config_file: Path, tmp_path: Path) -> Command:
    """`distill` in few calls into a folder of `tmp_path`: `distill("run", "--resume", "a.b=1")`."""

    def call(name: str | Path, *arguments: str) -> Any:
        both = (*FEW_CALLS, *arguments)
        options = [part for each in both for part in ([each] if each.startswith("--") else ["--set", each])]
        return command("distill", "--config", config_file, "--output", tmp_path / name, *options)

    return call


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no file system may be mounted here")
        return folder

    yield mount
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)
