"""The policy on faults, without a model: which step is left out, where a run goes back to, when it gives up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rats_video.errors import UserError
from rats_video.runtime import ALONE
from rats_video.training.checkpoint import CheckpointWriter, list_checkpoints, steps_done
from rats_video.training.faults import FaultPolicy, FaultsConfig, RollBack, StepFault

FAULT = StepFault("the loss is nan")


def policy(**options: float) -> FaultPolicy:
    return FaultPolicy(FaultsConfig(**options), ALONE)  # type: ignore[arg-type]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Checkpoints of 2, 4 and 6 steps."""
    weight = torch.nn.Parameter(torch.ones(1))
    with CheckpointWriter(tmp_path, 9) as writer:
        for step in (2, 4, 6):
            writer.save(step, {"a": weight}, None, torch.optim.AdamW([weight]))
    return tmp_path


def steps(folder: Path) -> list[int]:
    return [steps_done(path) for path in list_checkpoints(folder)]


def test_steps_in_a_row_are_counted_from_the_last_good_one() -> None:
    faults = policy(skip=2)
    for step in (1, 2, 4, 5):
        assert faults.skip_step(FAULT, step)["faults/skipped"] == 1
        if step == 2:
            assert faults.passed({"loss": 1.0}) == {"loss": 1.0, "faults/skipped": 0, "faults/rollbacks": 0}
    with pytest.raises(RollBack, match=r"^the loss is nan at step 7$") as caught:
        faults.skip_step(FAULT, 6)
    assert caught.value.before == 4  # the weights after 4 steps are those that failed
    assert faults.state == {"faults": {"in_row": 2, "total": 4, "rollbacks": 0, "lr_scale": 1.0}}


def test_weights_that_broke_cannot_be_left_out() -> None:
    with pytest.raises(RollBack) as caught:
        policy(skip=9).skip_step(StepFault("the updated weights are not finite", in_weights=True), 6)
    assert caught.value.before == 7  # the weights after 6 steps were sound


@pytest.mark.parametrize(("before", "left"), [(7, [2, 4, 6]), (6, [2, 4]), (5, [2, 4]), (3, [2])])
def test_goes_back_to_the_last_good_checkpoint(
    saved: Path, before: int, left: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    faults = policy(lower=0.25)
    faults.roll_back(saved, RollBack(FAULT, 8, before))
    assert steps(saved) == left
    assert sorted(path.name for path in saved.iterdir()) == [f"step-00000{step}" for step in left]
    assert capsys.readouterr().err == (
        f"warning: distill: the loss is nan at step 8: back to step {left[-1]}, on at 0.25 of the learning rate\n"
    )


def test_gives_up_and_keeps_every_checkpoint(saved: Path) -> None:
    faults = policy(rollbacks=1)
    with pytest.raises(UserError, match=r"^distill: the loss is nan at step 2; no checkpoint to go back to"):
        faults.roll_back(saved, RollBack(FAULT, 2, 2))
    faults.roll_back(saved, RollBack(FAULT, 8, 7))
    with pytest.raises(UserError, match=r"^distill: the loss is nan at step 8; gone back 1x before, earlier"):
        faults.roll_back(saved, RollBack(FAULT, 8, 5))
    assert steps(saved) == [2, 4, 6]


def test_state_of_a_checkpoint_but_never_an_earlier_number_of_rollbacks(saved: Path) -> None:
    """What comes with the steps is the checkpoint's, what going back has changed stays."""
    faults = policy(skip=2)
    faults.skip_step(FAULT, 1)
    early = json.loads(json.dumps(faults.state))
    for _ in range(2):
        faults.roll_back(saved, RollBack(FAULT, 8, 7))
    faults.load_state(early)
    assert faults.state["faults"] == {"in_row": 1, "total": 1, "rollbacks": 2, "lr_scale": 0.25}
    again = policy()
    again.load_state(faults.state)
    assert (again.state, again.lr_scale, again.rollbacks) == (faults.state, 0.25, 2)
    fresh = policy()
    fresh.load_state({"step": 4})  # of a run before there was a policy
    assert fresh.state == policy().state
