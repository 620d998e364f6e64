"""Sigma grids: known answers, nesting, and the grid of diffusers' flow-map scheduler."""

from __future__ import annotations

import itertools

import pytest
import torch

from rats_video.diffusion.flow import add_noise, euler_step
from rats_video.diffusion.schedule import shift_sigma, sigma_grid


def test_known_answers() -> None:
    expected = [1, 2.4 / 2.6, 1.8 / 2.2, 1.2 / 1.8, 0.6 / 1.4, 0]  # .923 .818 .667 .429
    assert sigma_grid(5, 3.0).tolist() == pytest.approx(expected, abs=1e-7)
    assert sigma_grid(4, 1.0).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert sigma_grid(4, 5.0).tolist() == pytest.approx([1, 0.9375, 5 / 6, 0.625, 0], abs=1e-7)
    assert sigma_grid(1, 7.0).tolist() == [1, 0]


@pytest.mark.parametrize(("num_steps", "shift"), list(itertools.product([1, 3, 8, 50], [0.5, 1.0, 3.0, 7.0])))
def test_falls_from_one_to_zero(num_steps: int, shift: float) -> None:
    sigmas = sigma_grid(num_steps, shift)
    assert (sigmas.shape, sigmas.dtype) == ((num_steps + 1,), torch.float32)
    assert (sigmas[0], sigmas[-1]) == (1, 0)
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize(("num_steps", "factor"), list(itertools.product([1, 3, 4, 5, 8], [2, 3, 6, 12])))
def test_a_multiple_contains_the_grid_exactly(num_steps: int, factor: int) -> None:
    assert torch.equal(sigma_grid(num_steps * factor, 3.0)[::factor], sigma_grid(num_steps, 3.0))


@pytest.mark.pipeline  # imports diffusers
@pytest.mark.parametrize(("num_steps", "shift"), [(1, 3.0), (4, 3.0), (8, 5.0), (50, 3.0)])
def test_equals_the_scheduler_saved_with_the_pipeline(num_steps: int, shift: float) -> None:
    from diffusers import FlowMapEulerDiscreteScheduler

    scheduler = FlowMapEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    torch.testing.assert_close(sigma_grid(num_steps, shift), scheduler.sigmas.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("num_steps", "shift"), [(0, 3.0), (-1, 3.0), (4, 0.0), (4, -1.0)])
def test_bad_arguments_raise(num_steps: int, shift: float) -> None:
    with pytest.raises(ValueError, match="num_steps >= 1 and shift > 0"):
        sigma_grid(num_steps, shift)


def test_random_levels_follow_the_grid() -> None:
    torch.testing.assert_close(shift_sigma(torch.linspace(1, 0, 9), 3.0), sigma_grid(8, 3.0))


def test_noise_and_euler_step_are_inverse_along_the_path() -> None:
    x0, noise = torch.full((2, 1, 1, 1, 1), 4.0), torch.full((2, 1, 1, 1, 1), -2.0)
    noisy = add_noise(x0, noise, torch.tensor([0.25, 1.0]))
    assert noisy.flatten().tolist() == [2.5, -2.0]
    assert euler_step(noisy[:1], noise[:1] - x0[:1], torch.tensor(0.25), torch.tensor(0.0)).item() == 4.0
