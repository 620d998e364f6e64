"""The overview of each run: its student beside teacher and base, and what is missing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from rats_video.evaluation.compare_result import BASE
from rats_video.evaluation.tables import METRIC_TITLES, TEACHER, ArmRow, metric_title
from rats_video.progress import format_seconds
from rats_video.reporting.costs import device
from rats_video.reporting.markup import Child, cut, tag
from rats_video.reporting.sources import CompareFolder, Run, method_kind
from rats_video.reporting.training import GAP, colors, crossing

_TILES = 3


def overview(runs: Sequence[Run], methods: Sequence[CompareFolder]) -> list[Element]:
    """A panel for each run and comparison."""
    looks = colors(runs)
    panels = [_run_panel(run, looks[run.group] if len(runs) > 1 else "") for run in runs]
    return [tag("div", *panels, *(_methods_panel(each) for each in methods), class_="panels")]


def _run_panel(run: Run, look: str) -> Element:
    parts: list[Child] = [
        tag("h3", tag("span", class_=f"key {look}", aria_hidden="true") if look else None, run.name),
        tag("p", _kind(run), class_="note"),
    ]
    student, teacher, base = _compared_rows(run)
    if student is not None:
        names = [name for name in METRIC_TITLES if name in student.metrics][:_TILES]
        parts.append(tag("div", *(_tile(name, student, teacher, base) for name in names), class_="tiles"))
    facts = _facts(run, student, teacher)
    parts.append(tag("ul", *(tag("li", fact) for fact in facts)) if facts else None)
    parts += [_lack(what, command) for what, command in run.lacks]
    parts.append(tag("p", tag("code", str(run.path)), class_="note path"))
    return tag("article", *parts, class_="panel")


def _methods_panel(methods: CompareFolder) -> Element:
    found = methods.compared.settings
    facts = [
        tag("div", tag("dt", key.replace("_", " ")), tag("dd", cut(_text(value), 300)))
        for key, value in found.items() if value != []
    ]  # fmt: skip
    path = tag("p", tag("code", str(methods.path)), class_="note path")
    return tag("article", tag("h3", f"Methods compared: {methods.name}"), tag("dl", *facts), path, class_="panel wide")


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,g}" if isinstance(value, float) else str(value)


def _kind(run: Run) -> str:
    kind, model = method_kind(run), run.config.get("model")
    parts = [f"method {kind}" if kind else "", f"model {model}" if isinstance(model, str) else "", device(run)]
    return cut(" · ".join(filter(None, parts)), 300)


def _compared_rows(run: Run) -> tuple[ArmRow | None, ArmRow | None, ArmRow | None]:
    """The student, at an NFE it was trained for if that was measured; its teacher; the base model at that NFE."""
    trained = run.config.get("student")
    counts = trained.get("num_steps") if isinstance(trained, dict) else None
    students = [row for row in run.table if row.arm not in {TEACHER, BASE}]
    wanted = [row for row in students if isinstance(counts, list) and row.num_steps in counts]
    student = next(iter(wanted or students), None)
    teacher = next((row for row in run.table if row.arm == TEACHER), None)
    base = next((row for row in run.table if row.arm == BASE and student is not None and row.nfe == student.nfe), None)
    return student, teacher, base


def _tile(name: str, student: ArmRow, teacher: ArmRow | None, base: ArmRow | None) -> Element:
    others = [
        f"{row.arm} {row.metrics[name].mean:z.3f}" for row in (teacher, base) if row is not None and name in row.metrics
    ]
    value = student.metrics[name]
    interval = f" ± {value.ci95:.3f}" if math.isfinite(value.ci95) else ""
    return tag(
        "div",
        tag("span", metric_title(name), class_="what"),
        tag("span", f"{value.mean:z.3f}", tag("small", interval), class_="value"),
        tag("span", *(part for each in others for part in (tag("span", each), " ")), class_="what"),
        class_="tile",
    )


def _facts(run: Run, student: ArmRow | None, teacher: ArmRow | None) -> list[str]:
    facts = []
    if student is not None and teacher is not None:
        fewer = teacher.nfe / student.nfe
        facts.append(f"{student.nfe} network calls a clip instead of {teacher.nfe}: {fewer:.3g} times fewer.")
    if run.rows:
        steps, passed = f"{run.rows[-1]['step']:,.0f} steps", crossing(run)
        scored = any(math.isfinite(row.get(GAP, math.nan)) for row in run.rows)
        said = f", its reward first past the teacher's at step {passed:,.0f}" if passed is not None else ""
        never = ", its reward still below the teacher's" if scored and passed is None else ""
        seconds = math.fsum(value for row in run.rows if math.isfinite(value := row.get("seconds", math.nan)))
        took = f" in {format_seconds(seconds)}" if seconds else ""
        facts.append(f"Trained for {steps}{took}{said}{never}.")
    return facts


def _lack(what: str, command: str) -> Element:
    said = f"{what[:1].upper()}{what[1:]}."
    return tag(
        "p", f"{said} To make it: " if command else said, tag("code", command) if command else None, class_="lack"
    )
