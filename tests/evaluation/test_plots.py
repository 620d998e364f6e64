"""The crossing has known answers; the figures draw what they were given."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure
from PIL import Image

from rats_video.errors import UserError
from rats_video.evaluation import plots
from rats_video.evaluation.plots import crossing_step, plot_nfe_curve, plot_training
from rats_video.evaluation.tables import ArmRow, MetricValue


@pytest.mark.parametrize(
    ("student", "teacher", "window", "expected"),
    [
        ([0, 1, 2, 3], [1.5] * 4, 1, 2),
        ([0, 1, 2, 3], [1.5] * 4, 2, 3),  # means .5 1.5 2.5: 1.5 ties, and a tie is not a crossing
        ([0, 1, 2, 3], [5] * 4, 2, None),
        ([9, 0, 0, 0, 4, 4], [2] * 6, 3, 2),  # the window 9 0 0 has mean 3
        ([9, 0, 0, 0, 4, 4], [3.5] * 6, 3, None),  # the lucky start is no full window
        ([9, 0, 0, 0, 4, 9], [3.5] * 6, 3, 5),
        ([3, 3], [1, 1], 10, 1),  # shorter than a window: the whole run
        ([3], [1], 1, 0),
        ([], [], 5, None),
    ],
)
def test_crossing_known_answers(student: list[float], teacher: list[float], window: int, expected: int | None) -> None:
    assert crossing_step(student, teacher, window) == expected


def test_crossing_ignores_what_comes_later() -> None:
    student, teacher = [0.0, 1.0, 2.0, 3.0], [1.4] * 4
    assert crossing_step(student, teacher, 2) == crossing_step([*student, -99.0], [*teacher, 0.0], 2) == 2


def test_crossing_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match="got 2 and 1"):
        crossing_step([1, 2], [1], 1)
    with pytest.raises(ValueError, match="at least 1"):
        crossing_step([1], [1], 0)


def training_rows(num_rows: int = 40) -> list[dict[str, float]]:
    """A student that rises by 0.1 a row from -2, past a teacher at 0; logged every 10 steps."""
    return [
        {
            "step": 10.0 * index,
            "reward/student": -2 + 0.1 * index,
            "reward/teacher": 0.0,
            "reward/gap": 2 - 0.1 * index,
            "gate/weight": 1 - index / num_rows,
            "shaping/1.000": 0.0,
            "shaping/0.900": 0.01 / (1 + index),
            "shaping/0.500": 0.1 / (1 + index),
            "shaping/motion": 7.0,
            "loss": 1.0,
        }
        for index in range(num_rows)
    ]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, in order."""
    saved: list[Figure] = []
    real = Figure.savefig

    def savefig(self: Figure, *args: Any, **options: Any) -> None:
        saved.append(self)
        real(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def titles(figure: Figure) -> list[str]:
    return [axis.get_title(loc="left") for axis in figure.axes]


def test_training_figure(tmp_path: Path, figures: list[Figure]) -> None:
    plot_training(training_rows(), tmp_path / "out" / "training.png")
    with Image.open(tmp_path / "out" / "training.png") as image:
        assert image.size == (1575, 630)
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)  # readable on a dark page too
    (figure,) = figures
    assert titles(figure) == [
        "Reward (mean of the last 2)",
        "Gate weight on shaping",
        "Shaping loss at each horizon (log)",
    ]
    axes: list[Any] = figure.axes
    rewards, gate, shaping = axes
    # Rows of index 20 and 21 average to 0.05: the first pair above 0.
    assert [text.get_text() for text in rewards.texts] == ["student passes teacher\nat step 210"]
    smoothed = {line.get_label(): list(line.get_ydata()) for line in rewards.lines}
    assert smoothed["student"][:3] == pytest.approx([-2.0, -1.95, -1.85])
    assert smoothed["teacher"] == [0.0] * 40
    assert gate.lines[0].get_ydata()[:2] == pytest.approx([1.0, 0.975])
    assert shaping.get_yscale() == "log"
    assert [line.get_label() for line in shaping.lines] == ["σ = 0.9", "σ = 0.5"]  # noqa: RUF001 (neither 1.000 nor motion)


