"""Temporal measures: known answers on shapes, what damage costs, exact gradients, and the rewards made of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from rats_video.datasets.shapes import corruptions
from rats_video.datasets.shapes.render import SPEEDS, ShapeAttributes, render
from rats_video.errors import UserError
from rats_video.evaluation.sweep import motion_measure
from rats_video.rewards.motion import half_motion, shrunk, softened, warped
from rats_video.rewards.reward import RewardConfig, build_reward, reward_folders, reward_on_meta
from rats_video.rewards.self_test import self_test
from rats_video.rewards.temporal import (
    bounded,
    clipped,
    contrast,
    dynamic_degree,
    flicker,
    in_chunks,
    motion_smoothness,
    saturation,
)
from rats_video.seeds import seeded
from rats_video.types import ClipSpec, Reward, RewardScores

Measure = Callable[[Tensor], RewardScores]
CPU = torch.device("cpu")
SLOW, FAST = (sum(SPEEDS[word]) / 2 for word in ("slow", "fast"))  # pixels a frame, to 0.1
CLIP = ClipSpec(num_frames=9, height=64, width=64, fps=8.0)
LOOKS = [("red", "circle", "left", "gray"), ("blue", "square", "up", "white"), ("yellow", "triangle", "right", "black")]


def shapes(speed: str, clip: ClipSpec = CLIP) -> Tensor:
    return render([ShapeAttributes(speed, *look) for look in LOOKS], clip, seeded(3))


@pytest.fixture(scope="module")
def slow() -> Tensor:
    return shapes("slow")


@pytest.fixture(scope="module")
def fast() -> Tensor:
    return shapes("fast")


def score(measure: Measure, videos: Tensor) -> Tensor:
    with torch.no_grad():
        return measure(videos).clip


def pixels_a_frame(videos: Tensor) -> Tensor:
    return score(dynamic_degree, videos) * min(videos.shape[-2:])


def noisy(videos: Tensor, strength: float) -> Tensor:
    return (videos + strength * torch.randn(videos.shape, generator=seeded(5))).clamp(0, 1)


def still(videos: Tensor) -> Tensor:
    return videos[:, :1].expand_as(videos)


# ------------------------------------------------------------------------------------------------ how far things move


def test_motion_is_the_shapes_own(slow: Tensor, fast: Tensor) -> None:
    assert (pixels_a_frame(slow) - SLOW).abs().max() < 0.25
    assert (pixels_a_frame(fast) - FAST).abs().max() < 0.3
    assert (pixels_a_frame(fast[:, ::2]) - 2 * FAST).abs().max() < 0.6
    larger = shapes("fast", ClipSpec(4, 160, 192, 8.0))  # lengths scale with the shorter side
    torch.testing.assert_close(score(dynamic_degree, larger), torch.full((3,), FAST / 64), atol=0.3 / 64, rtol=0)


HEIGHT, WIDTH, ANGLE = 128, 192, 0.6
SPEEDS = [0.01, 6 / 256, 0.04, 0.08]  # shorter sides a frame; the second is VBench's limit


def moving(picture: Callable[[Tensor, Tensor], Tensor], speed: float) -> Tensor:
    """Three frames of a picture, a function of `x, y` in shorter sides, that moves by so much a frame."""
    y, x = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    steps = [(speed * step * math.cos(ANGLE), speed * step * math.sin(ANGLE)) for step in range(3)]
    return torch.stack([picture(x / HEIGHT - right, y / HEIGHT - down) for right, down in steps])[None]


def disc(radius: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A red disc on blue-gray, its edge one pixel wide."""

    def picture(x: Tensor, y: Tensor) -> Tensor:
        inside = ((radius - ((x - 0.6) ** 2 + (y - 0.4) ** 2).sqrt()) * HEIGHT + 0.5).clamp(0, 1)
        red, blue = torch.tensor([0.9, 0.2, 0.1]), torch.tensor([0.3, 0.4, 0.5])
        return torch.lerp(blue[:, None, None], red[:, None, None], inside)

    return picture


