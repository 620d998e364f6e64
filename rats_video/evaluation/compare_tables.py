"""The comparison as Markdown: the paper's table in our terms."""

from __future__ import annotations

from collections.abc import Sequence

from rats_video.evaluation.compare_result import BASE, CompareResult
from rats_video.evaluation.compare_stats import costs, mean_cost
from rats_video.evaluation.tables import (
    METRIC_TITLES,
    TEACHER,
    MetricValue,
    aligned,
    best_of,
    better,
    metric_cell,
    metric_heading,
    metric_title,
)
from rats_video.runtime import GIB

FIRST = ("heldout_reward", "adherence", "reward")
"""Headline metrics; those that no method was trained on come first."""
_UNSEEN = ("fvd", "fid", "diversity_share", "pixel_diversity_share")
"""Metrics that no reward is trained for."""

_INTERVALS = (
    "Means with 95% intervals over prompts and seeds: both are taken as drawn at random and crossed, so that an "
    "interval says what other prompts and another training would give; with one seed, and of teacher and base, over "
    "prompts alone. Seconds are of the machine and under the load that it had; of a teacher rollout that another arm "
    "had computed, those it took there."
)
_WINS = (
    "Share of clips that score higher than the opponent's on the same prompt and noise, a tie being half a win; the "
    "base model at the same NFE. Other NFE and metrics: wins.png and compare.json."
)
_DIFFERENCES = (
    "{method} minus the other, on the same prompts, noise and seed, with 95% intervals over prompts and seeds. What "
    "they share cancels, so these are narrower than the intervals above. One larger than its interval is clear."
)


def headline_metrics(compared: CompareResult) -> list[str]:
    """The headline metrics of the comparison, or else its first metric."""
    found = metric_names(compared)
    return [name for name in FIRST if name in found] or found[:1]


def metric_names(compared: CompareResult) -> list[str]:
    """All metrics, headline ones first."""
    found = list(dict.fromkeys(name for mean in compared.means for name in mean.metrics))
    order = list(dict.fromkeys((*FIRST, *METRIC_TITLES, *found)))
    return [name for name in order if name in found]


def methods_of(compared: CompareResult) -> list[str]:
    """The methods, in order, without teacher and base."""
    return [name for name in dict.fromkeys(mean.method for mean in compared.means) if name not in {TEACHER, BASE}]


def counts_of(compared: CompareResult) -> list[int]:
    """The NFE at which students and base were scored, rising."""
    return sorted({mean.nfe for mean in compared.means if mean.method != TEACHER})


def nfe_of(compared: CompareResult) -> int:
    """The NFE of tables with room for only one: 4, or the lowest."""
    counts = counts_of(compared)
    return 4 if 4 in counts else counts[0]


def markdown(compared: CompareResult) -> str:
    """All tables as one document."""
    settings, headline = compared.settings, headline_metrics(compared)
    parts = ["# Methods compared", _settings_text(compared)]
    if isinstance(missing := settings.get("missing"), list) and missing:
        parts.append(f"**Missing:** {'; '.join(map(str, missing))}.")
    parts.append(f"## All methods at {nfe_of(compared)} NFE\n\n{summary_table(compared, nfe_of(compared))}")
    parts += [f"## {metric_heading(name)}\n\n{metric_table(compared, name)}" for name in headline]
    parts.append(f"## What training cost, a student\n\n{cost_table(compared)}")
    if compared.differences:
        parts.append(_differences_text(compared, headline))
    if compared.wins:
        parts.append(_wins_text(compared, headline))
    others = [name for name in metric_names(compared) if name not in headline]
    parts += [f"## {metric_heading(name)}\n\n{metric_table(compared, name)}" for name in others]
    return "\n\n".join(parts) + "\n"


def metric_table(compared: CompareResult, metric: str) -> str:
    """A metric's table: a row a method, a column an NFE, and the teacher; the best mean of each NFE is bold."""
    counts, teacher = counts_of(compared), compared.mean_of(TEACHER)
    names = [BASE, *methods_of(compared)]
    values = {name: [_value(compared, name, nfe, metric) for nfe in counts] for name in names}
    columns = zip(*values.values(), strict=True)
    is_better = better(metric) == "higher"
    best = [max((value.mean for value in column if value), default=None) if is_better else None for column in columns]
    title = "teacher" if teacher is None else f"teacher ({teacher.num_steps} steps)"
    table = [["method", *(f"{nfe} NFE" for nfe in counts), title]]
    for name, row in values.items():
        table.append([name, *map(metric_cell, row, best), ""])
    table.append([TEACHER, *[""] * len(counts), metric_cell(teacher.metrics.get(metric) if teacher else None)])
    return "\n".join(aligned(table))


