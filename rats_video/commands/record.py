"""A run's record of its environment."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

from rats_video.errors import warn
from rats_video.files import write_json
from rats_video.training.run_folder import read_sessions


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
    """Append a session's environment to the list at `path`; a damaged list is replaced."""
    try:
        sessions = read_sessions(path)
    except ValueError:
        warn("unreadable, begun anew", where=str(path))
        sessions = []
    write_json(path, [*sessions, session])
