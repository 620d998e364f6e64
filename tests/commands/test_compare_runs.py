"""A comparison that was stopped, shared out or tried again is the one that was made in one go."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rats_video.commands import compare_arms
from rats_video.commands.compare_config import CompareConfig
from rats_video.commands.compare_layout import CompareLayout
from rats_video.config.load import load_config
from rats_video.errors import UserError
from rats_video.evaluation.compare_result import CompareResult, read_compare_result
from rats_video.files import locked
from rats_video.training.update import Updater

METHODS = {"rats": [], "imitation": ["method={kind: imitation}"]}
# 2 clips: 8 guided teacher steps, 2 or 4 student steps with gradient three each are 50 in the mean
SETTINGS = {
    "trained_nfe": [2, 4], "nfe": [2, 4], "seeds": [0], "budget": 200, "num_clips": 4, "curve_points": 2,
    "teacher_steps": 4,
}  # fmt: skip
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def config(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("comparison") / "small.yaml"
    evaluation = "evaluation={batch_size: 4, guidance_scale: 2.0, diversity: {prompts: 2, clips: 2}}"
    path.write_text(
        yaml.safe_dump(
            {"base": str(config_file), "methods": METHODS, "overrides": ["guard=null", evaluation], **SETTINGS},
            sort_keys=False,
        )
    )
    return path


@pytest.fixture
def compare(command: Run, config: Path, tmp_path: Path) -> Run:
    return lambda name="runs", *more: command(
        "compare", "--config", config, "--output", tmp_path / name, "--device", "cpu", *more
    )


@pytest.fixture(scope="module")
def whole(command: Run, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that was made in one go."""
    output = tmp_path_factory.mktemp("whole") / "runs"
    assert command("compare", "--config", config, "--output", output, "--device", "cpu").code == 0
    return output


def content(folder: Path) -> dict[str, Any]:
    """All of a comparison that is not time."""
    found = read_compare_result(folder / "compare.json").model_dump()
    for point in (*found["rows"], *found["curve"]):
        (point["cost"] or {}).pop("seconds", None)
    return found


def layout(config: Path, output: Path) -> CompareLayout:
    return CompareLayout.of(load_config(CompareConfig, str(config), group="compare"), output)


def test_rows_curve_and_costs(whole: Path) -> None:
    compared: CompareResult = read_compare_result(whole / "compare.json")
    assert [(row.method, row.nfe, row.seed) for row in compared.rows] == [
        ("teacher", 8, None), ("base", 2, None), ("base", 4, None), ("rats", 2, 0), ("rats", 4, 0),
        ("imitation", 2, 0), ("imitation", 4, 0),
    ]  # fmt: skip
    assert {(row.cost.updates, row.cost.evaluations) for row in compared.rows if row.cost} == {(4, 200.0)}
    assert [(p.method, p.nfe, p.cost.updates, p.cost.evaluations) for p in compared.curve] == [
        ("rats", 4, 2, 100.0), ("rats", 4, 4, 200.0), ("imitation", 4, 2, 100.0), ("imitation", 4, 4, 200.0),
    ]  # fmt: skip
    ends = {row.method: row.metrics["reward"].mean for row in compared.rows if row.nfe == 4}
    assert [p.metrics["reward"].mean for p in compared.curve[1::2]] == [ends["rats"], ends["imitation"]]
    assert compared.curve[0].metrics["reward"].mean != ends["rats"]


def test_diversity_is_told_as_a_share_of_the_teachers(whole: Path) -> None:
    rows = read_compare_result(whole / "compare.json").rows
    teacher = rows[0].metrics
    assert teacher["pixel_diversity_share"].mean == pytest.approx(1.0)
    for row in rows:
        share = row.metrics["pixel_diversity"].mean / teacher["pixel_diversity"].mean
        assert row.metrics["pixel_diversity_share"].mean == pytest.approx(share)


def test_what_is_done_is_not_done_again(compare: Run, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "runs")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("train_student", "score_arms"):
            patch.setattr(compare_arms, name, lambda *_, **__: pytest.fail("done before"))
        outcome = compare("runs")
    assert outcome.code == 0
    assert "imitation, seed 0: done before" in outcome.out
    assert content(tmp_path / "runs") == content(whole)


def test_stopped_and_gone_on_with_is_the_same(
    compare: Run, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = Updater.step, []

    def stopping(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:  # the second of imitation's four
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments, **named)

    monkeypatch.setattr(Updater, "step", stopping)
    stopped = compare()
    assert stopped.code == 75
    assert stopped.err.strip().endswith("stopped after step 2, which is saved; the same command goes on from there")
    assert not (tmp_path / "runs/compare.json").exists()
    assert compare().code == 0
    assert len(calls) == 8
    assert content(tmp_path / "runs") == content(whole)


def test_an_arm_that_another_works_at_is_left_to_it(compare: Run, config: Path, whole: Path, tmp_path: Path) -> None:
    arm = layout(config, tmp_path / "runs").arms[2]
    with locked(arm.folder):
        first = compare()
    assert first.code == 0
    assert first.out.splitlines()[-1].startswith("Others work at rats, seed 0: the last one writes")
    assert not (tmp_path / "runs/compare.json").exists()
    assert compare().code == 0
    assert content(tmp_path / "runs") == content(whole)


def test_an_arm_that_fails_keeps_nobody_else_from_its_end(
    compare: Run, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = compare_arms.train_student

    def full(cfg: Any, *arguments: Any, **named: Any) -> Any:
        if cfg.method.kind == "rats":
            raise UserError("no space left", where="the disk")
        return plain(cfg, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(compare_arms, "train_student", full)
        failed = compare()
    assert failed.code == 2
    assert "1 of 4 arms failed: rats, seed 0: " in failed.err
    assert "no space left" in failed.err
    assert {row.method for row in read_compare_result(tmp_path / "runs/compare.json").rows} == {
        "teacher",
        "base",
        "imitation",
    }
    assert "**Missing:** rats, seed 0." in (tmp_path / "runs/compare.md").read_text()
    assert compare().code == 0
    assert content(tmp_path / "runs") == content(whole)


def test_students_on_their_way_are_kept_and_not_their_checkpoints(config: Path, whole: Path) -> None:
    study = layout(config, whole)
    for arm in study.arms[2:]:
        kept = load_file(arm.folder / "milestones/step-000002/student.safetensors")
        saved = load_file(arm.folder / "checkpoints/step-000004/student.safetensors")
        assert kept.keys() == saved.keys()
        assert any(not torch.equal(kept[name], saved[name]) for name in kept)
        assert [path.name for path in sorted((arm.folder / "milestones").iterdir())] == ["step-000002"]


def test_a_finer_curve_than_was_kept_has_the_points_that_there_are(compare: Run, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "runs")
    assert compare("runs", "--set", "curve_points=4").code == 0  # after 1, 2 and 3 updates, and at the end
    assert content(tmp_path / "runs")["curve"] == content(whole)["curve"]


def test_a_report_plays_the_first_student_of_each_method_beside_the_teacher(
    command: Run, whole: Path, tmp_path: Path
) -> None:
    page = tmp_path / "methods.html"
    outcome = command("report", whole, "--output", page)
    assert outcome.out.splitlines()[-1].endswith("1 prompts, 4 clips)")  # teacher, base and two methods
    text = page.read_text(encoding="utf-8")
    assert text.count("<video ") == 4
    assert all(f"{method}, seed 0" in text for method in METHODS)
    assert "trained on different rewards" not in text
