"""The ruler reads 1 on rendered clips, 0 on exactly what is wrong, and stays put under what does not matter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rats_video.datasets.shapes.measure import ShapeMeasures, measure_shapes, read_shapes, read_words
from rats_video.datasets.shapes.render import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLORS,
    SHAPES_CLIP,
    WORDS,
    ShapeAttributes,
    render,
)
from rats_video.errors import UserError

SAMPLE = [ShapeAttributes(*words) for words in itertools.product(*WORDS.values())][::7]  # 62, with every word
PROMPTS = [a.prompt for a in SAMPLE]
GRAY = torch.tensor(BACKGROUNDS["gray"])[:, None, None]


def drawn(attributes: list[ShapeAttributes]) -> Tensor:
    """Equal seeds give equal starts, speeds and sizes, whatever the words."""
    return render(attributes, SHAPES_CLIP, torch.Generator().manual_seed(0))


def altered(name: str, step: int = 1) -> list[ShapeAttributes]:
    """SAMPLE with one attribute moved on to another of its words."""
    words = WORDS[name]
    return [replace(a, **{name: words[(words.index(getattr(a, name)) + step) % len(words)]}) for a in SAMPLE]


def background_of(attributes: list[ShapeAttributes]) -> Tensor:
    return torch.tensor([BACKGROUNDS[a.background] for a in attributes])[:, None, :, None, None]


def noise_like(videos: Tensor, sigma: float) -> Tensor:
    return sigma * torch.randn(videos.shape, generator=torch.Generator().manual_seed(1))


def blurred(videos: Tensor, sigma: float) -> Tensor:
    offsets = torch.arange(-4, 5)
    kernel = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    frames = torch.nn.functional.pad(videos.flatten(0, 2)[:, None], (4, 4, 4, 4), mode="replicate")
    across = torch.nn.functional.conv2d(frames, kernel[None, None, None])
    return torch.nn.functional.conv2d(across, kernel[None, None, :, None]).view_as(videos)


def square_clip(path: list[tuple[int, int]], side: int = 16) -> Tensor:
    """One red square on gray whose top left corner follows `path`, without any anti-aliasing: `[1, T, 3, 64, 64]`."""
    clip = GRAY.expand(len(path), 3, 64, 64).clone()
    for frame, (x, y) in zip(clip, path, strict=True):
        frame[:, y : y + side, x : x + side] = torch.tensor(COLORS["red"])[:, None, None]
    return clip[None]


def scores(measures: ShapeMeasures) -> dict[str, float]:
    return {name: hits.mean().item() for name, hits in measures.attributes.items()}


@pytest.fixture(scope="module")
def videos() -> Tensor:
    return drawn(SAMPLE)


@pytest.fixture(scope="module")
def truth(videos: Tensor) -> ShapeMeasures:
    return measure_shapes(videos, PROMPTS)


def test_rendered_clips_show_their_prompts(truth: ShapeMeasures) -> None:
    assert scores(truth) == dict.fromkeys(ATTRIBUTES, 1.0)
    assert torch.equal(truth.adherence, torch.ones(len(SAMPLE)))
    assert truth.smoothness.mean() > 0.98
    assert truth.smoothness.min() > 0.96
    assert truth.constancy.mean() > 0.97
    assert truth.constancy.min() > 0.93


def test_readings_are_the_words_of_the_caption(videos: Tensor) -> None:
    assert read_words(videos[:8]) == [{name: getattr(a, name) for name in ATTRIBUTES} for a in SAMPLE[:8]]
    words = read_shapes(videos[:8]).words
    assert tuple(words) == ATTRIBUTES
    assert words["color"].tolist() == [WORDS["color"].index(a.color) for a in SAMPLE[:8]]


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_one_wrong_attribute_costs_exactly_that_one(name: str) -> None:
    measures = measure_shapes(drawn(altered(name)), PROMPTS)
    assert scores(measures) == {other: float(other != name) for other in ATTRIBUTES}
    assert torch.allclose(measures.adherence, torch.full((len(SAMPLE),), 0.8))


def ghosted(videos: Tensor) -> Tensor:
    return torch.cat([videos[:, :1], 0.7 * videos[:, 1:] + 0.3 * videos[:, :-1]], 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda videos: videos + noise_like(videos, 0.03),
        lambda videos: blurred(videos, 1.5),
        lambda videos: videos + torch.tensor([0.05, -0.05, 0.05])[:, None, None],
        ghosted,
        lambda videos: blurred(ghosted(videos), 1.0) - 0.05 + noise_like(videos, 0.03),
    ],
    ids=["noise", "blur", "off-colour", "ghost", "all"],
)
def test_mild_damage_changes_little(videos: Tensor, damage: Callable[[Tensor], Tensor]) -> None:
    measures = measure_shapes(damage(videos).clamp(0, 1), PROMPTS)
    assert measures.adherence.mean() >= 0.98
    assert min(scores(measures).values()) >= 0.95


def test_reversed_clips_move_the_wrong_way(videos: Tensor) -> None:
    assert scores(measure_shapes(videos.flip(1), PROMPTS)) == {name: float(name != "direction") for name in ATTRIBUTES}


def test_frozen_and_shuffled_clips_do_not_move(videos: Tensor) -> None:
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    for still in (videos[:, :1].expand_as(videos), videos[:, order]):
        got = scores(measure_shapes(still, PROMPTS))
        assert got == {name: float(name not in ("speed", "direction")) for name in ATTRIBUTES}


@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0])
def test_noise_shows_no_object(sigma: float) -> None:
    clips = (GRAY + noise_like(torch.zeros(4, 17, 3, 64, 64), sigma)).clamp(0, 1)
    for words in read_words(clips):
        assert words == dict.fromkeys(ATTRIBUTES) | {"background": "gray" if sigma == 0.1 else None}


def test_empty_clips_show_a_background_at_most() -> None:
    for name, rgb in BACKGROUNDS.items():
        plain = torch.tensor(rgb)[:, None, None].expand(1, 17, 3, 64, 64)
        assert read_words(plain) == [dict.fromkeys(ATTRIBUTES) | {"background": name}]
    pink = torch.tensor([0.95, 0.5, 0.7])[:, None, None].expand(1, 17, 3, 64, 64)
    assert read_words(pink) == [dict.fromkeys(ATTRIBUTES)]
    readings = read_shapes(pink)
    assert readings.smoothness.tolist() == readings.constancy.tolist() == [0.0]


@pytest.mark.parametrize(
    ("step", "speed", "direction"),
    [
        ((0, 0), None, None),
        ((1, 0), "slow", "right"),
        ((2, 0), "fast", "right"),
        ((-2, 0), "fast", "left"),
        ((0, -1), "slow", "up"),
        ((0, 1), "slow", "down"),
        ((4, 0), None, "right"),
        ((1, 1), "fast", None),
    ],
)
def test_motion_is_measured_in_pixels_a_frame(step: tuple[int, int], speed: str | None, direction: str | None) -> None:
    path = [(24 + step[0] * t, 24 + step[1] * t) for t in range(-4, 5)]
    [words] = read_words(square_clip(path))
    assert words == {"speed": speed, "color": "red", "shape": "square", "direction": direction, "background": "gray"}


def test_a_path_that_stops_or_turns_is_no_motion() -> None:
    stops = [(8 + min(2 * t, 16), 24) for t in range(17)]
    turns = [(8 + 2 * min(t, 16 - t), 24) for t in range(17)]
    for path in (stops, turns):
        [words] = read_words(square_clip(path))
        assert (words["speed"], words["direction"], words["shape"]) == (None, None, "square")


@pytest.mark.parametrize("side", [4, 44])
def test_a_speck_or_a_wall_is_no_object(side: int) -> None:
    [words] = read_words(square_clip([(2 + t, 10) for t in range(17)], side=side))
    assert words == dict.fromkeys(ATTRIBUTES) | {"background": "gray"}


def test_two_objects_are_no_shape(videos: Tensor) -> None:
    background = background_of(SAMPLE)
    measures = measure_shapes(background + (videos - background) + (videos.roll(32, -2) - background), PROMPTS)
    assert measures.attributes["shape"].sum() == 0
    assert measures.attributes["color"].mean() == 1


@pytest.mark.parametrize("name", ["shape", "color", "background"])
def test_a_word_that_changes_halfway_is_no_word(videos: Tensor, truth: ShapeMeasures, name: str) -> None:
    swapped = torch.cat([videos[:, :8], drawn(altered(name))[:, 8:]], 1)
    measures = measure_shapes(swapped, PROMPTS)
    assert measures.attributes[name].sum() == 0
    assert name == "background" or (measures.constancy < truth.constancy - 0.15).all()


def test_two_frames_may_fail_but_not_four(videos: Tensor, truth: ShapeMeasures) -> None:
    for num_gone in (2, 4):
        gone = videos.clone()
        gone[:, 6 : 6 + num_gone] = background_of(SAMPLE)
        measures = measure_shapes(gone, PROMPTS)
        assert measures.adherence.tolist() == pytest.approx([1.0 if num_gone == 2 else 0.2] * len(SAMPLE))
        # One frame gone costs itself in constancy, and its neighbours too in smoothness.
        kept = truth.constancy.mean().item() * (17 - num_gone) / 17
        assert measures.constancy.mean() == pytest.approx(kept, abs=0.02)
        assert measures.smoothness.mean() == pytest.approx((15 - num_gone - 2) / 15, abs=0.02)


def test_flicker_costs_smoothness_by_its_formula() -> None:
    clip = square_clip([(8 + t, 24) for t in range(17)])
    clip[:, ::2] += 0.05
    readings = read_shapes(clip)
    assert readings.smoothness.item() == pytest.approx(math.exp(-0.05 / 0.1), abs=0.01)
    assert readings.words["speed"].tolist() == [WORDS["speed"].index("slow")]


def test_jitter_costs_smoothness_by_its_formula_and_no_constancy() -> None:
    clip = square_clip([(8 + t, 24 + t % 2) for t in range(17)])  # second differences of 2 pixels
    readings = read_shapes(clip)
    assert readings.smoothness.item() == pytest.approx(math.exp(-2 / 1), abs=0.01)
    assert readings.constancy.item() == pytest.approx(1.0, abs=0.001)
    assert read_words(clip)[0]["direction"] == "right"


def test_pulsing_size_costs_constancy() -> None:
    sides = [16 if t < 9 else 20 for t in range(17)]
    clip = torch.cat([square_clip([(8 + t, 24)], side) for t, side in enumerate(sides)], 1)
    kept = (9 + 8 * math.exp(-2 * math.log(20 / 16) / 0.25)) / 17
    assert read_shapes(clip).constancy.item() == pytest.approx(kept, abs=0.01)


def test_splitting_a_batch_changes_nothing(videos: Tensor, truth: ShapeMeasures) -> None:
    parts = [measure_shapes(videos[i : i + 5], PROMPTS[i : i + 5]) for i in range(0, 20, 5)]
    for field in ("adherence", "smoothness", "constancy"):
        assert torch.allclose(torch.cat([getattr(p, field) for p in parts]), getattr(truth, field)[:20], atol=1e-5)


def test_readings_carry_no_gradient_and_leave_the_clip_alone(videos: Tensor) -> None:
    clip = videos[:2].clone().requires_grad_()
    assert not read_shapes(clip).smoothness.requires_grad
    assert torch.equal(clip, videos[:2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_reads_the_same(videos: Tensor, truth: ShapeMeasures) -> None:
    measures = measure_shapes(videos.cuda(), PROMPTS)
    assert measures.adherence.is_cuda
    assert measures.adherence.mean() == 1
    assert torch.allclose(measures.smoothness.cpu(), truth.smoothness, atol=1e-3)


def test_a_prompt_that_is_no_caption_is_the_users_error(videos: Tensor) -> None:
    with pytest.raises(UserError, match="not a caption"):
        measure_shapes(videos[:1], ["a cat"])
