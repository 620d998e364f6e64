"""The optimizer a configuration names, and its state through a checkpoint."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from rats_video.errors import UserError
from rats_video.optim import OptimizerConfig, build_optimizer, learning_rate
from rats_video.training.checkpoint import CheckpointWriter
from rats_video.training.restore import load_checkpoint


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 2))  # one weight large enough to be kept in 8 bits


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(4, 64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        network(inputs).square().mean().backward()
        optimizer.step()


def options(kind: str) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"kind": kind, "lr": 1e-2, "weight_decay": 0.1})


def distance(one: nn.Module, other: nn.Module) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_8_bits_follow_32() -> None:
    pytest.importorskip("bitsandbytes", reason="the gpu extra is not installed")
    start, exact, small = model(), model(), model()
    optimizer = build_optimizer(options("adamw8bit"), small.parameters())
    train(exact, build_optimizer(options("adamw"), exact.parameters()), range(5))
    train(small, optimizer, range(5))
    moments = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert torch.uint8 in {moment.dtype for moment in moments}
    assert 0 < distance(exact, small) < 0.2 * distance(exact, start)


def test_restarts_cut_a_run_into_pieces_of_their_own() -> None:
    cfg = OptimizerConfig(lr=2.0, warmup_steps=2, decay=True)
    pieces = [learning_rate(cfg, step, total) for total in (6, 4, 10) for step in range(total)]
    whole = cfg.model_copy(update={"restarts": (6, 10)})
    assert [learning_rate(whole, step, 20) for step in range(20)] == pieces
    assert pieces[5] < 0.3 < pieces[6] == 1.0  # almost at zero, then half way up again
    assert [learning_rate(whole, step, 6) for step in range(6)] == pieces[:6]  # before it is made longer


@pytest.mark.parametrize("restarts", [(9, 5), (5, 5, 9)])
def test_restarts_rise(restarts: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match=re.escape(f"each step once, got {[*restarts]}: give [5, 9]")):
        OptimizerConfig(lr=1, restarts=restarts)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_three_steps_and_three_more_are_six(tmp_path: Path, kind: str) -> None:
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="the gpu extra is not installed")
    whole, half, again = model(), model(), model()
    train(whole, build_optimizer(options(kind), whole.parameters()), range(6))
    optimizer = build_optimizer(options(kind), half.parameters())
    train(half, optimizer, range(3))
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(3, dict(half.named_parameters()), None, optimizer)
        writer.wait()
    path = tmp_path / "step-000003"
    resumed = build_optimizer(options(kind), again.parameters())
    assert load_checkpoint(path, dict(again.named_parameters()), None, resumed) == {"step": 3}
    train(again, resumed, range(3, 6))
    assert distance(half, whole) > 0
    assert distance(again, whole) == 0


def test_8_bits_without_bitsandbytes_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"^training.optimizer.kind: adamw8bit needs bitsandbytes") as caught:
        build_optimizer(options("adamw8bit"), model().parameters())
    assert "pip install 'rats-video[gpu]'" in str(caught.value)
