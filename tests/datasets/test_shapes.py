"""The synthetic clips: a fixed split, captions that read back, and geometry that is what it says."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import astuple

import pytest
import torch

from rats_video.datasets.shapes.render import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    NUM_HELDOUT,
    RADIUS,
    SHAPES,
    SHAPES_CLIP,
    SPEEDS,
    VOCABULARY,
    WORDS,
    ShapeAttributes,
    parse_prompt,
    render,
    split_combinations,
)
from rats_video.errors import UserError
from rats_video.types import ClipSpec


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def all_combinations() -> list[ShapeAttributes]:
    return [ShapeAttributes(*words) for words in itertools.product(*WORDS.values())]


def coverage_of(videos: torch.Tensor, attributes: list[ShapeAttributes]) -> torch.Tensor:
    """Undo the blend of object and background: `[B, T, height, width]`."""
    color = torch.tensor([COLORS[a.color] for a in attributes])[:, None, :, None, None]
    background = torch.tensor([BACKGROUNDS[a.background] for a in attributes])[:, None, :, None, None]
    span = color - background
    return ((videos - background) * span).sum(2) / span.square().sum(2)


def centroids_of(coverage: torch.Tensor) -> torch.Tensor:
    """`[B, T, 2]` (x, y) in pixels."""
    x, y = torch.arange(coverage.shape[-1]) + 0.5, torch.arange(coverage.shape[-2]) + 0.5
    moments = torch.stack([coverage.sum(-2) @ x, coverage.sum(-1) @ y], -1)
    return moments / coverage.sum((-2, -1))[..., None]


SAMPLE = all_combinations()[::7]  # 62 combinations; 7 divides no word count, so every word occurs


@pytest.fixture(scope="module")
def videos() -> torch.Tensor:
    return render(SAMPLE, SHAPES_CLIP, seeded())


def test_split_is_whole_disjoint_and_fixed() -> None:
    train, heldout = split_combinations()
    assert len(heldout) == NUM_HELDOUT == 64
    assert len(train) == 368
    assert set(train) | set(heldout) == set(all_combinations())
    assert not set(train) & set(heldout)
    digest = hashlib.sha256("\n".join(a.prompt for a in train + heldout).encode()).hexdigest()
    assert digest == "60f3d55e06eed2b721e0138110134bd168ed2f56e963afc32902b419aaa4450d"


@pytest.mark.parametrize("side", [0, 1], ids=["train", "heldout"])
def test_every_word_occurs_on_both_sides(side: int) -> None:
    seen = {word for attributes in split_combinations()[side] for word in astuple(attributes)}
    assert seen == set(itertools.chain.from_iterable(WORDS.values()))


def test_words_name_every_choice_once() -> None:
    assert tuple(WORDS) == ATTRIBUTES
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    assert {word for a in all_combinations() for word in a.prompt.split()} == set(VOCABULARY)


def test_every_caption_reads_back() -> None:
    for attributes in all_combinations():
        assert parse_prompt(attributes.prompt) == attributes
    assert parse_prompt("A Fast RED circle  moving left on a gray background") == ShapeAttributes(
        "fast", "red", "circle", "left", "gray"
    )


@pytest.mark.parametrize(
    "junk",
    [
        "",
        "a cat",
        "a fast red circle moving left on a gray",
        "a red fast circle moving left on a gray background",
        "a fast red blue circle moving left on a gray background",
        "a fast orange circle moving left on a gray background",
        "a fast red circle moving left on a gray background please",
        "a fast red circle moving left, on a gray background",
    ],
)
def test_junk_is_no_caption(junk: str) -> None:
    with pytest.raises(UserError, match="not a caption"):
        parse_prompt(junk)


def test_pixels_are_in_range_and_blend_two_colours(videos: torch.Tensor) -> None:
    assert videos.shape == (len(SAMPLE), 17, 3, 64, 64)
    assert videos.dtype == torch.float32
    assert videos.min() >= 0
    assert videos.max() <= 1
    coverage = coverage_of(videos, SAMPLE)
    assert coverage.min() > -1e-5
    assert coverage.amax((-2, -1)).sub(1).abs().max() < 1e-5  # the core has the colour of the caption


def test_border_is_pure_background(videos: torch.Tensor) -> None:
    border = coverage_of(videos, SAMPLE)
    border[..., 1:-1, 1:-1] = 0
    assert border.abs().max() < 1e-5


def test_areas_are_analytic(videos: torch.Tensor) -> None:
    coverage = coverage_of(videos, SAMPLE)
    area = coverage.sum((-2, -1))  # [B, T]
    unit_areas = {"circle": torch.pi, "square": (2 * 0.89) ** 2, "triangle": 27**0.5 * 0.6**2}
    for shape in SHAPES:
        of_shape = area[[a.shape == shape for a in SAMPLE]]
        radius = (of_shape / unit_areas[shape]).sqrt()
        assert radius.min() > RADIUS[0] * 0.99
        assert radius.max() < RADIUS[1] * 1.01
        assert radius.std(0).min() > 0.2  # sizes differ between clips ...
        assert radius.std(1).max() < 0.05  # ... and hold within one
    circles = coverage[[a.shape == "circle" for a in SAMPLE]]
    diameter = circles.sum(-1).amax(-1)  # of the row through the centre
    assert torch.allclose(circles.sum((-2, -1)), torch.pi * diameter.square() / 4, rtol=0.015)


def test_motion_is_uniform_at_the_speed_and_direction_of_the_caption(videos: torch.Tensor) -> None:
    centroid = centroids_of(coverage_of(videos, SAMPLE))
    assert centroid.diff(n=2, dim=1).abs().max() < 0.08  # pixels: anti-aliasing rounds the tip of the triangle
    velocity = (centroid[:, -1] - centroid[:, 0]) / 16
    for v, attributes in zip(velocity, SAMPLE, strict=True):
        towards = torch.tensor(DIRECTIONS[attributes.direction])
        slowest, fastest = SPEEDS[attributes.speed]
        assert slowest - 0.01 < v @ towards < fastest + 0.01
        assert (v - (v @ towards) * towards).abs().max() < 0.01


def test_seed_decides_the_clip() -> None:
    first, again, other = (render(SAMPLE[:4], SHAPES_CLIP, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_lengths_scale_with_the_clip() -> None:
    small = ClipSpec(num_frames=9, height=32, width=48, fps=8.0)
    circles = [a for a in SAMPLE if a.shape == "circle"]
    coverage = coverage_of(render(circles, small, seeded()), circles)
    radius = (coverage.sum((-2, -1)) / torch.pi).sqrt()
    assert RADIUS[0] / 2 * 0.98 < radius.min() < radius.max() < RADIUS[1] / 2 * 1.02
    speed = (centroids_of(coverage).diff(dim=1)).norm(dim=-1)
    slowest, fastest = SPEEDS["slow"][0] / 2, SPEEDS["fast"][1] / 2
    assert slowest - 0.06 < speed.min() < speed.max() < fastest + 0.06
