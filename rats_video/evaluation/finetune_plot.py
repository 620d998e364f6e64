"""The figure of a fine-tuning: its loss, and the loss of clips that it never saw."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rats_video.evaluation.plots import STUDENT, TEACHER, save_figure, style_axis

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


def plot_finetune(rows: Sequence[Mapping[str, float]], ends: tuple[float, float] | None, path: Path) -> None:
    """Draw the loss of each step beside the held-out loss, which has the same noise each time.

    Args:
        rows: of metrics.jsonl.
        ends: held-out loss before the first step and after the last one; None where nothing is held out.
        path: the image to write.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8 if ends else 4, 3.2), layout="constrained", facecolor="white")
    left, *others = figure.subplots(1, 2 if ends else 1, squeeze=False)[0]
    left.plot([row["step"] for row in rows], [row["loss"] for row in rows], color=TEACHER, linewidth=1.0)
    style_axis(left, title="loss of the training clips", xlabel="optimizer step")
    if ends:
        heldout = {0: ends[0]} | {row["step"]: row["heldout_loss"] for row in rows if "heldout_loss" in row}
        heldout |= {max((row["step"] for row in rows), default=0): ends[1]}
        right = others[0]
        right.plot(list(heldout), list(heldout.values()), color=STUDENT, linewidth=1.8, marker="o", markersize=3)
        style_axis(right, title="loss of the held-out clips", xlabel="optimizer step")
    save_figure(figure, path)
