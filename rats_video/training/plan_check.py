"""Compares the time and memory of a run's first steps with its plan."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from rats_video.files import write_json

STEPS = 3  # the first has no optimizer state yet, and everything is slower once


class PlanCheck:
    """Takes the seconds of each step; after the third it prints how far the plan was off, and writes it to plan.json.

    On a CPU only the seconds are compared: torch measures no peak memory there.

    Args:
        path: the run's plan.json; without one nothing is compared.
        device: where the run computes.
        steps: of the run; if they are fewer than three, it compares after the last.
    """

    def __init__(self, path: Path, device: torch.device, steps: int) -> None:
        self._path, self._device = path, device
        self._seconds: list[float] = []
        self._wanted = min(STEPS, steps) if path.is_file() else 0
        if self._wanted and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def step_done(self, seconds: float) -> None:
        """Called after each step; only the third call compares."""
        self._seconds.append(seconds)
        if len(self._seconds) != self._wanted:
            return
        plan = json.loads(self._path.read_text())
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None
        measured = {"seconds": self._seconds, "peak_bytes": peak}
        write_json(self._path, {**plan, "measured": measured})
        print(compared(plan["seconds_per_step"], plan["peak_bytes"], min(self._seconds), peak), file=sys.stderr)  # noqa: T201


def compared(planned_seconds: float, planned_peak: int, seconds: float, peak: int | None) -> str:
    """The line a run shows, e.g. `plan: 1.0 s a step expected, 1.3 s measured; peak memory is not measured on a CPU`.

    Args:
        planned_seconds: a step.
        planned_peak: bytes of live tensors.
        seconds: of the fastest step.
        peak: bytes; None where it is not measured.
    """
    time = f"plan: {planned_seconds:.3g} s a step expected, {seconds:.3g} s measured"
    if peak is None:
        return f"{time}; peak memory is not measured on a CPU"
    off = (planned_peak - peak) / peak
    return f"{time}; peak {planned_peak / 2**30:.2f} GiB expected, {peak / 2**30:.2f} GiB measured ({off:+.0%})"
