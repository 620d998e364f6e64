"""Settings that would train nothing, or cannot work here: refused before anything is loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from rats_video.config.load import load_config
from rats_video.distillation.checks import check_compute
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.pretraining.finetune import FinetuneConfig

Make = Callable[..., DistillConfig]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (("student.grad_steps=[]",), "no step of 4 (0 to 3) is in grad_steps []"),
        (("student.grad_steps=[9]",), "no step of 4 (0 to 3) is in grad_steps [9]"),
        (("student.num_steps=[8,3]", "student.grad_steps=[7]"), "no step of 3 (0 to 2) is in grad_steps [7]"),
        (("student.num_steps=[]",), "student.num_steps: must have at least 1 item, got []"),
        (
            ("student.weights={kind: lora, targets: []}",),
            "student.weights.targets: must have at least 1 item, got []",
        ),
    ],
)
def test_a_student_that_could_not_learn_is_refused(make_config: Make, settings: tuple[str, ...], line: str) -> None:
    with pytest.raises(UserError) as caught:
        make_config(*settings)
    assert str(caught.value).endswith(line)


def test_chosen_steps_that_only_some_nfe_have_are_fine(make_config: Make) -> None:
    student = make_config("student.num_steps=[8,3]", "student.grad_steps=[0,7]").student
    assert [student.gradient_steps(steps) for steps in (8, 3)] == [(0, 7), (0,)]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            ("training.steps=8", "training.optimizer.restarts=[4, 8, 9]"),
            "training: optimizer restarts at step 8, after the last of 8 steps: give restarts below 8, or more steps",
        ),
        (
            ("training.steps=8", "method={kind: dmd2, fake_score: {optimizer: {lr: 1, restarts: [9]}}}"),
            "method.fake_score.optimizer restarts at step 9, after the last of 8 steps: give restarts below 8, or more",
        ),
        (
            ("training.optimizer.restarts=[7, 4]",),
            "--set training.optimizer.restarts: must rise, each step once, got [7, 4]: give [4, 7]",
        ),
    ],
)
def test_restarts_that_would_never_come_are_refused(make_config: Make, settings: tuple[str, ...], line: str) -> None:
    with pytest.raises(UserError) as caught:
        make_config(*settings)
    assert line in str(caught.value)


def test_restarts_of_any_training_are_before_its_end() -> None:
    with pytest.raises(UserError, match="optimizer restarts at step 30, after the last of 30 steps"):
        load_config(
            FinetuneConfig, "tiny", group="finetune", overrides=["steps=30", "optimizer.restarts=[30]", "model=m"]
        )


def test_an_optimizer_that_is_not_installed_is_found_before_anything_is_loaded(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"^training.optimizer.kind: adamw8bit needs bitsandbytes"):
        check_compute(make_config("training.optimizer.kind=adamw8bit"), torch.device("cpu"))