def waves(finest: float, sharpness: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Twelve waves a colour, up to five times as long as the finest: smooth at sharpness 4, flat patches at 40."""
    lengths, directions, *phases = torch.rand(5, 12, generator=seeded(8))
    number = 2 * math.pi / (finest * 5**lengths)
    along_x, along_y = ((number * turn(2 * math.pi * directions))[:, None, None] for turn in (torch.cos, torch.sin))

    def picture(x: Tensor, y: Tensor) -> Tensor:
        colours = [torch.sin(along_x * x + along_y * y + 2 * math.pi * at[:, None, None]).mean(0) for at in phases]
        return torch.sigmoid(sharpness * torch.stack(colours))

    return picture


@pytest.mark.parametrize("speed", SPEEDS)
def test_known_motion_is_read_within_the_ranges_that_the_docs_give(speed: float) -> None:
    for radius in (0.08, 0.15, 0.25):
        assert 0.7 < score(dynamic_degree, moving(disc(radius), speed)).item() / speed < 1.3, radius
    for finest in (0.1, 0.3):
        for sharpness in (4, 40):
            whole = score(dynamic_degree, moving(waves(finest, sharpness), speed)).item() / speed
            assert 0.5 < whole < 1.7, (finest, sharpness)


def test_motion_below_a_hundredth_of_the_side_reads_as_less_where_all_is_smooth() -> None:
    small, smooth = (score(dynamic_degree, moving(picture, 0.005)).item() / 0.005
                     for picture in (disc(0.08), waves(0.3, 4)))  # fmt: skip
    assert 0.5 < small < 0.7
    assert 0.1 < smooth < 0.5
    assert score(dynamic_degree, moving(disc(0.08), 0.0)).item() == 0


def test_a_still_clip_has_no_motion_however_bright_and_little_under_noise(slow: Tensor, fast: Tensor) -> None:
    frozen = still(fast)
    assert (score(dynamic_degree, frozen) == 0).all()
    brighter = frozen * 0.5 + 0.25 + 0.1 * torch.randn(3, 9, 1, 1, 1, generator=seeded(6))
    dimmed = frozen * (1 - 0.2 * torch.rand(3, 9, 1, 1, 1, generator=seeded(6)))
    assert max(pixels_a_frame(brighter).max(), pixels_a_frame(dimmed).max()) < 0.02
    assert pixels_a_frame(noisy(frozen, 0.02)).max() < 0.1
    assert pixels_a_frame(noisy(frozen, 0.05)).max() < 0.5
    assert (pixels_a_frame(noisy(slow, 0.05)) - SLOW).abs().max() < 0.3


def test_half_motion_brings_both_frames_together() -> None:
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(48.0), indexing="ij")

    def texture(shift_x: float, shift_y: float) -> Tensor:
        waves = [torch.sin((x - shift_x) / a + (y - shift_y) / b) for a, b in ((3, 7), (-5, 4), (6, -6))]
        return torch.stack(waves)[None] / 2 + 0.5

    first, second = texture(0.0, 0.0), texture(3.0, -1.4)
    motion = half_motion(first, second)[0, :, 6:-6, 6:-6]
    torch.testing.assert_close(motion[0], torch.full_like(motion[0], 1.5), atol=0.2, rtol=0)
    torch.testing.assert_close(motion[1], torch.full_like(motion[1], -0.7), atol=0.2, rtol=0)
    torch.testing.assert_close(motion.mean(dim=(1, 2)), torch.tensor([1.5, -0.7]), atol=0.03, rtol=0)
    torch.testing.assert_close(half_motion(second, first), -half_motion(first, second), atol=1e-4, rtol=0)
    moved = warped(first, torch.tensor([2.0, -1.0]).view(1, 2, 1, 1))
    torch.testing.assert_close(moved[..., 1:, :-2], first[..., :-1, 2:], atol=1e-4, rtol=0)


# -------------------------------------------------------------------------------------------- how well they go on


def test_even_motion_is_smooth_at_any_speed_and_damage_is_not(slow: Tensor, fast: Tensor) -> None:
    even = min(score(motion_smoothness, clips).min() for clips in (slow, fast, fast[:, ::2]))
    assert even > 0.998
    index = torch.arange(9)
    damaged = {
        "every second frame twice": fast[:, index // 2 * 2],
        "slow, every second frame twice": slow[:, index // 2 * 2],
        "one frame dropped": fast[:, torch.where(index == 4, 3, index)],
        "two frames exchanged": fast[:, [0, 1, 2, 4, 3, 5, 6, 7, 8]],
        **{how.__name__: how(fast, fast.roll(1, dims=0), seeded(1))[0]
           for how in (corruptions.jitter, corruptions.shuffle, corruptions.swap, corruptions.flicker)},
    }  # fmt: skip
    worst = {how: score(motion_smoothness, clips).max().item() for how, clips in damaged.items()}
    assert all(value < even - 5e-4 for value in worst.values()), (even, worst)
    torch.testing.assert_close(score(motion_smoothness, still(fast)), torch.ones(3))


def test_smoothness_blames_the_frames_that_are_damaged(fast: Tensor) -> None:
    damaged = fast.clone()
    damaged[:, 4] = damaged[:, 3]
    frames = motion_smoothness(damaged).frames
    assert frames is not None
    assert frames.shape == (3, 9)
    assert (frames[:, 3:6].amax(dim=1) < frames[:, [0, 8]].amin(dim=1)).all()


# -------------------------------------------------------------------------------------------- what can be worked out


def test_flicker_is_vbench_formula(fast: Tensor) -> None:
    whole = (fast * 255).round()
    steps = [(whole[:, t] - whole[:, t + 1]).abs().flatten(1).mean(dim=1) for t in range(8)]
    expected = (255 - torch.stack(steps).mean(dim=0)) / 255
    torch.testing.assert_close(score(flicker, whole / 255), expected)
    steady = torch.full((1, 3, 3, 4, 4), 0.5)
    steady[:, 1] += 0.2
    scores = flicker(steady)
    assert scores.clip.item() == pytest.approx(0.8)
    assert scores.frames is not None
    assert scores.frames.tolist() == [pytest.approx([0.8, 0.8, 0.8])]
    lit = corruptions.flicker(fast, fast, seeded(1))[0]
    assert (score(flicker, lit) < score(flicker, fast)).all()
    assert (score(flicker, fast) < score(flicker, still(fast))).all()  # motion counts as flicker


def test_frames_share_in_their_pairs() -> None:
    videos = torch.zeros(1, 4, 3, 2, 2)
    videos[:, 1:] = 0.4  # one step, from frame 0 to frame 1
    scores = flicker(videos)
    assert scores.frames is not None
    torch.testing.assert_close(scores.frames, torch.tensor([[0.6, 0.8, 1.0, 1.0]]))
    torch.testing.assert_close(scores.clip, torch.tensor([(0.6 + 1 + 1) / 3]))


def test_colour_measures_of_known_frames() -> None:
    colors = torch.tensor([[0.5, 0.5, 0.5], [1.0, 0.0, 0.0], [0.2, 0.4, 0.3]])
    videos = colors.view(1, 3, 3, 1, 1).expand(1, 3, 3, 4, 4).clone()
    chroma, ends, spread = saturation(videos), clipped(videos), contrast(videos)
    for scores, expected in ((chroma, [0.0, 1.0, 0.2]), (ends, [0.0, 1.0, 0.0]), (spread, [0.0, 0.0, 0.0])):
        assert scores.frames is not None
        torch.testing.assert_close(scores.frames, torch.tensor([expected]))
        torch.testing.assert_close(scores.clip, torch.tensor([sum(expected) / 3]))
    videos[..., :2] = 0.0
    videos[..., 2:] = 1.0
    assert contrast(videos).clip.item() == pytest.approx(0.5)  # half black, half white


def test_too_short_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^clips of 1 frames have no motion to measure \(at least 2 frames\)$"):
        flicker(torch.rand(1, 1, 3, 8, 8))
    with pytest.raises(UserError, match="at least 3 frames"):
        motion_smoothness(torch.rand(1, 2, 3, 8, 8))


def test_chunks_change_nothing() -> None:
    videos = torch.rand(2, 5, 3, 4, 4, generator=seeded(1)).requires_grad_()
    parts = [in_chunks(lambda a, b: (a * b).sum(dim=(1, 2, 3)), n, videos[:, 1:], videos[:, :-1]) for n in (3, 100)]
    torch.testing.assert_close(parts[0], (videos[:, 1:] * videos[:, :-1]).sum(dim=(2, 3, 4)))
    torch.testing.assert_close(*parts)


def test_shrunk_keeps_the_shape_and_the_mean() -> None:
    videos = torch.rand(1, 2, 3, 96, 256, generator=seeded(2))
    assert shrunk(videos).shape == (1, 2, 3, 48, 128)
    torch.testing.assert_close(shrunk(videos).mean(), videos.mean())
    assert torch.equal(shrunk(videos[..., :64, :64]), videos[..., :64, :64])
    flat = torch.full((1, 3, 8, 8), 0.3)
    torch.testing.assert_close(softened(flat), flat)


# ------------------------------------------------------------------------------------------------------- as rewards


def reward_of(**options: Any) -> Reward:
    cfg: RewardConfig = TypeAdapter(RewardConfig).validate_python(options)
    assert reward_folders(cfg, where="reward") == []
    return build_reward(cfg, CPU, where="reward")


REWARDS: list[dict[str, Any]] = [
    {"kind": "flicker"},
    {"kind": "motion_smoothness"},
    {"kind": "dynamic_degree"},
    {"kind": "dynamic_degree", "at_most": 0.02},
    {"kind": "saturation", "at_most": 0.3},
]


@pytest.mark.parametrize("options", REWARDS, ids=lambda options: "-".join(map(str, options.values())))
def test_rewards_have_exact_gradients_to_every_frame(options: dict[str, Any]) -> None:
    reward = reward_of(**options)
    found = self_test(reward, ClipSpec(5, 32, 40, 8.0), ["a", "b"], where="reward")
    assert found.scores.frames is not None
    found.require_loss()

    videos = render([ShapeAttributes("fast", *LOOKS[0])], ClipSpec(4, 32, 32, 8.0), seeded(3)).double()
    videos = videos * 0.8 + 0.1 + 0.01 * torch.rand(videos.shape, generator=seeded(4))
    (gradient,) = torch.autograd.grad(reward(videos.requires_grad_(), ["a"]).clip.sum(), videos)
    direction = gradient.sign() * (0.5 + torch.rand(videos.shape, generator=seeded(5)))
    with torch.no_grad():
        above, below = (reward(videos + step * direction, ["a"]).clip for step in (1e-7, -1e-7))
    slope = ((above - below) / 2e-7).item()
    assert slope > 1e-4
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-3)


def test_limits_bend_softly() -> None:
    scores = torch.tensor([0.0, 0.5, 1.0, 2.0, 9.0])
    torch.testing.assert_close(bounded(scores, 1.0), torch.tensor([0.0, 0.49933, 0.93069, 1.0, 1.0]), atol=1e-4, rtol=0)


def test_more_motion_than_wanted_is_no_better(slow: Tensor, fast: Tensor) -> None:
    reward = reward_of(kind="dynamic_degree", at_most=0.7 / 64)
    frozen, one, two = (reward(clips, ["a"] * 3).clip * 64 for clips in (still(fast), slow, fast))
    assert frozen.abs().max() < 1e-3
    assert one.min() > 0.6
    assert two.max() <= 0.7
    assert (two - one).max() < 0.1


def test_only_colours_beyond_the_limit_cost() -> None:
    colors = torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.3, 0.4], [1.0, 0.2, 0.2]])
    videos = colors.view(3, 1, 3, 1, 1).expand(3, 2, 3, 4, 4)
    scores = reward_of(kind="saturation", at_most=0.4)(videos, ["a"] * 3)
    torch.testing.assert_close(scores.clip, torch.tensor([0.0, 0.0, -0.4]), atol=1e-3, rtol=0)


def test_plan_knows_them() -> None:
    for options in REWARDS:
        reward = reward_on_meta(TypeAdapter(RewardConfig).validate_python(options), where="reward")
        scores = reward(torch.empty(2, 5, 3, 48, 64, device="meta"), ["a", "b"])
        assert scores.clip.shape == (2,)


def test_evaluation_has_them(fast: Tensor) -> None:
    with torch.no_grad():
        measures = motion_measure(fast, [])
    assert list(measures) == ["flicker", "motion_smoothness", "dynamic_degree", "saturation"]
    torch.testing.assert_close(measures["dynamic_degree"], score(dynamic_degree, fast))
