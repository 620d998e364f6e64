"""Where the two grids meet, and interpolation where they do not."""

from __future__ import annotations

import pytest
import torch

from rats_video.diffusion.schedule import sigma_grid
from rats_video.methods.horizon import at_horizons, match_horizons
from rats_video.types import Trajectory


@pytest.mark.parametrize(("student", "teacher"), [(4, 48), (3, 48), (8, 48), (4, 4), (5, 50), (1, 7)])
def test_nested_grids_need_no_interpolation(student: int, teacher: int) -> None:
    horizons = match_horizons(sigma_grid(student, 3.0), sigma_grid(teacher, 3.0))
    assert horizons.residual == 0
    assert horizons.keep == tuple(range(teacher // student, teacher + 1, teacher // student))
    assert horizons.sigmas == tuple(sigma_grid(student, 3.0)[1:].tolist())


def test_grids_that_do_not_nest_keep_both_neighbours() -> None:
    horizons = match_horizons(sigma_grid(3, 1.0), sigma_grid(8, 1.0))  # student 2/3, 1/3, 0; teacher eighths
    assert horizons.keep == (2, 3, 5, 6, 8)
    assert horizons.residual == pytest.approx(1 / 24)  # 2/3 to 5/8


def test_interpolation_is_exact_on_a_straight_trajectory() -> None:
    horizons = match_horizons(sigma_grid(5, 3.0), sigma_grid(12, 3.0))
    assert horizons.residual > 0.01
    sigmas = sigma_grid(12, 3.0)[list(horizons.keep)].tolist()
    start, slope = torch.randn(2, 1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    path = Trajectory(tuple(sigmas), tuple(start + sigma * slope for sigma in sigmas), nfe=24)
    matched = at_horizons(path, horizons.sigmas)
    assert (matched.sigmas, matched.nfe) == (horizons.sigmas, 24)
    for sigma, latents in zip(matched.sigmas, matched.latents, strict=True):
        torch.testing.assert_close(latents, start + sigma * slope, atol=1e-6, rtol=0)


def test_interpolation_is_linear_in_sigma() -> None:
    path = Trajectory((0.8, 0.4, 0.0), tuple(torch.full((1, 1, 1, 1, 1), v) for v in (8.0, 2.0, 1.0)), nfe=2)
    values = [latents.item() for latents in at_horizons(path, (0.8, 0.5, 0.1, 0.0)).latents]
    assert values == pytest.approx([8.0, 3.5, 1.25, 1.0])
