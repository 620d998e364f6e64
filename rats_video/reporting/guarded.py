"""The guard's record: measures of each evaluation beside the teacher's, alarms, and the student it kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from xml.etree.ElementTree import Element

from rats_video.evaluation.stats import Estimate, mean_ci95
from rats_video.evaluation.tables import metric_heading
from rats_video.reporting.chart import Chart, Series, draw
from rats_video.reporting.markup import tag
from rats_video.reporting.sources import Run
from rats_video.reporting.training import colors


def guard_charts(runs: Sequence[Run]) -> list[Element]:
    """A chart a measure, the runs overlaid; the teacher's mean is dashed."""
    seen = [(run, run.guard) for run in runs if run.guard is not None and run.guard.looks]
    looks = colors(runs)
    names = dict.fromkeys(name for _, guard in seen for name in guard.looks[0].scores if "/" not in name)
    charts = []
    for name in names:
        lines, levels = list[Series](), list[tuple[str, float, float, str]]()
        for run, guard in seen:
            found = [(row.step, _mean(row.scores.get(name, []))) for row in guard.looks]
            means = [(step, estimate) for step, estimate in found if estimate is not None]
            x, y = [float(step) for step, _ in means], [estimate.mean for _, estimate in means]
            error = [estimate.ci95 for _, estimate in means]
            lines.append(Series(run.group, x, y, looks[run.group], error, markers=True))
            if goal := _mean(guard.teacher.get(name, [])):
                levels.append((f"teacher of {run.name}", goal.mean, 0.0, looks[run.group]))
        if len({value for _, value, _, _ in levels}) == 1:  # of one run, or the same
            levels = [("teacher", levels[0][1], 0.0, "teacher")]
        lines = [replace(line, shift=4.0 * (index - (len(lines) - 1) / 2)) for index, line in enumerate(lines)]
        charts.append(draw(Chart(metric_heading(name), "optimizer step", lines, levels)))
    drift = [_drift(run, looks[run.group]) for run, _ in seen]
    charts.append(draw(Chart("Drift of the weights", "optimizer step", drift)))
    return [chart for chart in charts if chart is not None]


def verdicts(runs: Sequence[Run]) -> Element:
    """The student that was kept, and every alarm."""
    items = []
    for run in runs:
        guard = run.guard
        if guard is None or not guard.looks:
            items.append(tag("li", tag("b", run.name), " had no guard, or it has not looked yet."))
            continue
        kept = (
            "no student is free of alarms" if guard.best is None else f"the best student is that of step {guard.best}"
        )
        alarms = [tag("li", f"Step {row.step}: {alarm}", class_="alarm") for row in guard.looks for alarm in row.alarms]
        said = f": {len(guard.looks)} looks, {kept}; " + (f"{len(alarms)} alarms." if alarms else "no alarm.")
        items.append(tag("li", tag("b", run.name), said, tag("ul", *alarms) if alarms else None))
    return tag("ul", *items, class_="verdicts")


def _drift(run: Run, look: str) -> Series:
    assert run.guard is not None
    found = [(float(each.step), each.drift) for each in run.guard.looks if each.drift is not None]
    return Series(run.group, [step for step, _ in found], [drift for _, drift in found], look, markers=True)


def _mean(values: Sequence[float | None]) -> Estimate | None:
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    return mean_ci95(numbers) if numbers else None
