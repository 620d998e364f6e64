"""The guard's figure: trained and held-out reward on the same held-out clips, and the monitors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rats_video.evaluation.plots import INK, STUDENT, TEACHER, save_figure, style_axis
from rats_video.evaluation.stats import finite, mean_ci95
from rats_video.evaluation.tables import metric_title

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def plot_guard(record: Mapping[str, Any], path: Path) -> None:
    """Draw a panel a measure over the evaluated steps, with 95% intervals, beside the teacher's mean.

    Args:
        record: content of a run's guard.json.
        path: the image to write; its suffix picks the format.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    evaluations = record["looks"]
    teacher = {name: scores for name, scores in record["teacher"].items() if "/" not in name}  # parts would be too many
    figure = Figure(figsize=(3.1 * (len(teacher) + 1), 3.2), layout="constrained", facecolor="white")
    axes = figure.subplots(1, len(teacher) + 1)
    steps = [each["step"] for each in evaluations]
    for axis, name in zip(axes, teacher, strict=False):
        rows = [finite(each["scores"][name]) for each in evaluations]
        estimates = [mean_ci95(row) if row else None for row in rows]
        means = [each.mean if each else math.nan for each in estimates]
        spread = [each.ci95 if each and math.isfinite(each.ci95) else 0.0 for each in estimates]
        axis.errorbar(steps, means, yerr=spread, color=STUDENT, linewidth=1.8, capsize=2, marker="o", markersize=3)
        if goal := finite(teacher[name]):
            axis.axhline(mean_ci95(goal).mean, color=TEACHER, linewidth=1.5, linestyle="--")
        style_axis(axis, title=metric_title(name))
    drift = [each["drift"] for each in evaluations]
    axes[-1].plot(steps, drift, color=STUDENT, linewidth=1.8, marker="o", markersize=3)
    style_axis(axes[-1], title="drift of the weights")
    for axis in axes:
        axis.set_xlabel("optimizer step", color=INK)
        if record["best"] is not None:
            axis.axvline(record["best"], color=INK, linestyle=(0, (4, 3)), linewidth=1.0)
        for each in evaluations:
            if each["alarms"]:
                axis.axvspan(each["step"] - 1, each["step"] + 1, color=TEACHER, alpha=0.3, linewidth=0)
    title = "Guard, on held-out clips. Dashed across: the teacher. Dashed upright: the student kept"
    figure.suptitle(title, color=INK, fontsize=10)
    save_figure(figure, path)
