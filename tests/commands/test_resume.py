"""A run that was stopped and resumed is, bit for bit, the run that was not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from few_calls import FEW_CALLS
from safetensors.torch import load_file
from torch import Tensor

from rats_video.backbones.wan import WanBackbone
from rats_video.commands.finish import finish
from rats_video.commands.train_student import train_student
from rats_video.distillation.method import build_rats
from rats_video.distillation.roles import build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import Interrupted
from rats_video.methods.rats import Rats, rats_step
from rats_video.runtime import ALONE
from rats_video.training.batches import draw_batch
from rats_video.training.checkpoint import list_checkpoints, steps_done
from rats_video.training.loop import train_loop
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder
from rats_video.types import PromptBatch

TEACHERS = {
    "frozen": (),
    "ema": ("teacher.kind=ema", "teacher.num_steps=4", "teacher.decay=0.5"),
    "fading": (
        "teacher.kind=ema", "teacher.num_steps=4", "teacher.guidance_scale=3", "teacher.guidance_fade_steps=5",
    ),
}  # fmt: skip


class Trained(NamedTuple):
    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    rows: list[dict[str, float]]


Train = Callable[..., Trained]


@pytest.fixture
def train(
    loaded: WanBackbone, make_config: Callable[..., DistillConfig], captions: tuple[str, ...], tmp_path: Path
) -> Train:
    def call(folder: str, *overrides: str) -> Trained:
        (tmp_path / folder).mkdir(exist_ok=True)
        cfg = make_config(*FEW_CALLS, *overrides)
        rats = build_rats(cfg, *build_roles(cfg, loaded.with_own_denoiser()))
        train_loop(rats, cfg, captions, RunFolder(tmp_path / folder))
        rows = [
            {k: v for k, v in row.items() if k != "seconds"}
            for row in read_metrics(tmp_path / folder / "metrics.jsonl")
        ]
        return Trained(rats.student.denoiser.state_dict(), rats.teacher.backbone.denoiser.state_dict(), rows)

    return call


def assert_same(one: Trained, other: Trained) -> None:
    assert one.rows == other.rows
    for mine, theirs in ((one.student, other.student), (one.teacher, other.teacher)):
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.parametrize("teacher", TEACHERS)
def test_three_steps_and_three_more_are_six(train: Train, teacher: str) -> None:
    whole = train("whole", "training.steps=6", *TEACHERS[teacher])
    half = train("halves", "training.steps=3", *TEACHERS[teacher])
    both = train("halves", "training.steps=6", *TEACHERS[teacher])
    assert [row["step"] for row in whole.rows] == [1, 2, 3, 4, 5, 6]
    assert not torch.equal(half.student["proj_out.weight"], both.student["proj_out.weight"])
    assert_same(whole, both)


@pytest.mark.parametrize("teacher", ["frozen", "ema"])
def test_ctrl_c_amid_a_reused_rollout(train: Train, monkeypatch: pytest.MonkeyPatch, teacher: str) -> None:
    options = ("training.steps=5", "teacher.reuse=2", *TEACHERS[teacher])
    if teacher == "ema":
        options = ("training.steps=5", *TEACHERS[teacher], "teacher.reuse=2")
    whole = train("whole", *options)

    def interrupted(rats: Rats, batch: PromptBatch) -> tuple[Tensor, dict[str, float]]:
        if batch.index == 1:
            os.kill(os.getpid(), signal.SIGINT)
            monkeypatch.undo()
        return rats_step(rats, batch)

    monkeypatch.setattr("rats_video.methods.rats.rats_step", interrupted)
    with pytest.raises(Interrupted, match=r"^stopped after step 4, which is saved; .*--resume"):
        train("stopped", *options)
    assert_same(whole, train("stopped", *options))


def test_run_made_longer_amid_a_reused_rollout(train: Train, tmp_path: Path) -> None:
    options = ("teacher.kind=ema", "teacher.num_steps=4", "teacher.decay=0.5", "teacher.reuse=3",
               "training.keep_checkpoints=1", "training.checkpoint_every=2")  # fmt: skip
    whole = train("whole", "training.steps=7", *options)
    checkpoints = tmp_path / "longer" / "checkpoints"
    for steps, kept in ((4, [3, 4]), (5, [3, 5]), (5, [3, 5]), (7, [6, 7])):
        both = train("longer", f"training.steps={steps}", *options)
        assert [steps_done(path) for path in list_checkpoints(checkpoints)] == kept
    assert_same(whole, both)


def test_steps_after_the_checkpoint_are_done_again(train: Train, tmp_path: Path) -> None:
    whole = train("whole", "training.steps=4")
    train("crashed", "training.steps=3", "training.checkpoint_every=3")
    with (tmp_path / "crashed" / "metrics.jsonl").open("a") as file:  # what a crash after step 3 leaves
        file.write('{"step": 4, "loss": 99}\n{"step": 5, "lo')
    assert_same(whole, train("crashed", "training.steps=4"))


LORA = ("student.weights.kind=lora", "student.weights.rank=2")


@pytest.fixture
def run_for(make_config: Callable[..., DistillConfig], tmp_path: Path) -> Callable[..., dict[str, Tensor]]:
    """Trains an adapter in a folder that holds a run, or none yet, as `distill --resume` does."""

    def call(folder: str, steps: int, *overrides: str) -> dict[str, Tensor]:
        cfg = make_config(*FEW_CALLS, *LORA, f"training.steps={steps}", *overrides)
        student = train_student(cfg, RunFolder(tmp_path / folder), ALONE, resume=True, overwrite=False)
        assert student is not None
        return {name: weight.detach().clone() for name, weight in student.weights.items()}

    return call


def test_run_that_died_of_memory_goes_on_with_levers(run_for: Callable[..., dict[str, Tensor]]) -> None:
    levers = (
        "training.micro_batch_size=1", "compute.activation_checkpointing=true", "compute.decode.checkpoint=true",
        "compute.offload=block", "compute.cache_text=true",
    )  # fmt: skip
    whole, half = run_for("whole", 2), run_for("halves", 1)
    for name, weight in run_for("halves", 2, *levers).items():
        torch.testing.assert_close(weight, whole[name], rtol=1e-4, atol=1e-6)
        assert not torch.equal(weight, half[name])


def test_split_student_is_written_without_a_gpus_kernels(
    run_for: Callable[..., dict[str, Tensor]],
    make_config: Callable[..., DistillConfig],
    tmp_path: Path,
) -> None:
    trained, run = run_for("run", 1), RunFolder(tmp_path / "run")
    levers = ("parallel.shard=true", "compute.attention=xformers", "compute.compile=true", "compute.cache_text=true")
    finish(make_config(*LORA, *levers), run, student=None)  # type: ignore[arg-type]  # its weights are split
    written = load_file(run.student / "pytorch_lora_weights.safetensors")
    assert written.keys() == trained.keys()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in written.items())


def test_seed_decides_everything(train: Train) -> None:
    one, again, other = train("one"), train("again"), train("other", "seed=6")
    assert_same(one, again)
    assert one.rows != other.rows
    assert not torch.equal(one.student["proj_out.weight"], other.student["proj_out.weight"])


def test_batches_depend_on_seed_and_step_alone(
    loaded: WanBackbone, make_config: Callable[..., DistillConfig], captions: tuple[str, ...]
) -> None:
    cfg = make_config("teacher.reuse=2", "student.num_steps=[3,4]")
    batches = [draw_batch(loaded, cfg, captions, step) for step in range(6)]
    assert [batch.index for batch in batches] == [0, 0, 1, 1, 2, 2]
    assert [batch.num_steps for batch in batches] == [3, 3, 4, 4, 3, 3]
    assert torch.equal(batches[0].noise, batches[1].noise)
    assert batches[0].prompts == batches[1].prompts
    assert len({float(batch.noise[0, 0, 0, 0, 0]) for batch in batches}) == 3
    other_arm = make_config("teacher.reuse=2", "student.num_steps=[3,4]", "method.alpha=9", "training.steps=50")
    again = draw_batch(loaded, other_arm, captions, 5)
    assert torch.equal(again.noise, batches[5].noise)
    assert again.prompts == batches[5].prompts
