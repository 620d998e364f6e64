"""The run's metrics file: one JSON object a step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


class MetricsFile:
    """Appends rows to a JSON-lines file; a resumed run first drops the rows after its checkpoint."""

    def __init__(self, path: Path, steps_done: int) -> None:
        self._path = path
        rows = [row for row in read_metrics(path) if row["step"] <= steps_done] if path.exists() else []
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def total(self, name: str) -> float:
        """The sum of a value over all rows; 0 for those without it."""
        return sum(row.get(name, 0.0) for row in read_metrics(self._path))

    def append(self, row: Mapping[str, float]) -> None:
        """Write one row through to the disk's cache, so that a crash loses none."""
        with self._path.open("a") as file:
            file.write(json.dumps(dict(row)) + "\n")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All whole rows; a line cut off by a crash is ignored."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
