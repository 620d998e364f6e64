"""Checkpoints in shards: the same run on any number of processes, never a half one, whatever becomes of a process."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import tensors_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sharded import LEFT, begin, end, network, train

from rats_video.errors import UserError
from rats_video.runtime import Runtime
from rats_video.training.checkpoint import find_damage, list_checkpoints
from rats_video.training.restore import load_checkpoint

pytestmark = pytest.mark.pipeline

SHARD = "shard-00002-model-00001-of-00001.safetensors"


def run_on(count: int, folder: Path, steps: int) -> None:
    assert end(begin(count, partial(train, folder, steps), folder.with_name("said"))) == [0] * count


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same_end(one: Path, other: Path) -> None:
    """Bit for bit the same weights and optimizer's state in the last checkpoint, whole or in shards."""
    ours, theirs = (tensors_of(list_checkpoints(folder)[-1]) for folder in (one, other))
    assert ours.keys() == theirs.keys()
    assert {name.split("/")[0] for name in ours} == {"student", "optimizer"}
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes in 12 steps, undisturbed."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoints"
    train(folder, 12)
    return folder


def test_any_number_of_processes_goes_on_from_any_other(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for steps, count in ((3, 4), (6, 2), (9, 1), (12, 2)):
        run_on(count, folder, steps)
        assert [path.name for path in list_checkpoints(folder)][-1] == f"step-{steps:06d}"
    assert names(folder) == ["step-000011", "step-000012"]
    assert_same_end(folder, whole)


@pytest.fixture(scope="module")
def in_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes write in 3 steps, undisturbed."""
    folder = tmp_path_factory.mktemp("shards") / "checkpoints"
    run_on(2, folder, 3)
    return folder


MOMENTS = {
    "before its shards": "rats_video.training.shards.HuggingFaceStorageWriter.write_data",
    "with its shards written": "rats_video.training.shards.weights_digest",
    "with all shards written": "rats_video.training.checkpoint.write_json",
    "with all written, before the name": "rats_video.training.checkpoint.replacing",
    "between a checkpoint and the deletion of an old one": "rats_video.training.checkpoint.remove",
}


@pytest.mark.parametrize("rank", [0, 1])
def test_process_that_dies_while_it_saves_leaves_the_checkpoint_before(whole: Path, tmp_path: Path, rank: int) -> None:
    folder = tmp_path / "checkpoints"
    train(folder, 2)
    for moment in MOMENTS if rank == 0 else list(MOMENTS)[:2]:  # the first process does the rest

        def act(runtime: Runtime, target: str = MOMENTS[moment]) -> None:
            with pytest.MonkeyPatch.context() as patch:
                if runtime.rank == rank:
                    patch.setattr(target, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
                train(folder, 12, runtime)

        before = list_checkpoints(folder)
        codes = end(begin(2, act, tmp_path / "said"))
        assert codes[rank] == -signal.SIGKILL, moment
        assert codes[1 - rank] == LEFT, moment  # no process waits for one that is lost
        is_written = moment == "between a checkpoint and the deletion of an old one"
        assert list_checkpoints(folder) == [*before, *([folder / "step-000003"] if is_written else [])], moment
        assert all(find_damage(path) is None for path in list_checkpoints(folder))
    run_on(2, folder, 12)
    assert names(folder) == ["step-000011", "step-000012"]
    assert_same_end(folder, whole)


def test_killed_at_random_moments_of_saving_it_is_the_same(whole: Path, tmp_path: Path) -> None:
    folder, draw = tmp_path / "checkpoints", random.Random(0)
    for _ in range(6):
        left = set(folder.glob(".*"))
        pids = begin(2, partial(train, folder, 12), tmp_path / "said")
        while left.issuperset(folder.glob(".*")) and folder / "step-000012" not in list_checkpoints(folder):
            time.sleep(0.001)  # until it saves
        time.sleep(0.03 * draw.random())
        lost = draw.choice([[0], [1], [0, 1]])
        for rank in lost:
            os.kill(pids[rank], signal.SIGKILL)
        codes = end(pids)
        assert all(find_damage(path) is None for path in list_checkpoints(folder))
        assert codes == [0, 0] or all(code in {LEFT, -signal.SIGKILL} for code in codes)
    run_on(2, folder, 12)
    assert names(folder) == ["step-000011", "step-000012"]
    assert_same_end(folder, whole)


# ------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("rank", [0, 1])
def test_process_that_cannot_write_ends_all_in_one_line(whole: Path, tmp_path: Path, rank: int) -> None:
    folder = tmp_path / "checkpoints"

    def act(runtime: Runtime) -> None:
        train(folder, 2, runtime)
        if runtime.rank == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # bytes of a file
        train(folder, 12, runtime)

    assert end(begin(2, act, tmp_path / "said")) == [2, 2]
    assert (tmp_path / "said").read_text() == (
        f"{folder}/step-000003: cannot write the checkpoint: File too large "
        "(check that the folder can be written to and has space left)"
    )
    assert names(folder) == ["step-000001", "step-000002"]  # nothing half-written
    run_on(2, folder, 12)
    assert_same_end(folder, whole)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "clause"),
    [(truncate, "is not what was written"), (flip_a_bit, "is not what was written"), (Path.unlink, "is missing")],
)
def test_damaged_shards_give_way_to_the_checkpoint_before(
    in_shards: Path, tmp_path: Path, damage: Callable[[Path], None], clause: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(in_shards, tmp_path / "checkpoints")
    damage(folder / "step-000003" / SHARD)
    train(folder, 3)  # resumes from step 2
    assert capfd.readouterr().err == (
        f"warning: {folder}/step-000003: damaged, the one before it is taken: {SHARD} {clause}\n"
    )
    assert_same_end(folder, in_shards)


def without_sharding(path: Path) -> None:
    save_file(load_file(path), path)


def of_another_optimizer(path: Path) -> None:
    for each in path.parent.glob("*.safetensors"):
        with safe_open(each, "pt") as file:
            header = file.metadata()["DCP_SHARDING_INFO"].replace("optimizer/3.", "optimizer/9.")
        tensors = {name.replace("optimizer/3.", "optimizer/9."): tensor for name, tensor in load_file(each).items()}
        save_file(tensors, each, {"DCP_SHARDING_INFO": header})


@pytest.mark.parametrize(
    ("damage", "width", "average", "expected"),
    [
        (Path.unlink, 5, False, "Size mismatch between saved torch.Size([3]) and current: torch.Size([5])"),
        (truncate, 5, False, "incomplete"),
        (without_sharding, 5, False, "lacks shards"),
        (of_another_optimizer, 5, False, "index out of range"),
        (lambda _: None, 4, False, "Size mismatch between saved torch.Size([5]) and current: torch.Size([4])"),
        (lambda _: None, 5, True, "teacher/0.bias is in the model or in the checkpoint alone"),
    ],
)
def test_shards_that_do_not_fit_are_one_line(
    in_shards: Path, tmp_path: Path, damage: Callable[[Path], None], width: int, expected: str, *, average: bool
) -> None:
    path = shutil.copytree(in_shards / "step-000003", tmp_path / "step-000003")
    damage(path / SHARD)
    model = network(width)
    teacher = dict(network().named_parameters()) if average else None
    with pytest.raises(UserError, match=r"cannot resume from it: .*\(start anew with --overwrite\)") as caught:
        load_checkpoint(path, dict(model.named_parameters()), teacher, torch.optim.AdamW(model.parameters()))
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
