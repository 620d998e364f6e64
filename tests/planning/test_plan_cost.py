"""What a plan costs: operators that are derived once, and few dry runs however many settings are tried."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rats_video.commands.plan import run_plan
from rats_video.planning import operators, runs
from rats_video.planning.memory_tracker import MemoryTracker

STEP_OPTIONS = 9  # micro_batch_size, activation_checkpointing and _offload, dtype, weights.kind, two each of
# quantization and grad_steps
DECODE_OPTIONS = 6  # micro_batch_size, decode.checkpoint, decode.offload, decode.dtype, decode.small, decode.window


def test_a_search_makes_few_dry_runs(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Counter[str] = Counter()

    def count(name: str) -> None:
        run = getattr(runs, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            made[name] += 1
            return run(*args, **kwargs)

        monkeypatch.setattr(runs, name, counted)

    for name in ("trace_step", "trace_decode", "trace_reward", "trace_text"):
        count(name)

    def plan(gpu_memory: float) -> dict[str, Any]:
        record = tmp_path / "plan.json"
        run_plan(
            config=str(config_file), overrides=["training.batch_size=64"], gpu_memory=gpu_memory, gpus=1,
            device_name="h100", utilisation=None, output=record,
        )  # fmt: skip
        return dict(json.loads(record.read_text()))

    as_given = plan(1000.0)
    assert as_given["levers"] == []
    assert made["trace_decode"] == 1
    made.clear()
    found = plan(as_given["needed_bytes"] / 2**30 - 1e-6)  # a little lacks: each lever is dropped in turn
    assert found["levers"]
    assert found["needed_bytes"] == as_given["needed_bytes"]
    assert 2 < made["trace_step"] <= 2 + STEP_OPTIONS  # as given, with all levers, and one for each that is dropped
    assert 2 < made["trace_decode"] <= 2 + DECODE_OPTIONS
    assert made["trace_reward"] <= 2  # of all clips, of one
    assert made["trace_text"] <= 4  # in two precisions


def test_an_operator_is_derived_once_for_its_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    first = torch.empty(3, 4, device="meta").t()
    derive, seen = operators._outcome, []
    monkeypatch.setattr(operators, "_outcome", lambda *key: seen.append(derive(*key)) or seen[-1])
    with MemoryTracker() as ledger:
        for _ in range(2):
            product = first @ torch.empty(3, 5, device="meta")
    assert ledger.phases["start"].flops == 2 * 2 * 4 * 3 * 5
    assert (product.shape, product.stride()) == ((4, 5), (5, 1))
    products = [each for each in seen if each is not None and each.flops]
    assert len(products) == 2
    assert products[0] is products[1]


@pytest.mark.parametrize(
    "operator",
    [
        lambda x: x + 1, lambda x: x + 1.0, lambda x: x.add_(1), lambda x: x.to(torch.bfloat16), torch.clone,
        lambda x: x.topk(2), lambda x: x.reshape(-1), lambda x: x[:, 1:], lambda x: x.sum(0),
        lambda x: x.transpose_(0, 1),
    ],
)  # fmt: skip
def test_a_replayed_operator_makes_what_it_makes(operator: Callable[[Tensor], Any]) -> None:
    def described(given: Tensor) -> list[Any]:
        out = operator(given)
        tensors = [out] if isinstance(out, Tensor) else list(out)
        mine = given.untyped_storage()._cdata
        return [
            (
                each.shape,
                each.stride(),
                each.dtype,
                each.untyped_storage().nbytes(),
                each.untyped_storage()._cdata == mine,
            )
            for each in tensors
        ]

    for dtype in (torch.float32, torch.int64):
        real = described(torch.empty(4, 6, dtype=dtype, device="meta"))
        with MemoryTracker():
            replayed = [described(torch.empty(4, 6, dtype=dtype, device="meta")) for _ in range(3)]
        assert replayed == [real] * 3