def summary_table(compared: CompareResult, nfe: int) -> str:
    """All methods at an NFE: headline metrics, metrics no reward sees, and the cost of training; the best are bold."""
    names = [name for name in (*headline_metrics(compared), *_UNSEEN) if name in metric_names(compared)]
    asked = {TEACHER: None, BASE: nfe} | dict.fromkeys(methods_of(compared), nfe)
    means = {who: mean for who, count in asked.items() if (mean := compared.mean_of(who, count))}
    best = {}
    for name in names:
        found = [(who == TEACHER, mean.metrics[name].mean) for who, mean in means.items() if name in mean.metrics]
        best[name] = best_of(name, found)
    table, paid = [["method", "NFE", *map(metric_title, names), "updates", "seconds"]], costs(compared.rows)
    for who, mean in means.items():
        cost = mean_cost(paid[who]) if who in paid else None
        took = ["-", "-"] if cost is None else [f"{cost.updates:,}", f"{cost.seconds:,.0f}"]
        table.append([who, str(mean.nfe), *(metric_cell(mean.metrics.get(name), best[name]) for name in names), *took])
    return "\n".join(aligned(table))


def cost_table(compared: CompareResult) -> str:
    """The training cost of a student of each method, the mean over its seeds."""
    table = [["method", "students", "updates", "evaluations", "seconds", "peak GiB"]]
    for method, found in costs(compared.rows).items():
        cost = mean_cost(found)
        peak = "-" if cost.peak_bytes is None else f"{cost.peak_bytes / GIB:.2f}"
        row = [f"{cost.updates:,}", f"{cost.evaluations:,.0f}", f"{cost.seconds:,.0f}", peak]
        table.append([method, str(len(found)), *row])
    return "\n".join(aligned(table))


def wins_table(compared: CompareResult, metric: str, nfe: int) -> str:
    """Win rates of each method by a metric at an NFE, a column an opponent."""
    opponents, rates = compared.rates(metric, nfe)
    table = [["method", *(f"against {name}" for name in opponents)]]
    table += [[method, *map(metric_cell, row)] for method, row in rates.items()]
    return "\n".join(aligned(table))


def differences_table(compared: CompareResult, metrics: Sequence[str], nfe: int) -> str:
    """The first method's lead at an NFE: a row an opponent, a column a metric."""
    found = {
        (each.against, each.metric): MetricValue(mean=each.mean, ci95=each.ci95)
        for each in compared.differences
        if each.nfe == nfe
    }
    rows = [
        [name, *(metric_cell(found.get((name, metric))) for metric in metrics)]
        for name in dict.fromkeys(against for against, _ in found)
    ]
    return "\n".join(aligned([["against", *map(metric_title, metrics)], *rows]))


def _differences_text(compared: CompareResult, headline: Sequence[str]) -> str:
    counts = dict.fromkeys(each.nfe for each in compared.differences)
    tables = [f"At {nfe} NFE:\n\n{differences_table(compared, headline, nfe)}" for nfe in counts]
    about = _DIFFERENCES.format(method=compared.differences[0].method)
    return "\n\n".join(["## Paired differences", about, *tables])


def _wins_text(compared: CompareResult, headline: Sequence[str]) -> str:
    nfe = nfe_of(compared)
    tables = [f"{metric_heading(name)}:\n\n{wins_table(compared, name, nfe)}" for name in headline]
    title = f"## Win rates at {nfe} NFE"
    return "\n\n".join([title, _WINS, *tables])


def _settings_text(compared: CompareResult) -> str:
    s = compared.settings
    what = (
        f"Base {s['base']}; {s['budget']:,.0f} network evaluations a student, one with gradient counting three; seeds "
        f"{s['seeds']}; {s['num_clips']} held-out clips at each NFE, the same prompts and noise for all."
    )
    return f"{what} {_INTERVALS}"


def _value(compared: CompareResult, method: str, nfe: int, metric: str) -> MetricValue | None:
    mean = compared.mean_of(method, nfe)
    return None if mean is None else mean.metrics.get(metric)
