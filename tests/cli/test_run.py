"""`run` on the tiny pipeline: what it writes, does again and leaves alone."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from outcomes import names, refused, snapshot

from rats_video.commands.run_steps import Forecast, Work, work_after_training
from rats_video.distillation.settings import DistillConfig
from rats_video.inference.video import read_mp4
from rats_video.runtime import Runtime

Command = Callable[..., Any]


def test_run_writes_everything(finished: Path) -> None:
    assert names(finished) == [
        "best", "checkpoints", "comparison", "config.resolved.yaml", "environment.json", "evaluation", "guard.json",
        "guard.png", "metrics.jsonl", "plan.json", "samples", "student", "training.png",
    ]  # fmt: skip
    assert names(finished / "student") == ["rats.json", "transformer"]
    assert names(finished / "evaluation") == ["evaluation.json", "evaluation.md", "nfe.png", "reference.safetensors"]
    assert names(finished / "checkpoints") == ["step-000002"]
    (clip,) = (finished / "samples").glob("*.mp4")
    (pair,) = (finished / "comparison").glob("*.mp4")
    assert read_mp4(clip)[0].shape == (17, 3, 32, 32)
    assert len(read_mp4(pair)[0]) == 17
    assert (finished / "training.png").read_bytes()[:4] == b"\x89PNG"


def test_run_records_what_it_did(finished: Path) -> None:
    config = yaml.safe_load((finished / "config.resolved.yaml").read_text())
    assert config["training"]["steps"] == 2
    assert config["shift"] == 3.0
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["seconds"] > 0 and row["reward/student"] < 0 for row in rows)  # not each asks the teacher
    card = json.loads((finished / "student" / "rats.json").read_text())
    assert (card["num_steps"], card["steps"], card["seed"]) == ([2, 4], 2, 0)
    (session,) = json.loads((finished / "environment.json").read_text())
    assert session["torch"] == torch.__version__
    assert session["command"].startswith("rats-video run ")
    assert session["seeds"] == {"training": 0, "guard": 2**20}
    assert session["host"] == platform.node()
    assert re.fullmatch(r"git [0-9a-f]{40}(-dirty)?|rats-video .*", session["code"])


def test_time_left_is_the_trainings_pace_until_clips_are_made() -> None:
    """On two processes; a training step of 40 calls takes 10 s, 0.5 s a call in each process."""
    forecast = Forecast(2, [Work(100, 4), Work(300, 12)])
    assert forecast.seconds() is None
    forecast.learn(1, {"evaluations": 40.0, "seconds": 10.0})
    assert forecast.seconds() == 400 * 0.5 / 2
    forecast.clips.add(10, 1, in_calls=2.0, beside=3.0)  # 0.2 s a call, 3 s a clip
    assert forecast.seconds() == pytest.approx((400 * 0.2 + 16 * 3) / 2)
    forecast.coming = []
    assert forecast.seconds() == 0


def test_work_to_come_is_counted_before_the_training(make_config: Callable[..., DistillConfig]) -> None:
    """Two prompts at 2 calls; guided teachers of 3 steps; 5 judged clips, 1 timed, at 2 and at 4 calls."""
    cfg = make_config(
        "student.num_steps=[2,4]", "comparison.num_videos=2", "evaluation.teacher_steps=3",
        "evaluation.guidance_scale=4", "evaluation.nfe=[2,4]", "evaluation.num_clips=5", "evaluation.diversity=null",
        "evaluation.latency_clips=1",
    )  # fmt: skip
    assert work_after_training(cfg) == [Work(4, 2), Work(2 * (6 + 2 + 2), 6), Work(6 * (6 + 2 * 6), 6 * 5)]


def test_second_run_skips_what_is_done(command: Command, sets: list[str], own: Path, calls: list[int]) -> None:
    before = snapshot(own)
    code, out, _ = command("run", "--config", "tiny", "--output", own, *sets)
    assert code == 0
    assert out.count("done before") == 4
    assert calls == []
    after = snapshot(own)
    del before["config.resolved.yaml"], after["config.resolved.yaml"]  # written anew, the same
    assert after == before


def test_overwrite_asks_nothing_of_what_it_replaces(command: Command, sets: list[str], tmp_path: Path) -> None:
    (tmp_path / "run" / "student").mkdir(parents=True)
    (tmp_path / "run" / "config.resolved.yaml").write_text("from: another version")
    (tmp_path / "run" / "student" / "rats.json").write_text("{")
    outcome = command("run", "--overwrite", "--output", tmp_path / "run", *sets, "--set", "reward.path=nowhere")
    refused(outcome, "reward.path: no such folder: nowhere")


def test_reward_rank_of_a_finished_run_leaves(
    command: Command, sets: list[str], own: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = Runtime(torch.device("cpu"), rank=1, reward_ranks=1)
    monkeypatch.setattr("rats_video.commands.run.start_runtime", lambda *_: rank)
    before = snapshot(own)
    (own / "samples" / "manifest.json").unlink()  # for the trainers to make
    code, out, err = command("run", "--config", "tiny", "--output", own, *sets)
    assert (code, out, err) == (0, f"1/4 distill\n    done before: {own / 'student'}\n", "")
    assert calls == []
    (own / "samples" / "manifest.json").write_bytes(before["samples/manifest.json"][1])
    assert {name: content for name, (_, content) in snapshot(own).items()} == {
        name: content for name, (_, content) in before.items()
    }


def test_run_of_another_configuration_is_refused(command: Command, sets: list[str], finished: Path) -> None:
    before = snapshot(finished)
    outcome = command("run", "--config", "tiny", "--output", finished, *sets, "--set", "method.alpha=7")
    refused(outcome, f"{finished}: holds a run of another configuration: method.alpha differ")
    assert snapshot(finished) == before


def test_run_with_more_steps_trains_them(command: Command, sets: list[str], own: Path) -> None:
    more = ["--set", "training.steps=3"]
    code, out, err = command("run", "--config", "tiny", "--output", own, *sets, *more)
    assert code == 0, err
    assert "done before" not in out  # what was made with the old student is old
    rows = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_run_whose_rate_has_decayed_goes_on_with_a_stated_schedule(
    command: Command, sets: list[str], tmp_path: Path
) -> None:
    ask = ["distill", "--config", "tiny", "--output", tmp_path / "run", *sets, "--set", "guard=null",
           "--set", "training.optimizer.decay=true", "--set", "training.optimizer.warmup_steps=0"]  # fmt: skip
    longer = [*ask, "--resume", "--set", "training.steps=4"]
    assert command(*ask).code == 0
    before = snapshot(tmp_path / "run")
    refused(command(*longer), (
        "holds a run of another configuration: training.steps differs (the rate decays to zero at step 2: to go on "
        "from there with a rate that starts anew, add --set training.optimizer.restarts=[2]; or start another run with "
        f"--set student.init={tmp_path / 'run'})"
    ))  # fmt: skip
    assert snapshot(tmp_path / "run") == before
    code, _, err = command(*longer, "--set", "training.optimizer.restarts=[2]")
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["lr"] for row in rows[2:]] == [row["lr"] for row in rows[:2]]
    assert json.loads((tmp_path / "run" / "student" / "rats.json").read_text())["steps"] == 4


def test_run_with_another_evaluation_evaluates_anew(command: Command, sets: list[str], own: Path) -> None:
    changed = ["--set", "evaluation.num_clips=2"]
    code, out, err = command("run", "--config", "tiny", "--output", own, *sets, *changed)
    assert code == 0, err
    assert "2 held-out clips an arm" in out
    assert re.findall(r"^(\d/4 \w+).* \(about [\d:]+ left in all\)$", out, re.MULTILINE) == [
        "2/4 sample", "3/4 export", "4/4 evaluate"
    ]  # fmt: skip


def test_run_finds_a_bad_heldout_reward_before_it_trains(command: Command, sets: list[str], tmp_path: Path) -> None:
    outcome = command("run", "--output", tmp_path / "run", *sets, "--set", "heldout_reward.path=nowhere")
    refused(outcome, "heldout_reward.path: no such folder: nowhere")
    assert not (tmp_path / "run").exists()


def test_finished_run_is_refused_untouched(command: Command, sets: list[str], finished: Path) -> None:
    before = snapshot(finished)
    refused(
        command("distill", "--output", finished, *sets),
        f"{finished}: holds a run (--resume goes on with it, --overwrite replaces it)",
    )
    changed = ["--resume", "--seed", "3", "--set", "method.alpha=7"]
    outcome = command("distill", "--output", finished, *sets, *changed)
    refused(outcome, "holds a run of another configuration: seed, method.alpha differ")
    assert snapshot(finished) == before
