"""The rows of one part of gpu.py, kept as they come."""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from speed import machine

Row = dict[str, Any]
PACKAGES = ("diffusers", "transformers", "peft", "numpy")


class Rows:
    """Results by row in a JSON file, which is whole after each row.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.folder = path.parent
        self._rows: dict[str, Row] = {}

    def add(self, name: str, measure: Callable[[], Row]) -> Row:
        """Measure a row; a failure is written in its place, and costs no other row."""
        began = time.perf_counter()
        try:
            row = measure()
        except Exception as error:  # noqa: BLE001  # whatever it is, the other rows are still wanted
            row = {"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"}
            traceback.print_exc()
        self._rows[name] = row = {**row, "took s": round(time.perf_counter() - began, 1)}
        partial = self._path.with_suffix(".tmp")
        partial.write_text(json.dumps(self._rows, indent=2) + "\n")
        partial.replace(self._path)
        print(name, row, flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return row


def bar(measured: float, *, at_most: float | None = None, at_least: float | None = None) -> dict[str, Any]:
    """A figure beside what it is to reach."""
    if at_most is not None:
        return {"measured": round(measured, 5), "bar": f"<= {at_most:.3g}", "kept": measured <= at_most}
    assert at_least is not None
    return {"measured": round(measured, 5), "bar": f">= {at_least:.3g}", "kept": measured >= at_least}


def main(description: str | None, known: Mapping[str, Callable[[Rows, bool], None]]) -> None:
    """Run the part that the command line names, as gpu.py calls it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("part", choices=list(known))
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("there is no GPU here: --rehearse runs tiny models on the CPU")
    device = torch.device("cpu" if options.rehearse else "cuda")
    rows = Rows(options.output)
    rows.add("machine", lambda: {"on": machine(device), **{name: version(name) for name in PACKAGES}})
    known[options.part](rows, options.rehearse)
