"""What the tests of one method share with those of its variants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rats_video.backbones.wan import WanBackbone
from rats_video.distillation.method import build_method
from rats_video.distillation.roles import build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.methods.dmd2 import Dmd2
from rats_video.training.batches import draw_batch


@pytest.fixture
def draw(loaded: WanBackbone, captions: tuple[str, ...]) -> Callable[..., Any]:
    """The batch of a configuration at a step."""
    return lambda cfg, step=0: draw_batch(loaded, cfg, captions, step)


@pytest.fixture
def build_dmd2(loaded: WanBackbone) -> Callable[[DistillConfig], Dmd2]:
    """The method of a configuration, on weights of its own."""

    def build(cfg: DistillConfig) -> Dmd2:
        built = build_method(cfg, *build_roles(cfg, loaded.with_own_denoiser()))
        assert isinstance(built, Dmd2)
        return built

    return build
