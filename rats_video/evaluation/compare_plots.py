"""Figures of a comparison: quality against NFE and training cost, win rates. Shapes repeat what colours show."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from rats_video.evaluation.compare_result import BASE
from rats_video.evaluation.compare_tables import counts_of, headline_metrics, methods_of
from rats_video.evaluation.plots import INK, save_figure, style_axis
from rats_video.evaluation.plots import TEACHER as TEACHER_COLOR
from rats_video.evaluation.tables import TEACHER, metric_heading

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rats_video.evaluation.compare_result import CompareResult, MethodMean

# Okabe and Ito's without the vermilion, which is the teacher's, and the yellow, which is illegible on white.
_COLORS = ("#0072B2", "#009E73", "#CC79A7", "#B8860B", "#56B4E9", "#000000", "#7B3294", "#8C510A", "#4D9221", "#B30059")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
_LINES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
_BASE_STYLE: dict[str, Any] = {"color": "#8A8A8A", "marker": "x", "linestyle": (0, (2, 2))}
_LABEL_GAP = 0.062  # of an axis' height


class _Label(NamedTuple):
    """A name beside the point where its line ends."""

    text: str
    x: float
    y: float
    color: str


def plot_nfe(compared: CompareResult, path: Path) -> None:
    """Draw the headline metrics against NFE: a line a method, the base model's dashed, the teacher's a band.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    metrics, counts = headline_metrics(compared), counts_of(compared)
    figure = Figure(figsize=(4.6 * len(metrics), 4.6), layout="constrained", facecolor="white")
    for index, metric in enumerate(metrics):
        axis = figure.add_subplot(1, len(metrics), index + 1)
        labels = []
        for name, style in _styles(compared).items():
            means = [mean for nfe in counts if (mean := compared.mean_of(name, nfe)) and metric in mean.metrics]
            if means:
                shift = 1 + 0.006 * (list(_styles(compared)).index(name) - 4)  # so that bars do not overlap
                _draw_line(axis, [mean.nfe * shift for mean in means], means, metric, style)
                last = means[-1]
                labels.append(_Label(name, last.nfe * shift, last.metrics[metric].mean, style["color"]))
        _draw_teacher(axis, compared, metric, labels)
        _limit(axis, compared.means, metric)
        _count_axis(axis, counts)
        style_axis(axis, title=metric_heading(metric), xlabel="network evaluations a clip (NFE)")
        _write_labels(axis, labels)
    save_figure(figure, path)


def plot_cost(compared: CompareResult, path: Path) -> None:
    """Draw the headline metrics against the training cost so far, in network evaluations and in seconds.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    metrics = headline_metrics(compared)
    units = {"evaluations": "network evaluations of training", "seconds": "seconds of training, as it ran"}
    figure = Figure(figsize=(4.6 * len(metrics), 7.8), layout="constrained", facecolor="white")
    for index, (unit, metric) in enumerate((unit, metric) for unit in units for metric in metrics):
        axis = figure.add_subplot(2, len(metrics), index + 1)
        labels = []
        for name, style in _styles(compared).items():
            points = [point for point in compared.curve if point.method == name and metric in point.metrics]
            if points:
                costs = [getattr(point.cost, unit) for point in points]
                _draw_line(axis, costs, points, metric, style)
                labels.append(_Label(name, costs[-1], points[-1].metrics[metric].mean, style["color"]))
        _draw_teacher(axis, compared, metric, labels)
        _limit(axis, [*compared.curve, *_teachers(compared)], metric)
        _cost_axis(axis)
        nfe = f" at {compared.curve[0].nfe} NFE" if compared.curve else ""
        style_axis(axis, title=f"{metric_heading(metric)}{nfe}", xlabel=units[unit])
        _write_labels(axis, labels)
    save_figure(figure, path)


def plot_wins(compared: CompareResult, path: Path) -> None:
    """Draw win rates, a panel a headline metric and opponent: methods down, NFE across; bold where it is not chance.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    metrics, counts, methods = headline_metrics(compared), counts_of(compared), methods_of(compared)
    opponents = list(dict.fromkeys(win.against for win in compared.wins)) or [TEACHER]
    size = (2.0 + 2.6 * len(opponents), (0.9 + 0.3 * len(methods)) * len(metrics))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    for row, metric in enumerate(metrics):
        for column, opponent in enumerate(opponents):
            axis = figure.add_subplot(len(metrics), len(opponents), row * len(opponents) + column + 1)
            _draw_wins(axis, compared, metric, opponent)
            axis.set_xticks(range(len(counts)), [f"{nfe}" for nfe in counts], fontsize=9, color=INK)
            axis.set_yticks(range(len(methods)), methods if column == 0 else [""] * len(methods), fontsize=9, color=INK)
            title = f"{metric_heading(metric)}: against {opponent}"
            axis.set_title(title, loc="left", fontsize=9.5, fontweight="bold", color=INK)
    figure.supxlabel("NFE; share of clips won, bold where its 95% interval leaves out 0.5", fontsize=9.5, color=INK)
    save_figure(figure, path)


