"""Two figures: the course of training, and quality against network evaluations, in Okabe and Ito's safe colours."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rats_video.errors import UserError
from rats_video.evaluation.tables import metric_heading
from rats_video.files import replacing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rats_video.evaluation.tables import ArmRow

STUDENT, TEACHER, _BASE, _GATE = "#0072B2", "#D55E00", "#7A7A7A", "#009E73"
_ARM_COLORS = {"student": STUDENT, "base": _BASE}
_OTHER_COLORS = ("#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P")  # arms differ in shape, not only in colour
INK, _FAINT = "#333333", "#E3E3E3"
_DPI = 150
_PANELS = 4  # side by side
_SHAPING = "shaping/"
_SHOWN = {"reward/teacher": "teacher", "reward/student": "student"}


def crossing_step(student: Sequence[float], teacher: Sequence[float], window: int) -> int | None:
    """The first index where the student's smoothed reward exceeds the teacher's, or None.

    Both are smoothed by the mean of the last `window` values. Only full windows count (the whole run, if it is shorter
    than a window): a lucky first batch is not a crossing, and a crossing at step N uses nothing that came after N.

    Args:
        student: rewards in order of training.
        teacher: the teacher's rewards at the same steps.
        window: values averaged.

    Raises:
        ValueError: `window` is below 1, or the two differ in length.
    """
    if len(student) != len(teacher):
        raise ValueError(f"rewards must pair up: got {len(student)} and {len(teacher)}")
    pairs = zip(trailing_mean(student, window), trailing_mean(teacher, window), strict=True)
    first_full = min(window, len(student)) - 1
    return next((index for index, (ours, theirs) in enumerate(pairs) if index >= first_full and ours > theirs), None)


def plot_training(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw the training figure: rewards with their crossing on the left, gate weight and shaping loss on the right.

    Args:
        rows: the training log: `step` in each row, and where logged `reward/student`, `reward/teacher`,
            `gate/weight` and `shaping/<sigma>`. Values that are missing or not finite leave a gap.
        path: the image to write; its suffix picks the format.

    Raises:
        UserError: no row holds a reward or a loss, or the file cannot be written.
    """
    shown = {key: label for key, label in _SHOWN.items() if _series(rows, key)[0]}
    shown = shown or {"loss": "loss"}  # a method without a reward
    if not _series(rows, *shown)[0]:
        fix = "give the log of a distillation run"
        raise UserError("the training log holds neither rewards nor a loss", where=str(path), fix=fix)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained", facecolor="white")
    right = [_draw_gate] if _series(rows, "gate/weight")[0] else []  # an ablation without a gate logs none
    right += [_draw_shaping] if _horizons(rows) else []
    heights = (1, 1.5)[-len(right) :] if right else (1,)  # the gate needs less height than the losses
    columns = 2 if right else 1
    grid = figure.add_gridspec(len(heights), columns, width_ratios=(1.15, 1)[:columns], height_ratios=heights)
    _draw_rewards(figure.add_subplot(grid[:, 0]), rows, shown)
    for index, draw in enumerate(right):
        draw(figure.add_subplot(grid[index, 1]), rows)
    save_figure(figure, path)