def test_training_figure_without_a_crossing_a_gate_or_shaping(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [{key: row[key] for key in ("step", "reward/student", "reward/teacher")} for row in training_rows(10)]
    plot_training(rows, tmp_path / "training.png")
    assert titles(figures[0]) == ["Reward"]
    assert list(figures[0].axes[0].texts) == []


def test_training_figure_skips_rows_without_rewards(tmp_path: Path, figures: list[Figure]) -> None:
    rows = training_rows()
    rows[3] = {"step": 30.0, "loss": 1.0}
    rows[5]["reward/student"] = math.nan
    plot_training(rows, tmp_path / "training.svg")
    assert (tmp_path / "training.svg").read_text().startswith("<?xml")
    lines: list[Any] = list(figures[0].axes[0].lines)
    assert [len(line.get_xdata()) for line in lines[:4]] == [38] * 4


def test_training_figure_needs_something_to_show(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither rewards nor a loss"):
        plot_training([{"step": 1.0, "lr": 0.5}], tmp_path / "training.png")
    assert list(tmp_path.iterdir()) == []


def make_row(arm: str, num_steps: int, nfe: int, mean: float, ci95: float = 0.1, *, also: bool = True) -> ArmRow:
    metrics = {"reward": MetricValue(mean=mean, ci95=ci95)}
    if also:
        metrics["adherence"] = MetricValue(mean=mean / 2, ci95=ci95)
    return ArmRow(arm=arm, num_steps=num_steps, nfe=nfe, num_clips=8, seconds_per_clip=0.1, metrics=metrics)


TABLE = [
    make_row("teacher", 50, 100, 0.5),
    make_row("student", 8, 8, 0.8),
    make_row("student", 3, 3, 0.6),
    make_row("base", 3, 6, -0.5),
    make_row("base", 8, 16, 0.1, math.inf),
    make_row("no gate", 4, 4, 0.4, also=False),
]


def test_nfe_figure(tmp_path: Path, figures: list[Figure]) -> None:
    plot_nfe_curve(TABLE, tmp_path / "nfe.png")
    (figure,) = figures
    assert titles(figure) == ["Trained reward", "Adherence"]  # no row holds heldout_reward
    axes: list[Any] = figure.axes
    reward, adherence = axes
    assert list(reward.get_xticks()) == [3, 4, 6, 8, 16]
    assert [label.get_text() for label in adherence.get_xticklabels()] == ["3", "6", "8", "16"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "teacher, 50 steps (100 NFE)",
        "student",
        "base",
        "no gate",
    ]
    curves = {bars.get_label(): bars for bars in reward.containers}
    line, _, (bars,) = curves["student"]
    assert line.get_xydata().tolist() == [[3, 0.6], [8, 0.8]]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [
        pytest.approx([0.5, 0.7]),
        pytest.approx([0.7, 0.9]),
    ]
    (band,) = reward.patches
    assert (band.get_y(), band.get_height()) == pytest.approx((0.4, 0.2))


def test_nfe_figure_of_the_teacher_alone(tmp_path: Path) -> None:
    plot_nfe_curve(TABLE[:1], tmp_path / "nfe.png", metrics=("reward",))
    assert (tmp_path / "nfe.png").stat().st_size > 1000


def test_nfe_figure_needs_a_metric(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the metrics smoothness"):
        plot_nfe_curve(TABLE, tmp_path / "nfe.png", metrics=("smoothness",))


def test_arms_differ_in_colour_and_marker(tmp_path: Path, figures: list[Figure]) -> None:
    plot_nfe_curve(TABLE, tmp_path / "nfe.png")
    lines = [container[0] for container in figures[0].axes[0].containers]
    assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == 3


def test_a_failed_save_leaves_the_old_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "nfe.png"
    path.write_bytes(b"old")

    def full(_figure: Figure, target: Path, **_options: Any) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(UserError, match="cannot write the figure: No space left"):
        plot_nfe_curve(TABLE, path)
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("nfe.png", b"old")]


def test_a_path_without_suffix_is_a_png(tmp_path: Path) -> None:
    plot_nfe_curve(TABLE, tmp_path / "nfe")
    assert [entry.name for entry in tmp_path.iterdir()] == ["nfe"]
    assert (tmp_path / "nfe").read_bytes().startswith(b"\x89PNG")


def test_the_global_state_of_matplotlib_is_left_alone(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    plot_training(training_rows(), tmp_path / "training.png")
    assert dict(mpl.rcParams) == before


def testsmoothing_window_grows_with_the_run() -> None:
    assert [plots.smoothing_window(count) for count in (0, 1, 39, 40, 400, 10_000)] == [1, 1, 1, 2, 20, 50]
