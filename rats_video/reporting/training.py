"""Training curves as in the paper's figure: rewards and their crossing, gap, gate, shaping; several runs overlaid."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from xml.etree.ElementTree import Element

from rats_video.evaluation.plots import crossing_step, smoothing_window, trailing_mean
from rats_video.evaluation.tables import metric_title
from rats_video.reporting.chart import Chart, Series, draw
from rats_video.reporting.markup import details, short, tag
from rats_video.reporting.sources import Run

STUDENT, TEACHER, GAP, GATE = "reward/student", "reward/teacher", "reward/gap", "gate/weight"
_FRAME = re.compile(r"gate/frame(\d{1,4})")
_HORIZON = re.compile(r"shaping/([01]\.\d{1,6})")
_FEW = 3  # runs that also show raw values and their teachers
_MOST_OTHERS = 40  # further values that are drawn
_COLORS = 8
_LOGARITHMIC = {"grad_norm", "lr", "loss"}

Points = tuple[list[float], list[float]]
"""Places and values."""


def colors(runs: Iterable[Run]) -> dict[str, str]:
    """A colour for each group, in order."""
    return {group: f"s{index % _COLORS}" for index, group in enumerate(dict.fromkeys(run.group for run in runs))}


def crossing(run: Run) -> float | None:
    """The step after which the student's smoothed reward is above its teacher's; None if it never is."""
    rows = [row for row in run.rows if all(math.isfinite(row.get(key, math.nan)) for key in (STUDENT, TEACHER))]
    if not rows:
        return None
    index = crossing_step([row[STUDENT] for row in rows], [row[TEACHER] for row in rows], smoothing_window(len(rows)))
    return None if index is None else rows[index]["step"]


def training_charts(runs: Sequence[Run], *, by_cost: bool = False) -> list[Element]:
    """All curves of the runs that have a log.

    Args:
        runs: overlaid; those of one group in one colour.
        by_cost: draw them against network evaluations a clip rather than steps, so that methods can be compared.
    """
    runs = [run for run in runs if run.rows]
    axis = "network evaluations a clip" if by_cost else "optimizer step"
    places = _evaluations if by_cost else _steps
    several = len(runs) > 1
    overlaid = [
        _rewards(runs, axis, places),
        draw(Chart("Reward gap, student − teacher", axis, _smooth(runs, GAP, places), levels=[("even", 0, 0, "base")])),  # noqa: RUF001
        draw(Chart("Gate: weight on shaping", axis, _smooth(runs, GATE, places), span=(0, 1), legend=several)),
    ]
    known = {STUDENT, TEACHER, GAP, GATE, "step"}
    each: list[Element | None] = []
    for run in runs if len(runs) <= _FEW else ():
        suffix = f": {run.name}" if len(runs) > 1 else ""
        each.append(_ramp(run, _HORIZON, f"Shaping loss at each noise level{suffix}", axis, places, is_log=True))
        each.append(_ramp(run, _FRAME, f"Gate at each latent frame{suffix}", axis, places, is_log=False))
    keys = dict.fromkeys(key for run in runs for row in run.rows for key in row if key not in known)
    others = [key for key in keys if not _HORIZON.fullmatch(key) and not _FRAME.fullmatch(key)]
    rest = [_other(runs, key, axis, places) for key in others[:_MOST_OTHERS]]
    shown = [chart for chart in (*overlaid, *each) if chart is not None]
    if not shown:  # a method without a reward
        shown, rest = [chart for chart in rest[:1] if chart is not None], rest[1:]
    folded = [chart for chart in rest if chart is not None]
    parts = [tag("div", *shown, class_="charts")] if shown else []
    if folded:
        parts.append(details(f"Everything else that was logged ({len(folded)})", tag("div", *folded, class_="charts")))
    return parts


def _rewards(runs: Sequence[Run], axis: str, places: Callable[[Run, str], Points]) -> Element | None:
    """Student and teacher; of one run in the paper's figure's colours, of several the teachers dashed."""
    looks, lines, marks = colors(runs), list[Series](), list[tuple[float, str, str]]()
    alone = len(runs) == 1
    windows = set()
    for run in runs:
        for key, look, label in (
            (TEACHER, "teacher" if alone else f"dashed {looks[run.group]}", "teacher" if alone else ""),
            (STUDENT, looks[run.group], "student" if alone else run.group),
        ):
            if len(runs) > _FEW and key == TEACHER:
                continue
            x, y = places(run, key)
            window = smoothing_window(len(y))
            windows.add(window)
            if len(runs) <= _FEW and window > 1:
                lines.append(Series("", x, y, f"faint {look}"))
            lines.append(Series(label, x, trailing_mean(y, window), look))
        step = crossing(run)
        if step is not None and places is _steps:
            who = "The student" if alone else run.name
            marks.append((step, f"{who} passes its teacher at step {short(step)}.", looks[run.group]))
    note = f"Mean of the last {max(windows)} steps." if max(windows, default=1) > 1 else ""
    note += "" if alone or len(runs) > _FEW else " Dashed: the teacher of each."
    lines.sort(key=lambda line: "faint" not in line.look)
    return draw(Chart("Reward", axis, lines, marks=marks, note=note, legend=True))


def _smooth(runs: Sequence[Run], key: str, places: Callable[[Run, str], Points]) -> list[Series]:
    looks = colors(runs)
    found = [(run, *places(run, key)) for run in runs]
    return [Series(run.group, x, trailing_mean(y, smoothing_window(len(y))), looks[run.group]) for run, x, y in found]


def _ramp(
    run: Run, pattern: re.Pattern[str], title: str, axis: str, places: Callable[[Run, str], Points], *, is_log: bool
) -> Element | None:
    """A family of values, a line each: noise levels from noise to clip, latent frames from first to last."""
    keys = {key: float(match[1]) for row in run.rows for key in row if (match := pattern.fullmatch(key))}
    ordered = sorted(keys, key=lambda key: keys[key], reverse=is_log)
    lines = []
    for index, key in enumerate(ordered):
        x, y = places(run, key)
        label = f"σ {keys[key]:.3g}" if is_log else f"frame {keys[key]:.0f}"  # noqa: RUF001
        look = f"r{round(7 * index / max(1, len(ordered) - 1))}"
        lines.append(Series(label, x, trailing_mean(y, smoothing_window(len(y))), look))
    return draw(Chart(title, axis, lines, log_y=is_log, span=None if is_log else (0, 1)))


def _other(runs: Sequence[Run], key: str, axis: str, places: Callable[[Run, str], Points]) -> Element | None:
    lines = _smooth(runs, key, places)
    is_log = key in _LOGARITHMIC and all(value > 0 for line in lines for value in line.y)
    return draw(Chart(metric_title(key), axis, lines, log_y=is_log, legend=len(runs) > 1))


def _steps(run: Run, key: str) -> Points:
    kept = [row for row in run.rows if math.isfinite(row.get(key, math.nan))]
    return [row["step"] for row in kept], [row[key] for row in kept]


def _evaluations(run: Run, key: str) -> Points:
    """Against network evaluations a clip since the start."""
    spent = accumulate(max(0.0, row.get("evaluations", 0.0)) for row in run.rows)
    kept = [
        (place, row[key]) for place, row in zip(spent, run.rows, strict=True) if math.isfinite(row.get(key, math.nan))
    ]
    return [place for place, _ in kept], [value for _, value in kept]
