"""The proof made with the first embedded model has the rows it promises, and its page quotes it word by word."""

from pathlib import Path

import pytest

from rats_video.evaluation.tables import ArmRow, headline, markdown_table, read_rows

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "first_model"


@pytest.fixture(scope="module")
def rows() -> list[ArmRow]:
    return read_rows(RESULTS / "proof.json")


def test_every_arm_is_there_at_its_cost(rows: list[ArmRow]) -> None:
    costs = [(row.arm, row.num_steps, row.nfe) for row in rows]
    arms = ("imitation", "reward_only", "no_gate", "rats_clip", "rats_frame")
    assert costs == [("teacher", 50, 100), *(("base", n, n) for n in (3, 4, 5, 8)), *((arm, 4, 4) for arm in arms)]
    for row in rows:
        assert row.num_clips >= 256
        assert {"reward", "heldout_reward", "adherence", "smoothness"} <= set(row.metrics)


def test_rats_beats_its_teacher_on_reward_heldout_reward_and_adherence(rows: list[ArmRow]) -> None:
    metrics = {row.arm: row.metrics for row in rows if row.arm != "base"}
    for name in ("reward", "heldout_reward", "adherence"):
        ours, teacher = metrics["rats_frame"][name], metrics["teacher"][name]
        assert ours.mean - ours.ci95 > teacher.mean + teacher.ci95
    assert metrics["rats_frame"]["adherence"].mean > metrics["imitation"]["adherence"].mean


def test_page_quotes_the_committed_table(rows: list[ArmRow]) -> None:
    table = markdown_table([headline(row) for row in rows])
    assert (RESULTS / "proof.md").read_text(encoding="utf-8") == table + "\n"
    assert table in (ROOT / "docs" / "first_model.md").read_text(encoding="utf-8")