def _draw_wins(axis: Any, compared: CompareResult, metric: str, opponent: str) -> None:
    counts, methods = counts_of(compared), methods_of(compared)
    rates = {(w.method, w.nfe): w for w in compared.wins if (w.metric, w.against) == (metric, opponent)}
    grid = [[w.rate if (w := rates.get((name, nfe))) else math.nan for nfe in counts] for name in methods]
    axis.imshow(grid, cmap="PuOr_r", vmin=0, vmax=1, alpha=0.75, aspect="auto")
    for i, name in enumerate(methods):
        for j, nfe in enumerate(counts):
            win = rates.get((name, nfe))
            sure = win is not None and win.ci95 is not None and abs(win.rate - 0.5) > win.ci95
            text = "-" if win is None else f"{win.rate:.2f}"
            weight = "bold" if sure else "normal"
            axis.text(j, i, text, ha="center", va="center", fontsize=9, color="#111111", fontweight=weight)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _styles(compared: CompareResult) -> dict[str, dict[str, Any]]:
    """Colour, marker and dashes of each method, and of the base model; no two methods share two of them."""
    styles = {
        name: {
            "color": _COLORS[i % len(_COLORS)], "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": _LINES[i % len(_LINES)],
        }
        for i, name in enumerate(methods_of(compared))
    }  # fmt: skip
    return styles | ({BASE: _BASE_STYLE} if compared.mean_of(BASE) is not None else {})


def _draw_line(
    axis: Any, xs: Sequence[float], means: Sequence[MethodMean], metric: str, style: Mapping[str, Any]
) -> None:
    values = [mean.metrics[metric] for mean in means]
    axis.errorbar(
        xs,
        [value.mean for value in values],
        yerr=[value.ci95 if math.isfinite(value.ci95) else 0.0 for value in values],
        markersize=5.5,
        linewidth=1.6,
        elinewidth=0.9,
        capsize=2,
        zorder=2,
        **style,
    )


def _draw_teacher(axis: Any, compared: CompareResult, metric: str, labels: list[_Label]) -> None:
    """Draw the teacher as a band and add its name to the labels."""
    teacher = compared.mean_of(TEACHER)
    if teacher is None or metric not in teacher.metrics:
        return
    value = teacher.metrics[metric]
    axis.axhline(value.mean, color=TEACHER_COLOR, linewidth=1.3, zorder=1)
    if math.isfinite(value.ci95):
        axis.axhspan(
            value.mean - value.ci95, value.mean + value.ci95, color=TEACHER_COLOR, alpha=0.15, linewidth=0, zorder=0
        )
    labels.append(_Label(f"teacher, {teacher.num_steps} steps", math.nan, value.mean, TEACHER_COLOR))


def _teachers(compared: CompareResult) -> list[MethodMean]:
    return [mean for mean in compared.means if mean.method == TEACHER]


def _limit(axis: Any, shown: Sequence[MethodMean], metric: str) -> None:
    """Show all means with a margin; an interval wider than their range runs off the panel."""
    means = [mean.metrics[metric].mean for mean in shown if metric in mean.metrics]
    if not means:
        return
    margin = 0.6 * (max(means) - min(means)) or abs(means[0]) or 1.0
    low, high = axis.get_ylim()
    axis.set_ylim(max(low, min(means) - margin), min(high, max(means) + margin))


def _cost_axis(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter("{x:,.0f}")


def _count_axis(axis: Any, counts: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.set_xscale("log")  # step counts double: equal spacing then
    axis.xaxis.set_major_locator(FixedLocator(counts))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set_xlim(counts[0] / 1.12, counts[-1] * 1.12)


def _write_labels(axis: Any, labels: Sequence[_Label]) -> None:
    """Write each line's name to the right of the panel, as near its height as the others allow, with a leader line."""
    low, high = axis.get_ylim()
    heights = separate_labels([(label.y - low) / (high - low) for label in labels], _LABEL_GAP)
    right = axis.get_xlim()[1]
    for label, height in zip(labels, heights, strict=True):
        start = (right if math.isnan(label.x) else label.x, label.y)
        axis.annotate(
            label.text, xy=start, xytext=(1.05, height), textcoords="axes fraction", va="center", fontsize=9,
            color=label.color, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": label.color, "linewidth": 0.5, "alpha": 0.55, "shrinkA": 0},
        )  # fmt: skip


def separate_labels(heights: Sequence[float], gap: float) -> list[float]:
    """Heights at least `gap` apart in the same order, moved as little as possible (least squares)."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    blocks: list[tuple[float, int]] = []  # mean and size: pools of neighbours that push one another
    for rank, index in enumerate(order):
        blocks.append((heights[index] - rank * gap, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (first, m), (second, n) = blocks[-2:]
            blocks[-2:] = [((first * m + second * n) / (m + n), m + n)]
    flat = [mean for mean, size in blocks for _ in range(size)]
    moved = {index: flat[rank] + rank * gap for rank, index in enumerate(order)}
    return [moved[index] for index in range(len(heights))]