def plot_nfe_curve(
    rows: Sequence[ArmRow], path: Path, metrics: Sequence[str] = ("reward", "heldout_reward", "adherence")
) -> None:
    """Draw each metric against network evaluations, a line an arm, with 95% bars; the teacher is a band.

    Args:
        rows: the result table; arm "teacher" is the band, every other arm a line.
        path: the image to write; its suffix picks the format.
        metrics: a panel each, four in a line; those that no row holds are skipped. Titles mark metrics that are not
            better higher: ↓ better lower, ≈ better near the teacher's.

    Raises:
        UserError: no row holds any of the metrics, or the file cannot be written.
    """
    shown = [name for name in metrics if any(name in row.metrics for row in rows)]
    if not shown:
        raise UserError(f"the table holds none of the metrics {', '.join(metrics)}", where=str(path))
    from matplotlib.figure import Figure

    lines = -(-len(shown) // _PANELS)
    columns = -(-len(shown) // lines)
    figure = Figure(figsize=(3.5 * columns + 0.4, 3.3 * lines + 0.4), layout="constrained", facecolor="white")
    axes = [figure.add_subplot(lines, columns, index + 1) for index in range(len(shown))]
    for axis, name in zip(axes, shown, strict=True):
        _draw_metric(axis, [row for row in rows if name in row.metrics], name)
    entries: dict[str, Any] = {}
    for axis in axes:  # an arm may lack a metric: gather the legend from all panels
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside upper center",
        ncols=len(entries),
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
    )
    save_figure(figure, path)


def _draw_rewards(axis: Any, rows: Sequence[Mapping[str, float]], shown: Mapping[str, str]) -> None:
    """Draw raw traces faint, smoothed ones on top, and mark the crossing."""
    steps, series = _series(rows, *shown)
    window = smoothing_window(len(steps))
    for values, label in zip(series, shown.values(), strict=True):
        color = TEACHER if label == "teacher" else STUDENT
        axis.plot(steps, values, color=color, alpha=0.22, linewidth=0.8)
        axis.plot(steps, trailing_mean(values, window), color=color, linewidth=2.0, label=label)
    crossing = crossing_step(series[1], series[0], window) if len(series) > 1 else None
    if crossing is not None:
        step = steps[crossing]
        late = step > (steps[0] + steps[-1]) / 2  # write towards the middle, so the text stays inside
        axis.axvline(step, color=INK, linestyle=(0, (4, 3)), linewidth=1.0)
        axis.annotate(
            f"student passes teacher\nat step {step:g}",
            xy=(step, 0.03),
            xycoords=("data", "axes fraction"),
            xytext=(-6 if late else 6, 0),
            textcoords="offset points",
            ha="right" if late else "left",
            va="bottom",
            fontsize=9.5,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
        )
    note = f" (mean of the last {window})" if window > 1 else ""
    style_axis(axis, title=f"{'Loss' if 'loss' in shown else 'Reward'}{note}", xlabel="optimizer step")
    axis.legend(loc="best", reverse=True, frameon=False, fontsize=9.5, labelcolor=INK)


def _draw_gate(axis: Any, rows: Sequence[Mapping[str, float]]) -> None:
    """Draw the mean gate weight; 1 = full guidance by the teacher."""
    steps, (weight,) = _series(rows, "gate/weight")
    axis.plot(steps, weight, color=_GATE, alpha=0.25, linewidth=0.8)
    axis.plot(steps, trailing_mean(weight, smoothing_window(len(steps))), color=_GATE, linewidth=2.0)
    axis.set_ylim(-0.03, 1.03)
    axis.set_yticks((0, 0.5, 1))
    style_axis(axis, title="Gate weight on shaping")


def _draw_shaping(axis: Any, rows: Sequence[Mapping[str, float]]) -> None:
    """Draw the shaping loss, a line a horizon: from noise (dark) to clip (light), on a log scale."""
    from matplotlib import colormaps

    horizons = _horizons(rows)
    for index, key in enumerate(horizons):
        steps, (loss,) = _series(rows, key)
        smooth = trailing_mean(loss, smoothing_window(len(steps)))
        positive = [value if value > 0 else math.nan for value in smooth]
        color = colormaps["viridis"](0.05 + 0.8 * index / max(1, len(horizons) - 1))
        label = f"σ = {float(key.removeprefix(_SHAPING)):.3g}"  # noqa: RUF001
        axis.plot(steps, positive, color=color, linewidth=1.6, label=label)
    axis.set_yscale("log")
    # The lines lie in the legend's order: trajectories part as the noise falls.
    axis.legend(
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        reverse=True,
        frameon=False,
        fontsize=9,
        handlelength=1.2,
        labelcolor=INK,
    )
    style_axis(axis, title="Shaping loss at each horizon (log)", xlabel="optimizer step")


def _draw_metric(axis: Any, rows: Sequence[ArmRow], name: str) -> None:
    """Draw one metric over NFE."""
    from matplotlib.ticker import FixedLocator, NullLocator

    for row in rows:
        if row.arm == "teacher":
            value = row.metrics[name]
            label = f"teacher, {row.num_steps} steps ({row.nfe} NFE)"
            axis.axhline(value.mean, color=TEACHER, linewidth=1.4, label=label, zorder=1)
            if math.isfinite(value.ci95):
                low, high = value.mean - value.ci95, value.mean + value.ci95
                axis.axhspan(low, high, color=TEACHER, alpha=0.16, linewidth=0, zorder=0)
    arms = list(dict.fromkeys(row.arm for row in rows if row.arm != "teacher"))
    others = iter(_OTHER_COLORS * len(arms))
    for index, arm in enumerate(arms):
        points = sorted((row for row in rows if row.arm == arm), key=lambda row: row.nfe)
        values = [row.metrics[name] for row in points]
        axis.errorbar(
            [row.nfe for row in points],
            [value.mean for value in values],
            yerr=[value.ci95 if math.isfinite(value.ci95) else 0.0 for value in values],
            color=_ARM_COLORS.get(arm) or next(others),
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=5,
            linewidth=1.8,
            elinewidth=1.2,
            capsize=3,
            label=arm,
            zorder=2,
        )
    present = sorted({row.nfe for row in rows if row.arm != "teacher"})
    if present:
        axis.set_xscale("log")  # step counts double: equal spacing then
        axis.xaxis.set_major_locator(FixedLocator(present))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_xlim(present[0] / 1.18, present[-1] * 1.18)
    style_axis(axis, title=metric_heading(name), xlabel="network evaluations (NFE)")


def style_axis(axis: Any, *, title: str, xlabel: str = "") -> None:
    """Give a panel the common style: a left title, two spines, faint horizontal lines."""
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axis.set_xlabel(xlabel, fontsize=10, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#999999")
    axis.tick_params(labelsize=9, color="#999999", labelcolor=INK)
    axis.grid(axis="y", color=_FAINT, linewidth=0.8)
    axis.set_axisbelow(True)


def save_figure(figure: Any, path: Path) -> None:
    """Write the image, complete or not at all."""
    with replacing(path, "figure") as partial:
        # With the format named, matplotlib adds no suffix of its own to the file name.
        figure.savefig(partial, dpi=_DPI, format=path.suffix.removeprefix(".") or "png")


def _series(rows: Sequence[Mapping[str, float]], *keys: str) -> tuple[list[float], tuple[list[float], ...]]:
    """The steps of the rows where every key is finite, and the keys' values there."""
    kept = [row for row in rows if all(math.isfinite(row.get(key, math.nan)) for key in keys)]
    return [row["step"] for row in kept], tuple([row[key] for row in kept] for key in keys)


def _horizons(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """The keys `shaping/<sigma>` from noise to clip; other terms may share the prefix.

    At sigma 1 both trajectories start from the same noise; their loss of exactly 0 has no place on a log axis.
    """
    keys = {key for row in rows for key, value in row.items() if key.startswith(_SHAPING) and 0 < value < math.inf}
    sigmas = {key: key.removeprefix(_SHAPING) for key in keys}
    numbers = {key: float(sigma) for key, sigma in sigmas.items() if sigma.replace(".", "", 1).isdigit()}
    return sorted(numbers, key=lambda key: numbers[key], reverse=True)


def smoothing_window(num_values: int) -> int:
    """Values to average: a twentieth of the run, short enough to follow the curve and long enough to smooth it."""
    return min(max(1, num_values // 20), 50)


def trailing_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place, of fewer at the start."""
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    means = []
    for end in range(1, len(values) + 1):
        last = values[max(0, end - window) : end]
        means.append(math.fsum(last) / len(last))
    return means
