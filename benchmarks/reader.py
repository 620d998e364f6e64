"""What exactness costs: our reader against a bare decord loop, and memory after many opens.

    python benchmarks/reader.py [--repeats 15] [--opens 300] [--clips FOLDER] -> results/reader.json

Each read opens the file and takes 16 frames, evenly spaced. Rounds are interleaved, in seconds of the process's own
computing (both decode in one thread), so that other work on the machine hits both alike.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import decord
import numpy as np
import torch
from measure import median_ratio, write_result

from rats_video.datasets.video.isolated import IsolatedPool
from rats_video.datasets.video.reader import open_video
from rats_video.inference.video import write_mp4

FRAMES = 16


def ours(path: Path) -> None:
    """Read with `open_video`."""
    with open_video(path) as video:
        video.frames(np.linspace(0, video.num_frames - 1, FRAMES).astype(int).tolist())


def bare(path: Path) -> None:
    """Read with decord alone."""
    reader = decord.VideoReader(str(path), num_threads=1)
    reader.get_batch(np.linspace(0, len(reader) - 1, FRAMES).astype(int)).asnumpy()


def resident(path: Path) -> int:
    """Read, and say how much memory this process holds then."""
    ours(path)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(path: Path, repeats: int) -> dict[str, object]:
    """Seconds of both, and how many times as fast ours is."""
    taken: dict[str, list[float]] = {"ours": [], "bare decord": []}
    calls: dict[str, Callable[[Path], None]] = {"ours": ours, "bare decord": bare}
    for turn in range(repeats + 1):  # the first warms up
        for name, call in calls.items():
            began = time.process_time()
            call(path)
            if turn:
                taken[name].append(time.process_time() - began)
    seconds = {name: statistics.median(each) for name, each in taken.items()}
    return {
        "seconds": seconds,
        "throughput ratio": seconds["bare decord"] / seconds["ours"],
        "median of paired ratios": median_ratio(taken["bare decord"], taken["ours"]),
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--opens", type=int, default=300)
    parser.add_argument("--clips", type=Path, help="folder of real mp4 files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "moving.mp4")
        ramp = torch.linspace(0, 6, 832) + torch.linspace(0, 4, 480)[:, None]
        clip = torch.stack([(ramp + at / 8 + torch.rand(480, 832) / 9).sin() / 2 + 0.5 for at in range(81)])
        write_mp4(clip[:, None].expand(-1, 3, -1, -1), path, fps=16)
        rows = {"81 frames of 480 x 832": measure(path, options.repeats)}
        for real in sorted(options.clips.glob("*.mp4")) if options.clips else ():
            rows[real.name] = measure(real, options.repeats)
        with IsolatedPool(resident, workers=1, timeout_seconds=60) as pool:
            memory = [int(answer) for _, answer in pool.imap([path] * options.opens) if isinstance(answer, int)]
    write_result("reader", {
        "bar": 0.95, "frames": FRAMES, "reads": rows,
        "memory": {
            "opens": len(memory), "resident after the first": memory[0], "after the last": memory[-1],
            "most": max(memory),
        },
    })  # fmt: skip


if __name__ == "__main__":
    main()
