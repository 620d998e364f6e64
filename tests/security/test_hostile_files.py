"""Two thousand hostile files, read by one process under a memory limit: none kills it, hangs it or raises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

NUM_FILES = 2_000
EACH = 140  # examples of each kind of file and mutation
READER = Path(__file__).with_name("reader.py")


def test_two_thousand_files(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, str(READER), str(tmp_path), str(EACH)],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == 0, f"{process.returncode}: {process.stderr[-4000:]}"
    found = json.loads(process.stdout)
    counts, taken = found["counts"], found["taken"]
    assert sum(counts.values()) >= NUM_FILES
    assert min(counts.values()) >= EACH // 4, counts
    # Some mutations leave a file sound: the readers were really reached.
    for kind in ("lora", "checkpoint", "rats.json", "model_index.json", "prompts", "video", "word reward"):
        assert taken[kind] > 0, kind
        assert taken[kind] < counts[kind], kind
