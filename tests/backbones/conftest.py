"""Each family's tiny pipeline, opened once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from contract import FAMILIES, Case
from family import Family
from shared import made_once

from rats_video.backbones.kinds import load_backbone
from rats_video.seeds import seeded


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Case]:
    """Opens a family's pipeline once for all files."""

    @functools.cache
    def open_family(family: Family) -> Case:
        folder = made_once(tmp_path_factory, family.name, family.build)
        backbone = load_backbone(folder)
        backbone.fps = family.clip.fps
        noise = backbone.sample_noise(2, family.clip, seeded(3))
        return Case(family=family, folder=folder, backbone=backbone, pipeline=family.load(folder), noise=noise)

    return open_family


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def case(request: pytest.FixtureRequest, opened: Callable[[Family], Case]) -> Iterator[Case]:
    case = opened(request.param)
    before = {name: weight.clone() for name, weight in case.backbone.weights.items()}
    yield case
    assert all(
        torch.equal(weight, before[name]) for name, weight in case.backbone.weights.items()
    )  # no test changes it


@pytest.fixture
def no_gradient() -> Iterator[None]:
    """Gradient only where a test says so."""
    with torch.no_grad():
        yield
