"""Results of students: the method table, and quality against network evaluations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from xml.etree.ElementTree import Element

from rats_video.evaluation.compare_result import BASE, CompareResult
from rats_video.evaluation.tables import (
    METRIC_TITLES,
    TEACHER,
    Direction,
    MetricValue,
    best_of,
    better,
    metric_heading,
    metric_title,
)
from rats_video.reporting.chart import Chart, Series, draw
from rats_video.reporting.markup import Child, details, table, tag, unknown
from rats_video.reporting.sources import CompareFolder, Run
from rats_video.reporting.training import colors

HEADLINE = 4  # curves that are not folded away


@dataclass(frozen=True)
class TableRow:
    """A row of the table: name, sampler and metrics of an arm; `look` is its colour, None means unknown."""

    name: str
    look: str
    num_steps: int
    nfe: int
    metrics: dict[str, MetricValue]
    seconds: float | None = None
    count: int | None = None


def run_arms(runs: Sequence[Run]) -> list[TableRow]:
    """The arms of all evaluations: teacher and base model once if they are the same, students by their run."""
    looks, arms = colors(runs), dict[object, TableRow]()
    alone = len(runs) == 1
    for run in runs:
        for row in run.table:
            is_student = row.arm not in {TEACHER, BASE}
            key = (row.arm, row.num_steps, row.nfe, row.model_dump_json(include={"metrics"}), is_student and run.name)
            taken = any(arm.name == row.arm and arm.nfe == row.nfe for arm in arms.values())
            name = row.arm if alone else run.name if row.arm == "student" else f"{row.arm} of {run.name}"
            name = row.arm if not is_student and not taken else name
            look = looks[run.group] if is_student else row.arm
            arms.setdefault(
                key, TableRow(name, look, row.num_steps, row.nfe, row.metrics, row.seconds_per_clip, row.num_clips)
            )
    return sorted(arms.values(), key=lambda arm: ({TEACHER: 0, BASE: 1}.get(arm.look, 2), arm.name != arm.look))


def method_arms(compared: CompareResult) -> list[TableRow]:
    """The means of a comparison of methods."""
    names = [each.method for each in compared.means if each.method not in {TEACHER, BASE}]
    looks = {name: f"s{index % 8}" for index, name in enumerate(dict.fromkeys(names))}
    return [
        TableRow(
            each.method, looks.get(each.method, each.method), each.num_steps, each.nfe, each.metrics,
            count=each.num_seeds or None,
        )
        for each in compared.means
    ]  # fmt: skip


def metric_names(arms: Iterable[TableRow]) -> list[str]:
    """All metrics, the known ones first."""
    found = dict.fromkeys(name for arm in arms for name in arm.metrics)
    return [name for name in dict.fromkeys((*METRIC_TITLES, *found)) if name in found]


def results_table(arms: Sequence[TableRow], *, label: str, count: str = "clips") -> Element:
    """The arms with all their metrics; a click on a column's title, or Enter on it, sorts by it.

    Args:
        arms: rows.
        label: of the table, for screen readers.
        count: the title of `TableRow.count`.
    """
    names = metric_names(arms)
    timed = any(arm.seconds is not None for arm in arms)
    head = [tag("th", "arm", scope="col"), _sortable("steps"), _sortable("NFE", "lower")]
    head += [_sortable("s/clip", "lower")] if timed else []
    head += [
        _sortable(count),
        *(_sortable(METRIC_TITLES.get(name, name.replace("_", " ")), better(name)) for name in names),
    ]
    best = {
        name: best_of(name, [(arm.look == TEACHER, arm.metrics[name].mean) for arm in arms if name in arm.metrics])
        for name in names
    }
    rows = []
    for arm in arms:
        cells: list[Child] = [
            tag("th", tag("span", class_=f"key {arm.look}", aria_hidden="true"), arm.name, scope="row")
        ]
        cells += [_number(arm.num_steps, f"{arm.num_steps}"), _number(arm.nfe, f"{arm.nfe}")]
        if timed:
            cells += [unknown("not timed") if arm.seconds is None else _number(arm.seconds, f"{arm.seconds:.2f}")]
        cells += [unknown("it is not trained here") if arm.count is None else _number(arm.count, f"{arm.count}")]
        cells += [_metric(arm.metrics.get(name), best[name]) for name in names]
        rows.append(cells)
    return table(head, rows, label=label, class_="sortable")


def nfe_charts(arms: Sequence[TableRow]) -> list[Element]:
    """Each metric against NFE with 95% bars, a line an arm; the teacher all across."""
    charts = [chart for name in metric_names(arms) if (chart := _nfe_chart(arms, name)) is not None]
    parts = [tag("div", *charts[:HEADLINE], class_="charts")]
    if charts[HEADLINE:]:
        more = tag("div", *charts[HEADLINE:], class_="charts")
        parts.append(details(f"The other {len(charts) - HEADLINE} metrics", more))
    return parts


def wins(methods: CompareFolder) -> Element | None:
    """The share of clips on which each method scores higher than another, for each metric and NFE."""
    found = methods.compared.wins
    names = [name for name in METRIC_TITLES if any(win.metric == name for win in found)]
    parts = []
    for metric in names[:HEADLINE]:
        for nfe in sorted({win.nfe for win in found}):
            against, rates = methods.compared.rates(metric, nfe)
            rows: list[list[Child]] = [
                [tag("th", method, scope="row"), *map(_metric, values)] for method, values in rates.items()
            ]
            title = f"{metric_title(metric)} at {nfe} NFE"
            if rows:
                head = ["method", *(f"against {name}" for name in against)]
                parts.append(details(title, table(head, rows, label=f"Win rates, {title}")))
    return tag("div", tag("h3", "Win rates"), tag("p", _WINS, class_="note"), *parts) if parts else None


_WINS = "Share of clips that score higher than the opponent's on the same prompt and noise; a tie is half a win."


def _sortable(title: str, direction: Direction | None = None) -> Element:
    said = {"higher": ("↑", "higher is better"), "lower": ("↓", "lower is better"), "near teacher": ("≈", _NEAR)}
    if direction is None:
        return tag("th", title, scope="col")
    arrow, why = said[direction]
    return tag("th", title, tag("span", f" {arrow}", title=why, class_="better"), scope="col")


_NEAR = "best near the teacher's"


def _number(value: float, text: str) -> Element:
    return tag("td", text, data_v=value)


def _metric(value: MetricValue | None, best: float | None = None) -> Element:
    if value is None:
        return unknown("not measured")
    mean = f"{value.mean:z.3f}"
    interval = f" ± {value.ci95:.3f}" if math.isfinite(value.ci95) else ""
    shown = tag("strong", mean) if value.mean == best else mean
    return tag("td", shown, tag("small", interval) if interval else None, data_v=f"{value.mean!r}")


def _nfe_chart(arms: Sequence[TableRow], metric: str) -> Element | None:
    rows = [arm for arm in arms if metric in arm.metrics]
    teachers = [arm for arm in rows if arm.look == TEACHER]
    levels = [
        (f"{arm.name}, {arm.nfe} NFE", value.mean, value.ci95 if math.isfinite(value.ci95) else 0.0, TEACHER)
        for arm in teachers
        for value in [arm.metrics[metric]]
    ]
    lines = []
    for name in dict.fromkeys(arm.name for arm in rows if arm.look != TEACHER):
        points = sorted((arm for arm in rows if arm.name == name), key=lambda arm: arm.nfe)
        values = [arm.metrics[metric] for arm in points]
        x = [float(arm.nfe) for arm in points]
        y, error = [value.mean for value in values], [value.ci95 for value in values]
        lines.append(Series(name, x, y, points[0].look, error, markers=True))
    lines = [replace(line, shift=5.0 * (index - (len(lines) - 1) / 2)) for index, line in enumerate(lines)]
    ticks = sorted({x for line in lines for x in line.x})
    return draw(
        Chart(metric_heading(metric), "network evaluations a clip (NFE)", lines, levels, log_x=True, ticks=ticks)
    )
