"""Checkpoints: whole or not at all, exact, and refused in one line where they do not fit; and stopping in order."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rats_video.errors import Interrupted, UserError
from rats_video.runtime import Runtime
from rats_video.training import checkpoint
from rats_video.training.checkpoint import CheckpointWriter, find_damage, list_checkpoints
from rats_video.training.interrupt import StopRequest
from rats_video.training.restore import load_checkpoint


def trained(steps: int, width: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(2, width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def save_checkpoint(
    folder: Path,
    step: int,
    student: dict[str, Tensor],
    teacher: dict[str, Tensor] | None,
    optimizer: torch.optim.Optimizer,
    keep: int,
) -> Path:
    with CheckpointWriter(folder, keep) as writer:
        writer.save(step, student, teacher, optimizer)
        writer.wait()
    return folder / f"step-{step:06d}"


def weights(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_goes_on_exactly_where_it_stopped(tmp_path: Path) -> None:
    model, optimizer = trained(3)
    average = nn.Linear(2, 3)
    path = save_checkpoint(tmp_path, 3, weights(model), weights(average), optimizer, keep=2)
    again, resumed = trained(0)
    other = nn.Linear(2, 3)
    assert load_checkpoint(path, weights(again), weights(other), resumed) == {"step": 3}
    assert same(model, again)
    assert same(average, other)
    for each, stepped in ((model, optimizer), (again, resumed)):
        stepped.zero_grad()
        each(torch.ones(1, 2)).square().sum().backward()
        stepped.step()
    assert same(model, again)  # the moments came back too
    assert same(model, trained(4)[0])


def test_without_an_ema_teacher_none_is_written(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, weights(trained(1)[0]), None, trained(1)[1], keep=2)
    assert names(path) == ["optimizer.safetensors", "state.json", "student.safetensors"]


def test_keeps_the_newest(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    for step in (2, 9, 10, 100):
        save_checkpoint(tmp_path, step, weights(model), None, optimizer, keep=2)
    assert names(tmp_path) == ["step-000010", "step-000100"]
    assert [path.name for path in list_checkpoints(tmp_path)] == names(tmp_path)


def test_training_goes_on_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    write = checkpoint.save_file

    def waiting(tensors: dict[str, Tensor], target: Path) -> None:
        assert go_on.wait(10)
        write(tensors, target)

    monkeypatch.setattr(checkpoint, "save_file", waiting)
    model, optimizer = trained(1)
    with CheckpointWriter(tmp_path, keep=2) as writer:
        writer.save(1, weights(model), None, optimizer)
        with torch.no_grad():  # the next step, while nothing is written yet
            for tensor in (*model.parameters(), *(state["exp_avg"] for state in optimizer.state.values())):
                tensor.zero_()
        assert list_checkpoints(tmp_path) == []
        go_on.set()
    again, resumed = trained(0)
    load_checkpoint(tmp_path / "step-000001", weights(again), None, resumed)
    assert same(again, trained(1)[0])
    for mine, theirs in zip(resumed.state.values(), trained(1)[1].state.values(), strict=True):
        assert torch.equal(mine["exp_avg"], theirs["exp_avg"])


def test_failed_write_is_said_at_the_next(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    (tmp_path / "file").touch()
    with CheckpointWriter(tmp_path / "file", keep=2) as writer:
        writer.save(1, weights(model), None, optimizer)
        with pytest.raises(UserError, match="cannot write the checkpoint"):
            writer.save(2, weights(model), None, optimizer)
        writer.wait()  # said once


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    with CheckpointWriter(tmp_path, 2, Runtime(torch.device("cpu"), rank=1)) as writer:
        writer.save(1, weights(model), None, optimizer)
        writer.wait()
    assert names(tmp_path) == []


NO_SPACE = OSError(28, "No space left on device")
NO_SPACE_IN_RUST = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize(
    ("crash_at", "error", "expected"),
    [
        ("student", NO_SPACE, UserError),
        ("student", NO_SPACE_IN_RUST, UserError),
        ("optimizer", NO_SPACE_IN_RUST, UserError),
        ("state", NO_SPACE, UserError),
        ("optimizer", KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_crash_while_writing_leaves_the_old_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    crash_at: str,
    error: BaseException,
    expected: type[BaseException],
    *,
    same_step: bool,
) -> None:
    model, optimizer = trained(1)
    save_checkpoint(tmp_path, 1, weights(model), None, optimizer, keep=1)

    def crashing(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(what: Any, target: Path) -> Any:
            if target.name.startswith(crash_at):
                raise type(error)(*error.args)  # a new one: a raised one keeps its old traceback
            return write(what, target)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", crashing(checkpoint.save_file))
        patch.setattr(Path, "replace", crashing(Path.replace))
        with pytest.raises(expected) as caught:
            save_checkpoint(tmp_path, 1 if same_step else 2, weights(trained(2)[0]), None, optimizer, keep=1)
    if expected is UserError:
        assert "No space left on device" in str(caught.value)
    (kept,) = list_checkpoints(tmp_path)
    again, resumed = trained(0)
    assert load_checkpoint(kept, weights(again), None, resumed) == {"step": 1}
    assert same(again, model)
    assert names(tmp_path) == ["step-000001"]  # and nothing half-written stays


def test_pickled_metadata_is_refused_unread(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    path = save_checkpoint(tmp_path, 1, weights(model), None, optimizer, keep=1)
    assert find_damage(path) is None
    (path / ".metadata").write_bytes(b"cposix\nabort\n(tR.")  # unpickled, it ends this process
    assert find_damage(path) == "it has torch's pickled .metadata, which may run code"


def test_no_folder_no_checkpoint(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    "damage", ["other width", "no optimizer", "no teacher", "truncated student", "empty state", "state is text"]
)
def test_checkpoint_that_does_not_fit_is_one_line(tmp_path: Path, damage: str) -> None:
    model, optimizer = trained(2)
    path = save_checkpoint(tmp_path, 2, weights(model), None, optimizer, keep=1)
    target, resumed = trained(0)
    average = None
    match damage:
        case "other width":
            target, resumed = trained(0, width=4)
        case "no optimizer":
            (path / "optimizer.safetensors").unlink()
        case "no teacher":
            average = weights(nn.Linear(2, 3))
        case "truncated student":
            file = path / "student.safetensors"
            file.write_bytes(file.read_bytes()[:-4])
        case "empty state":
            (path / "state.json").write_text("{}")
        case "state is text":
            (path / "state.json").write_text("step 2")
    with pytest.raises(UserError, match=r"cannot resume from it: .*\(start anew with --overwrite\)") as caught:
        load_checkpoint(path, weights(target), average, resumed)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_first_signal_asks_second_interrupts(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(Interrupted, match="amid a step") as caught:
            os.kill(os.getpid(), number)
        assert (stop.code, caught.value.code) == (code, code)
    assert signal.getsignal(number) is before
