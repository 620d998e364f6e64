"""The run's metrics file: one JSON object a step."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from rats_video.errors import warn
from rats_video.files import replacing


class MetricsFile:
    """Appends rows to a JSON-lines file; a resumed run first drops the rows after its checkpoint.

    A damaged row is skipped with a warning.
    """

    def __init__(self, path: Path, steps_done: int) -> None:
        self._path = path
        rows = [row for row in read_metrics(path) if row["step"] <= steps_done] if path.exists() else []
        if len(rows) < steps_done:
            warn(f"{steps_done - len(rows)} of {steps_done} rows are lost or damaged", where=str(path))
        with replacing(path, "metrics") as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def total(self, name: str) -> float:
        """The sum of a value over all rows; 0 for those without it."""
        return sum(row.get(name, 0.0) for row in read_metrics(self._path))

    def append(self, row: Mapping[str, float]) -> None:
        """Append a row and sync it to the disk: a checkpoint never exists without the rows before it."""
        with self._path.open("a") as file:
            file.write(json.dumps(dict(row)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All complete rows; a line that was damaged, or cut off by a crash, is skipped."""
    rows = []
    for line in path.read_text(errors="replace").split("\n"):
        with contextlib.suppress(ValueError, RecursionError):  # a stranger's may hold more digits or brackets than fit
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows
