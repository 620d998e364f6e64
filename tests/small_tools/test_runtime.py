"""How processes share work, as far as one process can see it; tests/distributed has the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rats_video.backbones.compute import ParallelConfig
from rats_video.commands.device import check_processes, start_runtime
from rats_video.errors import UserError
from rats_video.methods.teacher import TeacherRollout
from rats_video.methods.teacher_cache import DiskRolloutCache
from rats_video.runtime import ALONE, Runtime, interleave
from rats_video.types import PromptBatch, RewardScores, Trajectory

CPU = torch.device("cpu")


def ranks(trainers: int, context: int = 1) -> list[Runtime]:
    return [Runtime(CPU, rank, trainers, context) for rank in range(trainers)]


@given(st.integers(1, 9), st.integers(0, 40))
def test_shares_make_the_whole_again(trainers: int, count: int) -> None:
    shares = [runtime.shard(count) for runtime in ranks(trainers)]
    assert interleave(shares) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_rows_are_shared_by_data_ranks_and_equal_in_a_context_group() -> None:
    batch = list(range(12))
    assert [batch[runtime.rows(12)] for runtime in ranks(3)] == [batch[:4], batch[4:8], batch[8:]]
    halves = [batch[runtime.rows(12)] for runtime in ranks(4, context=2)]
    assert halves == [batch[:6], batch[:6], batch[6:], batch[6:]]


def test_rows_that_do_not_divide_are_one_line() -> None:
    expected = r"^training\.batch_size: 8 clips cannot be shared evenly by 3 processes \(use a multiple of 3\)$"
    with pytest.raises(UserError, match=expected):
        ranks(3)[0].rows(8)


def test_alone_nothing_changes() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([1.0, 2.0])
    ALONE.average_gradients([weight])
    ALONE.barrier()
    assert weight.grad.tolist() == [1.0, 2.0]
    assert ALONE.all_reduce_mean({"loss": 0.1}) == {"loss": 0.1}
    assert ALONE.gather_shards(["a", "b"]) == ["a", "b"]
    assert ALONE.is_main
    assert not ALONE.serves_reward
    assert [ALONE.any(flag) for flag in (True, False)] == [True, False]


def test_reward_ranks_come_last() -> None:
    world = [Runtime(CPU, rank, trainers=2, reward_ranks=1) for rank in range(3)]
    assert [runtime.serves_reward for runtime in world] == [False, False, True]
    assert [runtime.is_main for runtime in world] == [True, False, False]


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        (
            {"context": 2},
            r"^parallel\.context: 1 training processes are no multiple of 2 \(start more: rats-video distill --gpus",
        ),
        ({"reward_ranks": 1}, r"^parallel\.reward_ranks: 1 of 1 processes leave none to train \(start more: "),
    ],
)
def test_too_few_processes_are_one_line(parallel: dict[str, int], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        start_runtime("cpu", ParallelConfig.model_validate(parallel))


def test_the_cpu_takes_any_number_of_processes() -> None:
    check_processes("cpu", 64, where="--gpus")


def test_rollout_that_one_process_lacks_is_none_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskRolloutCache(tmp_path, {}, CPU)
    batch = PromptBatch(0, ("a",), torch.zeros(1, 1, 1, 1, 1), num_steps=1)
    store.save(batch, TeacherRollout(Trajectory((0.0,), (torch.ones(1, 1, 1, 1, 1),), 1), RewardScores(torch.zeros(1))))
    assert store.load(batch) is not None
    monkeypatch.setattr(Runtime, "any", lambda _self, _flag: True)  # as where another rank says that it has none
    assert store.load(batch) is None
