"""Matching at the horizons: numbers by hand, motion apart from appearance, the teacher detached."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rats_video.condition import GivenFrames
from rats_video.methods.shaping import (
    PICTURES,
    ShapingConfig,
    frame_distance,
    sampled_frames,
    shaping_by_horizon,
    weigh_horizons,
)  # fmt: skip
from rats_video.types import Trajectory


def frames(*values: float) -> Tensor:
    """A residual `[1, 2, F, 2, 2]` that is one value a frame."""
    return torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1, 1).expand(1, 2, -1, 2, 2).clone()


def path(*latents: Tensor, sigmas: tuple[float, ...] = (0.5, 0.0)) -> Trajectory:
    return Trajectory(sigmas[: len(latents)], latents, nfe=4)


def test_numbers_by_hand() -> None:
    # appearance 1 9 0; motion: 2^2 shared by the first two frames, then 3^2
    assert frame_distance(frames(1, 3, 0), 0.5).tolist() == [[1 + 2.0, 9 + 2.0, 0 + 4.5]]
    assert frame_distance(frames(1, 3, 0), 0.0).tolist() == [[1.0, 9.0, 0.0]]


def test_is_a_mean_over_channels_and_space() -> None:
    residual = frames(0, 0)
    residual[0, 1, 1, 0, 1] = 4.0
    assert frame_distance(residual, 0.0).tolist() == [[0.0, 16 / 8]]
    assert frame_distance(residual, 1.0).tolist() == [[2.0, 4.0]]


def test_an_error_that_stays_put_costs_no_motion() -> None:
    still = torch.randn(2, 3, 1, 4, 4).expand(-1, -1, 5, -1, -1)
    torch.testing.assert_close(frame_distance(still, 100.0), frame_distance(still, 0.0))


def test_a_single_frame_has_no_motion() -> None:
    assert frame_distance(frames(3), 7.0).tolist() == [[9.0]]


def test_by_horizon_and_only_the_student_gets_gradient() -> None:
    student, teacher = (torch.tensor(v).requires_grad_() for v in (2.0, 0.5))
    ours = path(student * frames(1, 1), student * frames(1, 2))
    theirs = path(teacher * frames(1, 1), teacher * frames(0, 0))
    distance = shaping_by_horizon(ours, theirs, ShapingConfig(motion_weight=0.25))
    assert distance.tolist() == [[[2.25, 2.25]], [[4 + 1.0, 16 + 1.0]]]
    distance.sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    # d/ds [2 (s - .5)^2 + 5.5 s^2] where 5.5 = 1 + 4 + 2 * .25
    assert student.grad.item() == pytest.approx(4 * 1.5 + 11 * 2.0)


def test_other_noise_levels_raise() -> None:
    with pytest.raises(ValueError, match="horizons differ"):
        shaping_by_horizon(
            path(frames(0), frames(0)), path(frames(0), frames(0), sigmas=(0.6, 0.0)), ShapingConfig(motion_weight=0.0)
        )
    with pytest.raises(ValueError, match="zip"):
        shaping_by_horizon(path(frames(0), frames(0)), path(frames(0), sigmas=(0.5,)), ShapingConfig())


def test_horizon_weights() -> None:
    by_horizon = torch.tensor([[[1.0, 2.0]], [[5.0, 10.0]]])  # [K=2, B=1, F=2]
    assert weigh_horizons(by_horizon, None).tolist() == [[3.0, 6.0]]
    assert weigh_horizons(by_horizon, (3.0, 1.0)).tolist() == [[2.0, 4.0]]
    assert weigh_horizons(by_horizon, (0.0, 2.0)).tolist() == [[5.0, 10.0]]


@pytest.mark.parametrize(
    ("held", "sampled"),
    [((), [0, 1, 2, 3]), ((0,), [1, 2, 3]), ((0, 3), [1, 2]), ((3,), [0, 1, 2])],
    ids=["none", "first", "first_and_last", "last"],
)
def test_held_frames_are_left_out(held: tuple[int, ...], sampled: list[int]) -> None:
    is_held = tuple(frame in held for frame in range(4))
    given = GivenFrames(torch.zeros(1, 1, 4, 1, 1), is_held) if held else None
    assert list(range(4))[sampled_frames(PICTURES, given)] == sampled
    assert sampled_frames("audio", given) == slice(None)
    assert sampled_frames(PICTURES, GivenFrames(channels=torch.zeros(1, 5, 4, 1, 1))) == slice(None)  # none is held
