"""Shows a running training: a live display on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from rats_video.methods.base import LogRow
from rats_video.methods.finite import SKIPPED
from rats_video.progress import ProgressBar, format_seconds, left_teller
from rats_video.timing import Stopwatch
from rats_video.training.callbacks import Callback
from rats_video.training.faults import ROLLBACKS, SKIPPED_STEP
from rats_video.training.guard import Guard, finite_mean
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder
from rats_video.training.settings import RunSettings

SHOWN = {"reward": "reward/student", "teacher": "reward/teacher", "gate": "gate/weight", "loss": "loss"}
"""Values in a plain line, by the log's names; a skipped step has none of them."""

SMOOTHED, REMEMBERED = 10, 240  # steps: a figure is the mean over, a trend shows
LEAST_TREND, MOST_TREND = 8, 30  # characters
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-=+*#"
BAR, ASCII_BAR = ("━", "╌"), ("#", "-")
ALARM = "ALARM"
REFRESHED = 4  # times a second


class TerminalView(Callback):
    """The main process's display of a training of any method.

    Args:
        cfg: the run's settings.
        run: its log fills the trends of a resumed run.
        device: its memory and time are shown.
        guard: its last evaluation is shown.
        console: to write to; None is stderr.
    """

    def __init__(
        self,
        cfg: RunSettings,
        run: RunFolder,
        device: torch.device,
        guard: Guard | None = None,
        console: Console | None = None,
    ) -> None:
        self._cfg, self._run, self._device, self._guard = cfg, run, device, guard
        self._console = console or Console(file=sys.stderr)
        self._steps, self._start, self._done = cfg.training.steps, 0, 0
        self._began, self._taken = time.monotonic(), 0.0  # the second: seconds of the steps that are done
        self._tell_left = left_teller()
        self._rows: deque[LogRow] = deque(maxlen=REMEMBERED)
        self._skipped = {SKIPPED: 0.0, SKIPPED_STEP: 0.0}
        self._stopwatch = Stopwatch(device)
        self._phases: dict[str, float] = {}
        self._plain: ProgressBar | None = None
        self._live: Live | None = None

    # ------------------------------------------------------------------------------------------------------- observing

    def on_start(self, state: Mapping[str, Any]) -> None:
        """Start the display, with the rows of the log so far."""
        self._start = self._done = state["step"]
        self._began, self._taken = time.monotonic(), 0.0
        if not self._console.is_terminal:
            self._plain = ProgressBar("distill", self._steps, self._start)
            return
        rows = read_metrics(self._run.metrics) if self._run.metrics.is_file() else []
        self._skipped = {name: sum(row.get(name, 0.0) for row in rows) for name in self._skipped}
        self._rows = deque(rows, maxlen=REMEMBERED)
        self._stopwatch = Stopwatch(self._device)
        self._stopwatch.start()
        if self._live is None:  # else the run rolled back
            self._live = Live(
                self, console=self._console, refresh_per_second=REFRESHED, vertical_overflow="crop",
                redirect_stdout=False,
            )  # fmt: skip
            self._live.start()

    def on_step(self, step: int, row: LogRow) -> None:
        """Count a step."""
        self._done = step
        if self._plain is not None:
            self._plain.advance(**{shown: row[name] for shown, name in SHOWN.items() if name in row})
        else:
            self._taken = time.monotonic() - self._began
            self._rows.append(row)
            self._skipped = {name: total + row.get(name, 0.0) for name, total in self._skipped.items()}
            self._phases = self._stopwatch.read()

    def on_end(self) -> None:
        """Stop the display; the last state stays on the terminal."""
        if self._live is not None:
            self._live.stop()
            self._stopwatch.stop()
            self._live = None

    # --------------------------------------------------------------------------------------------------------- showing

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One line a subject, cut to the width: the least important values are at its end."""
        ascii_only, width = options.ascii_only, options.max_width
        room = min(MOST_TREND, max(LEAST_TREND, width // 4))
        lines = [("distill", self._standing(), self._bar(room, ascii_only=ascii_only)), *self._lines(room, ascii_only)]
        indent = max(len(label) for label, *_ in lines) + 2
        for label, parts, drawn in lines:
            yield _line(f"{label:<{indent}}", drawn, parts, width)

    def _standing(self) -> list[str]:
        passed, finished, to_come = time.monotonic() - self._began, self._done - self._start, self._steps - self._done
        left = self._taken / finished * to_come - (passed - self._taken) if finished else None  # it counts down
        told = "?" if left is None else self._tell_left(max(0.0, left))
        return [f"{self._done}/{self._steps}", f"left {told}", f"passed {format_seconds(passed)}"]

    def _bar(self, room: int, *, ascii_only: bool) -> str:
        filled = round(room * self._done / self._steps)
        done, to_come = tuple(ASCII_BAR if ascii_only else BAR)
        return done * filled + to_come * (room - filled)

    def _lines(self, room: int, ascii_only: bool) -> Iterator[tuple[str, Sequence[str], str]]:  # noqa: FBT001
        def trend(name: str) -> str:
            return sparkline(self._values(name), room, ascii_only=ascii_only).ljust(room)

        rewards = self._figures({"student": "reward/student", "teacher": "reward/teacher"})
        yield "reward", [*rewards, *self._figures({"gap": "reward/gap"}, "+.3g")], trend("reward/student")
        if self._values("gate/weight"):
            yield "gate", self._figures({"weight": "gate/weight"}), trend("gate/weight")
        yield "loss", self._figures({"loss": "loss", "gradient": "grad_norm", "rate": "lr"}), trend("loss")
        for name in sorted({name for row in self._rows for name in row if name.endswith("/loss")}):
            yield name.removesuffix("/loss").replace("_", " "), self._figures({"loss": name}), trend(name)
        yield "speed", self._speed(self._taken, self._done - self._start), ""
        if self._guard is not None:
            yield "guard", self._guard_status(self._guard), ""
        back = self._rows[-1].get(ROLLBACKS, 0) if self._rows else 0
        clips, steps = self._skipped.values()
        yield "left out", [f"{clips:.0f} clips", f"{steps:.0f} steps", f"gone back {back:.0f}x"], ""
        if self._device.type == "cuda":
            yield "memory", self._memory(), ""
        yield "next", list(self._next()), ""

    def _values(self, name: str) -> list[float]:
        """A value of the remembered steps that have it."""
        return [row[name] for row in self._rows if name in row]

    def _figures(self, names: Mapping[str, str], form: str = ".3g") -> list[str]:
        """Means over the last steps, of the values that exist."""
        lasts = {shown: self._values(name)[-SMOOTHED:] for shown, name in names.items()}
        return [f"{shown} {finite_mean(values):{form}}" for shown, values in lasts.items() if values]

    def _speed(self, taken: float, finished: int) -> list[str]:
        if not finished:
            return ["the first step is the slowest"]
        each = taken / finished
        phases = sorted(self._phases.items(), key=lambda phase: -phase[1])
        told = [f"{name} {seconds / finished:.2g}" for name, seconds in phases if seconds > 0.005 * taken]
        return [f"{each:.3g} s/step", f"{self._cfg.training.batch_size / each:.3g} clips/s", *told]

    def _guard_status(self, guard: Guard) -> list[str]:
        if not guard.evaluations:
            return ["no look yet"]
        evaluation, best = guard.evaluations[-1], guard.best
        alarm = [f"{ALARM}: {evaluation.alarms[0]}"] if evaluation.alarms else []
        standing = "best so far" if best is evaluation else f"best at {best.step}" if best else "none is sound"
        teacher = guard.record["teacher"]
        scores = [
            f"{name.replace('_', ' ')} {evaluation.mean(name):.3g} ({finite_mean(teacher[name]):.3g})"
            for name in evaluation.scores
            if "/" not in name
        ]
        return [f"at {evaluation.step}", *alarm, standing, *scores, f"drift {evaluation.drift:.2g}"]

    def _memory(self) -> list[str]:
        held, most = torch.cuda.memory_allocated(self._device), torch.cuda.max_memory_allocated(self._device)
        total = torch.cuda.get_device_properties(self._device).total_memory
        return [f"{held / 2**30:.1f} GiB", f"most {most / 2**30:.1f} of {total / 2**30:.1f}"]

    def _next(self) -> Iterator[str]:
        every = {"checkpoint": self._cfg.training.checkpoint_every}
        if self._guard is not None:
            every["guard"] = self._guard.cfg.every
        if self._cfg.validation is not None:
            every["clips"] = self._cfg.validation.every
        for what, steps in every.items():
            if self._done < self._steps:
                yield f"{what} at {min(self._steps, (self._done // steps + 1) * steps)}"


def _line(label: str, drawn: str, parts: Iterable[str], width: int) -> Text:
    """A label, a drawing, and as many of the parts as fit."""
    text = Text(no_wrap=True, overflow="crop")
    text.append(label, style="dim").append(drawn, style="cyan")
    for index, part in enumerate(parts):
        gap = "  " if index or drawn else ""
        if text.cell_len + cell_len(gap + part) > width:
            break
        text.append(gap).append(part, style="bold red" if part.startswith(ALARM) else "")
    text.truncate(width, overflow="crop")
    return text


def sparkline(values: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """Values as bars from the lowest to the highest, one a character; more than `width` are averaged in groups.

    A group without finite values is a blank.
    """
    count = min(width, len(values))
    groups = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
    means = [finite_mean(group) for group in groups]
    known = [mean for mean in means if math.isfinite(mean)]
    if not known:
        return " " * count
    bars, low, high = ASCII_BARS if ascii_only else BARS, min(known), max(known)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((mean - low) * scale)] if math.isfinite(mean) else " " for mean in means)
