"""Compares what a run measures in its first steps with what its plan expected."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from rats_video.files import write_json

STEPS = 3  # the first has no optimizer state yet, and everything is slower once


class PlanCheck:
    """Told the seconds of each step, it says after the third how far the plan was off, and notes it in plan.json.

    On a CPU only the seconds are compared: torch counts no peak there.

    Args:
        path: the run's plan.json; without one nothing is compared.
        device: where the run computes.
        steps: how many the run will do; where it is fewer than three, the last one is looked at.
    """

    def __init__(self, path: Path, device: torch.device, steps: int) -> None:
        self._path, self._device = path, device
        self._seconds: list[float] = []
        self._wanted = min(STEPS, steps) if path.is_file() else 0
        if self._wanted and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def step_done(self, seconds: float) -> None:
        """After each step; all but the third do nothing."""
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
