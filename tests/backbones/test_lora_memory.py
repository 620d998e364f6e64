"""What RATS' roles on one base cost in memory, beside plain LoRA fine-tuning of the same model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rats_video.backbones.wan import WanBackbone


@pytest.fixture(scope="module")
def roles_memory() -> Any:
    """benchmarks/ is no package: its modules are loaded by path."""
    folder = Path(__file__).parents[2] / "benchmarks"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        spec = importlib.util.spec_from_file_location("roles_memory", folder / "roles_memory.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def test_live_bytes_are_counted(roles_memory: Any) -> None:
    def call() -> None:
        first = torch.ones(1000)  # 4000 bytes
        second = first.view(10, 100) * 2  # a view costs nothing
        del first
        third = torch.ones(500)
        del second, third

    kept = torch.ones(250)
    assert roles_memory.peak_bytes(call) == 8000
    assert roles_memory.peak_bytes(lambda: kept + 1, [kept, kept.view(5, 50)]) == 2000


@pytest.mark.parametrize("grad_steps", [1, 2])
def test_roles_cost_no_more_than_a_seventh_over_plain_lora(
    roles_memory: Any, backbone: WanBackbone, batch_noise: Callable[[WanBackbone], Tensor], grad_steps: int
) -> None:
    base = roles_memory.wide(backbone)
    rats, plain = roles_memory.compare(base, batch_noise(base), grad_steps=grad_steps)
    weights = sum(weight.numel() * weight.element_size() for weight in base.denoiser.parameters())
    assert plain > weights
    assert plain < rats <= 1.15 * plain


@pytest.fixture
def batch_noise() -> Callable[[WanBackbone], Tensor]:
    return lambda base: torch.randn(1, base.latent_channels, 2, 8, 8, generator=torch.Generator().manual_seed(0))
