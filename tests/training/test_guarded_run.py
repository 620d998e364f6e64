"""A guarded run: training does not notice the guard, a resumed one decides the same, an alarm ends or changes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from few_calls import FEW_CALLS
from safetensors.torch import load_file

from rats_video.commands.finish import finish
from rats_video.commands.train_student import train_student
from rats_video.distillation.settings import DistillConfig
from rats_video.inference.student import load_card
from rats_video.runtime import ALONE
from rats_video.training.guard import Guard
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder

GUARD = "guard={every: 2, num_clips: 3}"
Run = Callable[..., RunFolder]


@pytest.fixture
def run(make_config: Callable[..., DistillConfig], tmp_path: Path) -> Run:
    def call(name: str, *overrides: str) -> RunFolder:
        cfg, folder = make_config(*FEW_CALLS, *overrides), RunFolder(tmp_path / name)
        student = train_student(cfg, folder, ALONE, resume=True, overwrite=False)
        assert student is not None
        finish(cfg, folder, student)
        return folder

    return call


def losses(run: RunFolder) -> list[float]:
    return [row["loss"] for row in read_metrics(run.metrics)]


def last_weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(max(run.checkpoints.glob("step-*")) / "student.safetensors")


def test_training_does_not_notice_the_guard(run: Run) -> None:
    watched, alone = run("watched", "training.steps=3", GUARD), run("alone", "training.steps=3")
    assert losses(watched) == losses(alone)
    for name, weight in last_weights(watched).items():
        assert torch.equal(weight, last_weights(alone)[name])
    assert not alone.guard.exists()


def test_resumed_run_saw_and_keeps_the_same(run: Run) -> None:
    whole = run("whole", "training.steps=5", GUARD, "training.checkpoint_every=1")
    for steps in (1, 3, 5):
        halves = run("halves", f"training.steps={steps}", GUARD, "training.checkpoint_every=1")
    record, again = (json.loads(each.guard.read_text()) for each in (whole, halves))
    assert [look["step"] for look in record["looks"]] == [0, 2, 4, 5]
    ends = {look["step"]: look for look in again["looks"]}  # each part's own end was looked at, too
    assert [ends[look["step"]] for look in record["looks"]] == record["looks"]
    assert again["teacher"] == record["teacher"]


def kept_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    monkeypatch.setattr(
        Guard, "best", property(lambda guard: next((look for look in guard.evaluations if look.step == step), None))
    )


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_run_ends_with_the_best_student_or_the_last(run: Run, monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    kept_step(monkeypatch, 2)
    kind = () if weights == "full" else ("student.weights={kind: lora, rank: 2}",)
    options = ("training.steps=3", GUARD, *kind)
    best, last = run("best", *options), run("last", *options, "guard.choose=last")
    assert load_card(best.student).steps == 2
    assert load_card(last.student).steps == 3
    file = next(path.relative_to(best.student) for path in best.student.rglob("*.safetensors"))
    ours, theirs = load_file(best.student / file), load_file(last.student / file)
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
    middle = run("middle", "training.steps=2", *kind)
    assert all(torch.equal(weight, load_file(middle.student / file)[name]) for name, weight in ours.items())


def alarmed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guard, "_alarms", lambda _, look: ["it is hacked"] if look.step else [])


def test_alarm_stops_the_run_which_then_stays_stopped(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alarmed(monkeypatch)
    options = ("training.steps=6", GUARD, "guard.on_alarm=stop")
    stopped = run("stopped", *options)
    assert len(losses(stopped)) == 2
    assert "warning: guard: reward hacking? it is hacked" in capsys.readouterr().err
    assert [path.name for path in stopped.checkpoints.iterdir()] == ["step-000002"]
    assert len(losses(run("stopped", *options))) == 2


def test_alarm_doubles_the_weight_on_shaping_also_after_a_resume(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    alarmed(monkeypatch)
    options = (GUARD, "guard.on_alarm=shape", "method.reward_weight=0", "training.checkpoint_every=1")
    shaped, plain = (
        run("shaped", "training.steps=5", *options),
        run("plain", "training.steps=5", options[0], *options[2:]),
    )
    assert losses(shaped)[:2] == losses(plain)[:2]
    assert losses(shaped)[2] == pytest.approx(2 * losses(plain)[2])  # of the same weights
    run("halves", "training.steps=4", *options)
    assert losses(run("halves", "training.steps=5", *options)) == losses(shaped)


def test_pull_holds_the_weights_back(run: Run) -> None:
    def drift(name: str, *options: str) -> Any:
        return json.loads(run(name, "training.steps=4", GUARD, *options).guard.read_text())["looks"][-1]["drift"]

    assert 0 < drift("held", "method.drift_weight=1000") < 0.7 * drift("free")
