"""Running out of GPU memory is one line that names what is not switched on yet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from rats_video.distillation.compute import memory_advice
from rats_video.distillation.settings import DistillConfig

ALL_ON = (
    "compute.activation_checkpointing=true", "compute.decode.window=2", "compute.decode.checkpoint=true",
    "compute.decode.offload=true", "student.weights.kind=lora", "student.grad_steps=1", "compute.dtype=bfloat16",
    "compute.cache_text=true", "training.optimizer.kind=adamw8bit", "compute.offload=block",
    "training.micro_batch_size=1", "compute.decode.dtype=bfloat16", "compute.quantization=nf4",
)  # fmt: skip


def out_of_memory(*_: object, **__: object) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has ...")


def test_only_what_is_off_and_what_saves_most_first(make_config: Callable[..., DistillConfig]) -> None:
    assert memory_advice(make_config()) == (
        "--set, the first saves most: training.micro_batch_size=1, compute.activation_checkpointing=true, "
        "compute.decode.window=2, compute.decode.checkpoint=true, student.weights.kind=lora, student.grad_steps=1, "
        "compute.dtype=bfloat16, compute.decode.dtype=bfloat16, compute.cache_text=true, "
        "training.optimizer.kind=adamw8bit"
    )
    for setting in ALL_ON:
        assert setting not in memory_advice(make_config("compute.decode.checkpoint=true", setting))
    inputs = "compute.activation_offload=true"  # which needs another
    assert memory_advice(make_config(*ALL_ON)) == f"--set, the first saves most: {inputs}"
    assert memory_advice(make_config(*ALL_ON, inputs)).startswith("all levers are on")


def test_what_is_advised_is_accepted(make_config: Callable[..., DistillConfig]) -> None:
    advice = memory_advice(make_config("student.weights.kind=lora", "compute.decode.checkpoint=true"))
    settings = advice.split(": ")[1].split(", ")
    assert "compute.offload=block" in settings
    assert "compute.decode.offload=true" in settings
    for setting in settings:
        make_config("student.weights.kind=lora", "compute.decode.checkpoint=true", setting)


@pytest.mark.parametrize("command_name", ["distill", "run"])
def test_a_distillation_names_levers(
    command: Callable[..., tuple[int, str, str]], config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    command_name: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("rats_video.commands.train_student.train_loop", out_of_memory)
    code, _, err = command(command_name, "--config", config_file, "--output", tmp_path / "run", "--device", "cpu")
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith(
        "error: out of GPU memory (--set, the first saves most: training.micro_batch_size=1, compute."
    )
    assert "Traceback" not in err


@pytest.mark.pipeline
def test_a_sampling_says_fewer_prompts(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rats_video.commands.sample.sample_files", out_of_memory)
    code, _, err = command("sample", "--output", tmp_path, "--device", "cpu")
    assert code == 2
    assert err.splitlines() == ["error: out of GPU memory (use a --batch-size below 16)"]
