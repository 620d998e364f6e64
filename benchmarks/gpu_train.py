"""Trains the embedded model's parts on the GPU by the project's own commands: `python benchmarks/gpu.py --only train`.

Each command's folder is packed into one file beside the JSON, NAME.tar.gz, as soon as the command ends. One that the
time runs out on is asked to save first.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from gpu import TOTAL
from gpu_rows import Row, Rows, main

SECONDS, GRACE = TOTAL - 60, 30  # of all commands; of the last one's saving
LARGEST = 16 * 2**20  # bytes of a file that comes back
COMMANDS = {  # `make assets`, up to the reward that is not judged by
    "vae": ("train", "vae"),
    "teacher": ("train", "teacher", "--set", "vae={work}/vae"),
    "reward": ("train", "reward", "--set", "model={work}/teacher"),
}
REHEARSED = {
    "vae": ("stages=[{num_frames: 1, batch_size: 2, steps: 2, lr: 1e-3}]", "stats_clips=32", "eval_clips=16"),
    "teacher": ("steps=2", "num_clips=32"),
    "reward": ("steps=2", "word_steps=2", "num_samples=24", "num_round_trips=12"),
}


def train(rows: Rows, rehearse: bool) -> None:  # noqa: FBT001
    """VAE, teacher and reward, each from the one before."""
    until = time.monotonic() + SECONDS
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, command in COMMANDS.items():
            settings = [item for each in REHEARSED[name] for item in ("--set", each)] if rehearse else []
            arguments = [*(word.format(work=work) for word in command), *settings, "--output", str(work / name)]
            arguments += ["--device", "cpu" if rehearse else "cuda"]
            row = rows.add(name, partial(run_and_pack, arguments, work / name, rows.folder, until - time.monotonic()))
            if row.get("ended") != "done":
                break  # the next one starts from this one


def run_and_pack(arguments: Sequence[str], made: Path, out: Path, limit: float) -> Row:
    """Run one command of rats-video, and pack its folder whether it ended or was stopped."""
    began, ended = time.monotonic(), "done"
    command = [sys.executable, "-P", "-c", "from rats_video.cli.app import main; main()", *arguments]
    process = subprocess.Popen(command)  # noqa: S603  # our own command
    try:
        code = process.wait(limit)
        ended = "done" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        process.terminate()  # it saves its state
        ended = f"stopped after {limit:.0f} s: exit code {process.wait(GRACE)}"
    row: Row = {"ended": ended, "s": round(time.monotonic() - began, 1)}
    return row | (pack(made, out / f"{made.name}.tar.gz") if made.is_dir() else {})


def pack(folder: Path, file: Path) -> Row:
    """The folder as one file, or its size where that is too large to come back."""
    with tarfile.open(file, "w:gz") as packed:
        packed.add(folder, folder.name)
    size = file.stat().st_size
    if size > LARGEST:
        file.unlink()
        return {"left out": f"{size / 2**20:.0f} MiB"}
    return {"MiB": round(size / 2**20, 2)}


if __name__ == "__main__":
    main(__doc__, {"train": train})
