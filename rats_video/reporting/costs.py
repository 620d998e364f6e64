"""The cost of training in the paper's units, and the runs' configurations, differences and environments."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, median
from typing import Any
from xml.etree.ElementTree import Element

from rats_video.evaluation.compare_stats import costs, mean_cost
from rats_video.reporting.markup import DASH, Child, cut, details, short, table, tag, unknown
from rats_video.reporting.sources import CompareFolder, Run, method_kind, number
from rats_video.runtime import GIB

_MOST_KEYS = 2000  # of a configuration
_MOST_TEXT = 400  # characters of a value


def cost_table(runs: Sequence[Run]) -> Element:
    """s/step, hours, peak GB, TFLOPs/step, network evaluations; an unknown value is a dash that says why."""
    head = ["run", "steps", "s/step", "hours", "peak GiB", "TFLOPs/step", "evaluations/clip", "device"]
    rows: list[list[Child]] = []
    for run in runs:
        seconds = [value for row in run.rows if math.isfinite(value := row.get("seconds", math.nan))]
        untimed = "the log holds no seconds"
        evaluations = [value for row in run.rows if math.isfinite(value := row.get("evaluations", math.nan))]
        rows.append([
            run.name,
            f"{len(run.rows):,}" if run.rows else unknown("there is no training log"),
            short(median(seconds)) if seconds else unknown(untimed),
            short(math.fsum(seconds) / 3600) if seconds else unknown(untimed),
            _peak(run),
            _tflops(run),
            short(fmean(evaluations)) if evaluations else unknown("the log counts no network evaluations"),
            device(run) or unknown("environment.json is missing"),
        ])  # fmt: skip
    return table(head, rows, label="Cost of training")


def methods_cost(methods: CompareFolder) -> Element:
    """The training cost of a student of each method, the mean over its seeds."""
    head = ["method", "students", "updates", "evaluations", "hours", "peak GiB"]
    rows: list[list[Child]] = []
    for method, found in costs(methods.compared.rows).items():
        cost = mean_cost(found)
        rows.append([
            method, str(len(found)),
            f"{cost.updates:,}",
            f"{cost.evaluations:,.0f}",
            short(cost.seconds / 3600),
            unknown("torch counts no peak on a CPU") if cost.peak_bytes is None else short(cost.peak_bytes / GIB),
        ])  # fmt: skip
    return table(head, rows, label=f"Cost of training, {methods.name}")


def settings(runs: Sequence[Run]) -> list[Element]:
    """The configurations: differences between the runs, and all keys folded away."""
    flat = [dict(_flat(run.config)) for run in runs]
    keys = list(dict.fromkeys(key for tree in flat for key in tree))
    head = ["key", *(run.name for run in runs)]
    rows = {key: [key, *(tree.get(key, DASH) for tree in flat)] for key in keys[:_MOST_KEYS]}
    differing = [row for row in rows.values() if len(set(row[1:])) > 1]
    parts: list[Element] = []
    if len(runs) > 1:
        parts.append(tag("h3", "What differs"))
        parts.append(table(head, differing, label="What differs") if differing else tag("p", "Nothing but the folder."))
    parts.append(details(f"All {len(rows)} settings", table(head, rows.values(), label="Configuration")))
    return parts


def environments(runs: Sequence[Run]) -> Element | None:
    """The environment of each run: of its last session, with the number of sessions."""
    flat = [dict(_flat(run.sessions[-1])) | {"sessions": str(len(run.sessions))} for run in runs if run.sessions]
    named = [run.name for run in runs if run.sessions]
    keys = list(dict.fromkeys(key for tree in flat for key in tree))[:_MOST_KEYS]
    if not flat:
        return None
    return table(["", *named], ([key, *(tree.get(key, DASH) for tree in flat)] for key in keys), label="Environment")


def device(run: Run) -> str:
    """The device of the last session, or nothing."""
    found = run.sessions[-1].get("device") if run.sessions else None
    if not isinstance(found, str):
        return ""
    kind, _, model = found.partition(": ")
    return cut(kind if kind == model else found, 60)


def _peak(run: Run) -> Child:
    measured = run.plan.get("measured")
    peak = number(measured.get("peak_bytes") if isinstance(measured, Mapping) else None)
    planned = number(run.plan.get("peak_bytes"))
    if math.isfinite(peak):
        return short(peak / GIB)
    expected = f"; {short(planned / GIB)} GiB were planned" if math.isfinite(planned) else ""
    if not run.plan:
        return unknown("there is no plan.json, which holds it")
    return unknown(f"torch counts no peak on a CPU{expected}" if "cpu" in device(run) else f"not measured{expected}")


def _tflops(run: Run) -> Child:
    found = run.plan.get("tflops")
    values = [number(value) for value in found.values()] if isinstance(found, Mapping) else []
    if not run.plan and method_kind(run) not in {"", "rats"}:
        return unknown("plan counts the step of rats alone")
    if not values or not all(map(math.isfinite, values)):
        return unknown("there is no plan.json that counts them")
    return short(math.fsum(values))


def _flat(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """`a.b: text` for each value."""
    if isinstance(tree, Mapping) and tree:
        for name, below in tree.items():
            yield from _flat(below, f"{key}.{name}" if key else cut(str(name), _MOST_TEXT))
    else:
        text = tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False, default=str)
        yield key, cut(text, _MOST_TEXT)
