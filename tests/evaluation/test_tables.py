"""Result rows: JSON round trip and the exact Markdown."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from rats_video.errors import UserError
from rats_video.evaluation.latency import latency_table
from rats_video.evaluation.stats import Estimate
from rats_video.evaluation.tables import (
    ArmRow,
    Latency,
    MetricValue,
    better,
    headline,
    markdown_table,
    metric_title,
    read_rows,
    read_table,
    write_rows,
)


def make_row(arm: str, num_steps: int, nfe: int, seconds: float, **metrics: tuple[float, float]) -> ArmRow:
    values = {name: MetricValue(mean=mean, ci95=ci95) for name, (mean, ci95) in metrics.items()}
    return ArmRow(arm=arm, num_steps=num_steps, nfe=nfe, num_clips=64, seconds_per_clip=seconds, metrics=values)


ROWS = [
    make_row("teacher", 50, 100, 1.52, reward=(-0.161, 0.02), heldout_reward=(0.8124, 0.0126), adherence=(0.9, 0.01)),
    make_row("base", 4, 8, 0.12, reward=(-1.4, 0.051), heldout_reward=(0.3, 0.02), adherence=(0.25, math.inf)),
    make_row("student", 4, 4, 0.061, reward=(0.2, 0.013), heldout_reward=(0.79, 0.01)),
]


def test_markdown_is_exact() -> None:
    assert markdown_table(ROWS).splitlines() == [
        "| arm     | steps | NFE | s/clip |    trained reward |   held-out reward |         adherence |",
        "| ------- | ----: | --: | -----: | ----------------: | ----------------: | ----------------: |",
        "| teacher |    50 | 100 |   1.52 |    -0.161 ± 0.020 | **0.812 ± 0.013** | **0.900 ± 0.010** |",
        "| base    |     4 |   8 |   0.12 |    -1.400 ± 0.051 |     0.300 ± 0.020 |       0.250 ± n/a |",
        "| student |     4 |   4 |   0.06 | **0.200 ± 0.013** |     0.790 ± 0.010 |                 - |",
    ]


def test_markdown_escapes_pipes_and_has_no_minus_zero() -> None:
    row = make_row("a|b", 1, 1, 0.0, my_metric=(-0.00001, 0.0))
    assert markdown_table([row]).splitlines()[0] == "| arm  | steps | NFE | s/clip |         my metric |"
    assert markdown_table([row]).splitlines()[2] == "| a\\|b |     1 |   1 |   0.00 | **0.000 ± 0.000** |"


def test_ties_are_all_bold() -> None:
    rows = [make_row("a", 1, 1, 0.0, reward=(0.5, 0.1)), make_row("b", 1, 1, 0.0, reward=(0.5, 0.2))]
    assert markdown_table(rows).count("**0.500") == 2


def test_no_rows_is_an_empty_table() -> None:
    assert markdown_table([]) == "| arm | steps | NFE | s/clip |\n| --- | ----: | --: | -----: |"


def test_each_metric_is_bold_by_its_own_direction() -> None:
    rows = [
        make_row("teacher", 50, 100, 0.0, fvd=(0.3, 0.1), saturation=(0.10, 0.0), flicker=(0.9, 0.0)),
        make_row("base", 4, 4, 0.0, fvd=(0.5, 0.1), saturation=(0.05, 0.0), flicker=(0.8, 0.0)),
        make_row("student", 4, 4, 0.0, fvd=(0.1, 0.1), saturation=(0.12, 0.0), flicker=(0.7, 0.0)),
    ]
    title, _, teacher, base, student = markdown_table(rows).splitlines()
    assert [title.count(mark) for mark in ("FVD ↓", "saturation ≈", "flicker |")] == [1, 1, 1]
    assert [line.count("**") // 2 for line in (teacher, base, student)] == [1, 0, 2]
    assert "**0.900 ± 0.000**" in teacher
    assert "**0.100 ± 0.100**" in student
    assert "**0.120 ± 0.000**" in student
    without = markdown_table(rows[1:]).splitlines()[2:]
    assert not any("**0.050" in line or "**0.120" in line for line in without)  # no teacher to be near to
    assert [better(name) for name in ("fvd", "diversity_share", "reward", "a rival's own")] == [
        "lower", "near teacher", "higher", "higher"
    ]  # fmt: skip


def test_notes_and_latency_come_back(tmp_path: Path) -> None:
    latency = Latency(seconds=1.0, text=0.1, denoiser=0.6, decode=0.3, repeats=3, load_average=0.5)
    rows = [ROWS[0].model_copy(update={"latency": latency}), ROWS[1]]
    write_rows(rows, tmp_path / "table.json", ["N = 64", "≈"])
    assert read_table(tmp_path / "table.json") == (rows, ["N = 64", "≈"])
    table, how = latency_table(rows)
    assert table.splitlines()[2:] == ["| teacher | 100 |       1.000 | 0.100 |    0.600 |  0.300 |"]
    assert "3 clips" in how
    assert "0.5" in how
    on_gpu = [ROWS[0].model_copy(update={"latency": latency.model_copy(update={"peak_bytes": 3 * 2**29})})]
    assert latency_table(on_gpu)[0].splitlines()[2].endswith("|     1.50 |")
    assert latency_table(ROWS) == []


def test_titles() -> None:
    assert metric_title("heldout_reward") == "held-out reward"
    assert metric_title("dynamic_degree") == "dynamic degree ≈"


def test_headline_keeps_the_titled_metrics_in_title_order() -> None:
    row = make_row("a", 4, 4, 0.1, speed=(1.0, 0.1), adherence=(0.5, 0.1), reward=(0.2, 0.1))
    assert list(headline(row).metrics) == ["reward", "adherence"]
    assert headline(row).metrics["reward"] == row.metrics["reward"]


def test_headline_fits_a_page() -> None:
    motion = {"flicker": (0.9, 0.1), "motion_smoothness": (0.9, 0.1), "dynamic_degree": (0.02, 0.01)}
    shapes = {"reward": (0.1, 0.1), "heldout_reward": (0.1, 0.1), "adherence": (0.1, 0.1), "smoothness": (0.1, 0.1)}
    assert list(headline(make_row("a", 4, 4, 0.1, **motion, **shapes)).metrics) == list(shapes)
    real = make_row("a", 4, 4, 0.1, **motion, reward=(0.1, 0.1))
    assert list(headline(real).metrics) == ["reward", "motion_smoothness", "dynamic_degree"]


def test_round_trip_through_json(tmp_path: Path) -> None:
    path = tmp_path / "out" / "table.json"
    write_rows(ROWS, path)
    assert read_rows(path) == ROWS
    assert [entry.name for entry in path.parent.iterdir()] == ["table.json"]


def test_json_schema_is_the_documented_one(tmp_path: Path) -> None:
    write_rows(ROWS[1:2], tmp_path / "table.json")

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads((tmp_path / "table.json").read_text(), parse_constant=refuse) == {
        "rows": [
            {
                "arm": "base",
                "num_steps": 4,
                "nfe": 8,
                "num_clips": 64,
                "seconds_per_clip": 0.12,
                "metrics": {
                    "reward": {"mean": -1.4, "ci95": 0.051},
                    "heldout_reward": {"mean": 0.3, "ci95": 0.02},
                    "adherence": {"mean": 0.25, "ci95": None},
                },
            }
        ]
    }


def test_metric_from_an_estimate() -> None:
    assert MetricValue.of(Estimate(mean=0.5, ci95=0.1, num=12)) == MetricValue(mean=0.5, ci95=0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read the table"),
        ("{", "is no JSON: "),
        ('{"rows": [{"arm": "base"}]}', "rows.0.num_steps: required, but missing"),
        ('{"rows": [], "extra": 1}', "extra: unknown key"),
    ],
)
def test_unreadable_tables_are_user_errors(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_rows(path)
    assert caught.value.where == str(path)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, _target: Path) -> None:
        assert self.exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match="cannot write the table: No space left on device"):
        write_rows(ROWS, tmp_path / "table.json")
    assert list(tmp_path.iterdir()) == []


def test_rows_refuse_nonsense() -> None:
    with pytest.raises(ValidationError, match="finite"):
        MetricValue(mean=math.nan, ci95=0.1)
    with pytest.raises(ValidationError):
        MetricValue(mean=0.0, ci95=math.nan)
    with pytest.raises(ValidationError):
        MetricValue(mean=0.0, ci95=-0.1)
    with pytest.raises(ValidationError, match="nfe"):
        make_row("base", 4, 0, 0.1)
