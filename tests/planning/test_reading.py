"""What reading a model takes: counted from the files there are, or from what the hub's download is known to be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rats_video.backbones.architecture import find_architecture
from rats_video.backbones.kinds import load_backbone
from rats_video.distillation.settings import DistillConfig
from rats_video.planning.reading import plan_reading

MakeConfig = Callable[..., DistillConfig]
PARTS = ("transformer", "vae", "text_encoder")


def sizes(folder: Path) -> dict[str, int]:
    return {part: next((folder / part).glob("*.safetensors")).stat().st_size for part in PARTS}


def test_disk_is_that_of_the_files_and_host_memory_of_the_runs_precision(
    make_config: MakeConfig, tiny_wan: Path
) -> None:
    whole = plan_reading(cfg := make_config(), find_architecture(cfg.model, None), is_cpu=True)
    assert whole.disk == sizes(tiny_wan)
    assert whole.host == pytest.approx(sum(whole.disk.values()), rel=0.1)  # both in float32, the files with headers
    assert whole.seconds == pytest.approx(sum(whole.disk.values()) / 1e9)
    cfg = make_config("compute.dtype=bfloat16")
    half = plan_reading(cfg, find_architecture(cfg.model, None), is_cpu=True)
    assert half.disk == whole.disk
    loaded = load_backbone(tiny_wan, dtype=torch.bfloat16).parts.values()
    networks = [part for part in loaded if isinstance(part, torch.nn.Module)]
    assert half.host == sum(weight.nbytes for network in networks for weight in network.parameters())


def test_parts_go_on_to_a_gpu_one_by_one_unless_they_wait_on_the_host(make_config: MakeConfig) -> None:
    def host(*overrides: str) -> int:
        cfg = make_config(*overrides)
        return plan_reading(cfg, find_architecture(cfg.model, None), is_cpu=False).host

    offloaded = host("compute.offload=block", "student.weights.kind=lora")
    assert 0 < host() < offloaded == host("parallel.shard=true")


def test_a_folder_of_configurations_has_nothing_to_read(
    make_config: MakeConfig, tiny_wan: Path, tmp_path: Path
) -> None:
    ignored = shutil.ignore_patterns("*.safetensors")
    folder = shutil.copytree(tiny_wan, tmp_path / "Wan2.1-T2V-1.3B-Diffusers", ignore=ignored)
    cfg = make_config(f"model={folder}")
    assert plan_reading(cfg, find_architecture(cfg.model, None), is_cpu=True).disk == {"download": 29_000_000_000}


def test_two_precisions_side_by_side_are_read_once(make_config: MakeConfig, tiny_wan: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_wan, tmp_path / "model"))
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_suffix(".fp16.safetensors"))
    cfg = make_config(f"model={folder}")
    assert plan_reading(cfg, find_architecture(cfg.model, None), is_cpu=True).disk == sizes(tiny_wan)
