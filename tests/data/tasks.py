"""What workers are given to do."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

import torch
from torch import Tensor

from rats_video.datasets.video.reader import open_video


def act(task: str) -> int | Tensor:
    """Do what the task says."""
    match task.split():
        case ["hang"]:
            time.sleep(1000)
        case ["crash"]:
            ctypes.string_at(0)
        case ["killed"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["raise"]:
            raise ValueError("bad")
        case ["tensor"]:
            return torch.arange(2**20, dtype=torch.int64).to(torch.uint8)
    return os.getpid()


def count_frames(path: Path) -> int:
    """Read first, middle and last frame of a video."""
    with open_video(path) as video:
        video.frames([0, video.num_frames // 2, video.num_frames - 1])
        return video.num_frames
