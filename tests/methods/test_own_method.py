"""A method of the user's own: the example trains from the command line, and mistakes of the code are one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.methods.custom import CustomMethod, CustomMethodConfig
from rats_video.training.metrics import read_metrics
from rats_video.user_code import TRUST

ROOT = Path(__file__).parents[2]
MODULE = """
import torch
from types import SimpleNamespace

class Base:
    def __init__(self, answer=None, **inputs):
        self.answer, self.weight, self.updates = answer, torch.ones(2, requires_grad=True), []

class Good(Base):
    uses_gradient = True
    critics = {"mine": 1}
    evaluations = staticmethod(lambda num_steps, student, teacher, guided: num_steps + 0.5)
    def step(self, batch):
        return self.weight.sum(), {"mine/x": torch.tensor(3.0)}
    def update_ema(self, updates, *, resumed=False):
        self.updates.append(updates)

class Answers(Base):
    evaluations = staticmethod(lambda *_: "many")
    def step(self, batch):
        loss = self.weight.sum()
        return {"none": None, "alone": loss, "vector": (self.weight, {}), "constant": (loss.detach(), {}),
                "words": (loss, {"a": "b"})}[self.answer]

class Fails(Base):
    def step(self, batch):
        return 1 / 0

nothing = 3
"""
INPUTS = ("student", "teacher", "reward", "student_config", "shift", "real_data")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    name = f"methods_{tmp_path.name}"  # a module is imported once a process
    (tmp_path / f"{name}.py").write_text(MODULE)
    return name


def settings(target: str, **options: Any) -> CustomMethodConfig:
    return CustomMethodConfig(kind="custom", target=target, options=options)


def build(target: str, **options: Any) -> CustomMethod:
    context: Any = SimpleNamespace(inputs=lambda: dict.fromkeys(INPUTS))
    return settings(target, **options).build(context)


def test_what_the_class_says_counts(module: str) -> None:
    cfg, method = settings(f"{module}:Good"), build(f"{module}:Good")
    assert cfg.uses_gradient
    assert cfg.evaluations(4, student=12, teacher=48, guided=2) == 4.5
    batch: Any = None
    loss, row = method.step(batch)
    assert loss.requires_grad
    assert row == {"reward/skipped": 0.0, "loss": 2.0, "mine/x": 3.0}
    assert method.critics == {"mine": 1}
    method.update_ema(7)
    assert method.method.updates == [7]
    silent = settings(f"{module}:Fails")
    assert not silent.uses_gradient
    assert silent.evaluations(4, student=12, teacher=48, guided=2) == 12


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        ("none", "a NoneType"),
        ("alone", "a Tensor"),
        ("vector", r"a loss \[2\] with gradient"),
        ("constant", r"a loss \[\] without gradient"),
        ("words", "'a', a str, to log"),
    ],
)
def test_what_is_no_loss_is_told(module: str, answer: str, what: str) -> None:
    batch: Any = None
    with pytest.raises(UserError, match=rf"^method {module}:Answers: step returned {what} \(return the loss, a 0-d"):
        build(f"{module}:Answers", answer=answer).step(batch)


def test_mistakes_are_one_line(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch: Any = None
    line = 1 + MODULE[: MODULE.index("return 1 / 0")].count("\n")
    for call, message in (
        (lambda: build(f"{module}:Fails").step(batch), rf"^method {module}:Fails: fails: ZeroDiv.*line {line}\)$"),
        (lambda: build(f"{module}:Good", a=1, answer=2, shift=3), "cannot be built: TypeError: .*'shift'"),
        (lambda: build(f"{module}:Base"), rf"^method {module}:Base: a Base has no step"),
        (lambda: build(f"{module}:nothing"), r"^method.target: nothing in .* cannot be called \(name a class\)"),
        (lambda: build(f"{module}:Gone"), rf"^method.target: no 'Gone' in {tmp_path}/{module}.py$"),
        (lambda: build("not_there:X"), rf"^method.target: no module 'not_there', neither in {tmp_path} nor"),
        (lambda: settings(f"{module}:Answers").evaluations(4, 1, 1, 1), "evaluations gave a str"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    monkeypatch.delenv(TRUST)
    with pytest.raises(UserError, match=rf"^method.target: {module}:Good is code, in .*{TRUST}=1"):
        build(f"{module}:Good")


def test_loading_its_settings_runs_nothing(make_config: Callable[..., DistillConfig], module: str) -> None:
    cfg = make_config(f"method={{kind: custom, target: '{module}:Good'}}")
    assert module not in sys.modules
    assert DistillConfig.model_validate(cfg.model_dump()) == cfg
    with pytest.raises(UserError, match=r"method.target: must be package.module:Name, got 'Good'"):
        make_config("method={kind: custom, target: Good}")
    with pytest.raises(UserError, match="strengthens the shaping of rats; custom has none"):
        make_config(f"method={{kind: custom, target: '{module}:Good'}}", "guard={on_alarm: shape}")


def test_the_example_trains(
    command: Callable[..., Any], config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    method = "method={kind: custom, target: 'examples.own_method:LateStep', options: {weight: 0.5}}"
    options = ("--config", config_file, "--output", tmp_path / "run", "--device", "cpu", "--set", method)
    outcome = command("distill", *options)
    assert outcome.code == 0, outcome.err
    assert f"method: runs code of {ROOT / 'examples' / 'own_method.py'}" in outcome.err
    for row in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert row["loss"] == pytest.approx(-0.5 * row["reward/student"], abs=1e-6)
        assert row["evaluations"] == 2 * (2.5 + 3)
    code, _, err = command("plan", "--config", config_file, "--set", method)
    assert (code, err.count("\n")) == (2, 1)
    assert "method.kind: is code of your own, which plan does not run (plan a packaged method)" in err
