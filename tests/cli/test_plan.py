"""`rats-video plan`: tables, JSON, advice that can be pasted, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]
WAN = [
    part
    for setting in (
        "model=/not/downloaded", "architecture=wan21_1b", "clip.num_frames=5", "clip.height=64", "clip.width=64",
        "training.batch_size=1", "compute.cache_text=true",
    )
    for part in ("--set", setting)
]  # fmt: skip
LORA = ("student.weights.kind=lora", "student.weights.rank=2")


def test_plan_of_the_tiny_model(command: Command, config_file: Path, tmp_path: Path) -> None:
    record = tmp_path / "plan.json"
    code, out, err = command("plan", "--config", config_file, "--device-name", "cpu", "--json", record)
    assert (code, err) == (0, "")
    assert "network calls a clip and step (NFE): teacher 16, student 4" in out
    assert "  4 steps  0.9000: 0.9000\n" in out
    plan = json.loads(record.read_text())
    held, fullest = plan["memory"]["held"], plan["memory"]["phases"][plan["peak_phase"]]
    assert plan["peak_bytes"] == round(sum(held.values()) + sum(fullest.values()))
    assert plan["parameters"]["student (trained)"] == plan["parameters"]["denoiser (base)"]
    assert "gpu_memory_gib" not in plan  # a CPU has no card to fit into


def test_plan_before_the_model_is_there(command: Command) -> None:
    code, out, err = command("plan", "--config", "tiny", *WAN, "--device-name", "cpu")
    assert (code, err) == (0, "")
    assert "Architecture: preset wan21_1b; 1 clips a step on each of 1 x cpu" in out
    assert f"{1_418_996_800:>14,}" in out


def test_plan_says_what_reading_the_model_takes(command: Command) -> None:
    preset = ["--set", "model=models/Wan2.1-T2V-1.3B-Diffusers", *WAN[2:]]
    _, out, _ = command("plan", "--config", "tiny", *preset, "--set", "compute.dtype=bfloat16")
    begin = out.index("reading the model from disk, GiB")
    lines = [line.split() for line in out[begin:].splitlines()[1:5]]
    assert lines[0] == ["download", "27.01"]  # 29 GB
    assert lines[2] == ["host", "memory", "meanwhile,", "each", "process", "10.58"]  # UMT5-XXL in bfloat16
    assert lines[3] == ["expected:", "29", "s", "at", "1", "GB/s"]


def test_settings_that_fit_can_be_pasted(command: Command, config_file: Path, tmp_path: Path) -> None:
    record = tmp_path / "plan.json"
    pulled = (  # fewer to try
        "compute.dtype=bfloat16", "compute.activation_checkpointing=true", "student.grad_steps=1",
        "compute.decode.checkpoint=true", "compute.decode.window=1",
    )  # fmt: skip
    changes = [part for setting in ("training.batch_size=64", *LORA, *pulled) for part in ("--set", setting)]
    command_line = ["plan", "--config", config_file, *changes, "--json", record]
    out = command(*command_line, "--gpu-memory", 0.5).out
    plan = json.loads(record.read_text())
    needed, least = plan["needed_bytes"] / 2**30, plan["needed_bytes_with_levers"] / 2**30
    assert f"Does not fit into 0.5 GiB: even with every lever it needs {least:.1f} GiB." in out
    assert needed > least > 0.75  # CUDA's own

    enough = ["--gpu-memory", (needed + least) / 2]
    out = command(*command_line, *enough).out
    levers = json.loads(record.read_text())["levers"]
    assert [line.split()[1] for line in out.splitlines() if line.startswith("  --set")] == levers
    pasted = [part for setting in levers for part in ("--set", setting)]
    assert "Fits into " in command(*command_line, *enough, *pasted).out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "architecture=wan"], "error: architecture: no such preset: wan ("),
        (["--set", "model=/nowhere"], "error: model: no such folder: /nowhere (or set architecture to one of: "),
        (["--gpu-memory", -1], "error: --gpu-memory: must be above 0, got -1 (in GiB, like 80)"),
        (["--utilisation", 2], "error: --utilisation: must be above 0 and at most 1, got 2"),
        (["--device-name", "tpu"], "error: --device-name: no such device: tpu (one of h100, "),
    ],
)
def test_plan_refuses_in_one_line(command: Command, config_file: Path, arguments: list[str], message: str) -> None:
    code, out, err = command("plan", "--config", config_file, *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith(message)
