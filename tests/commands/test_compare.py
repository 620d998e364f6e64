"""`compare`: budgets in network evaluations, who wins, and scores that are kept and found again."""

from __future__ import annotations

from pathlib import Path

import pytest

from rats_video.commands.compare_config import CompareConfig, mean_evaluations
from rats_video.commands.compare_layout import read_scores
from rats_video.config.load import load_config
from rats_video.errors import UserError
from rats_video.evaluation.compare_stats import wins_of

KINDS = ["rats", "imitation", "refl", "dmd2", "consistency", "t2v_turbo", "dollar", "grpo", "rtdmd"]


@pytest.fixture(scope="module")
def tiny() -> CompareConfig:
    return load_config(CompareConfig, "tiny", group="compare")


def test_every_method_gets_the_updates_that_the_budget_pays_for(tiny: CompareConfig) -> None:
    cfg = tiny.model_copy(update={"budget": 50_400})
    assert list(cfg.methods) == ["rats", "rats_all", "rats_floor", *KINDS[1:]]
    rats = cfg.arm("rats", 0, "teacher")
    # 8 clips: 24 guided teacher steps for every fourth, and 2 and 4 student steps, with gradient three each
    assert mean_evaluations(rats) == 8 * (48 / 4 + 3 * (2 + 4) / 2)
    assert rats.training.steps == 300
    for kind in KINDS:
        arm = cfg.arm(kind, 1, "teacher")
        assert arm.method.kind == kind
        assert arm.seed == 1
        assert arm.guard is None
        assert 0 <= 50_400 - arm.training.steps * mean_evaluations(arm) < mean_evaluations(arm)


def test_a_budget_below_one_update_is_refused(tiny: CompareConfig) -> None:
    with pytest.raises(UserError, match="100 network evaluations are less than one update of rats, which takes 168"):
        tiny.model_copy(update={"budget": 100}).arm("rats", 0, "teacher")


def test_a_restart_that_the_budget_does_not_reach_is_refused(tiny: CompareConfig) -> None:
    late = {"budget": 16_000, "overrides": ("training.steps=999", "training.optimizer.restarts=[100]")}
    with pytest.raises(UserError, match=r"^methods.rats: training.optimizer restarts at step 100, after the last of"):
        tiny.model_copy(update=late).arm("rats", 0, "teacher")


def test_unknown_methods_are_named(tiny: CompareConfig) -> None:
    with pytest.raises(UserError, match="no method 'dmd'"):
        tiny.only(("rats", "dmd"))


def test_an_arm_wins_half_against_itself() -> None:
    assert wins_of([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == [0.5, 0.5, 0.5]
    assert wins_of([1.0, 2.0], [2.0, 1.0]) == [0.0, 1.0]


def test_damaged_scores_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text('{"arm": "rats"')
    with pytest.raises(UserError, match="scores were damaged"):
        read_scores(path)
    assert not path.exists()
