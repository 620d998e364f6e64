"""`compare`: budgets in network evaluations, who wins, and scores that are kept and found again."""

from __future__ import annotations

from pathlib import Path

import pytest

from rats_video.commands.compare_config import CompareConfig, mean_evaluations
from rats_video.commands.compare_layout import read_scores
from rats_video.config.load import load_config
from rats_video.errors import UserError
from rats_video.evaluation.compare_result import CompareResult
from rats_video.evaluation.compare_stats import StudentScores, differences, wins_of
from rats_video.evaluation.compare_tables import differences_table
from rats_video.evaluation.stats import crossed_ci95
from rats_video.evaluation.sweep import ArmScores
from rats_video.inference.sampler import SamplerSpec

KINDS = [
    "rats",
    "imitation",
    "refl",
    "dmd2",
    "senseflow",
    "advdmd",
    "consistency",
    "t2v_turbo",
    "dollar",
    "grpo",
    "rtdmd",
]


@pytest.fixture(scope="module")
def tiny() -> CompareConfig:
    return load_config(CompareConfig, "tiny", group="compare")


def test_every_method_gets_the_updates_that_the_budget_pays_for(tiny: CompareConfig) -> None:
    cfg = tiny.model_copy(update={"budget": 50_400})
    assert list(cfg.methods) == ["rats", "rats_all", "rats_no_floor", *KINDS[1:]]
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


def scored(method: str, seed: int | None, rewards: tuple[float, ...], nfe: int = 4) -> StudentScores:
    metrics = {"reward": list(rewards), "flicker": [0.0] * 3}
    scores = ArmScores(method, SamplerSpec(nfe, 3.0), prompts=["a", "b", "c"], seconds=[1.0] * 3, metrics=metrics)
    return StudentScores(method, seed, scores)


def test_the_first_methods_lead_is_taken_clip_by_clip_and_seed_by_seed() -> None:
    rows = [
        scored("teacher", None, (0.0, 0.5, 0.5), 100),
        scored("base", None, (0.0, 0.0, 0.0)),
        scored("rats", 0, (1.0, 2.0, 4.0)),
        scored("refl", 0, (0.5, 2.0, 3.0)),
        scored("rats", 1, (2.0, 2.0, 4.0)),
        scored("refl", 1, (2.5, 1.0, 3.5)),
        scored("rats", 2, (0.0, 0.0, 0.0), nfe=2),  # nobody else has this number of calls
    ]
    found = {(each.against, each.nfe): each for each in differences(rows) if each.metric == "reward"}
    assert {each.method for each in found.values()} == {"rats"}
    assert list(found) == [("refl", 4), ("base", 4), ("teacher", 4), ("teacher", 2)]
    lead = crossed_ci95([[0.5, 0.0, 1.0], [-0.5, 1.0, 0.5]])
    assert (found["refl", 4].mean, found["refl", 4].ci95) == pytest.approx((lead.mean, lead.ci95))
    assert found["base", 4].mean == pytest.approx(15 / 6)
    assert found["teacher", 4].mean == pytest.approx(15 / 6 - 1 / 3)
    table = differences_table(CompareResult(settings={}, rows=[], differences=list(found.values())), ["reward"], 4)
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["refl", "base", "teacher"]
    assert f"{lead.mean:.3f} ± {lead.ci95:.3f}" in table.splitlines()[2]


def test_damaged_scores_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text('{"arm": "rats"')
    with pytest.raises(UserError, match="scores were damaged"):
        read_scores(path)
    assert not path.exists()
