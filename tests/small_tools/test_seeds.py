"""Counter-based randomness."""

from __future__ import annotations

import itertools

import torch

from rats_video.seeds import seeded


def draw(*counters: int) -> float:
    return torch.rand((), generator=seeded(*counters)).item()


def test_same_counters_same_numbers() -> None:
    assert draw(1, 2, 3) == draw(1, 2, 3)


def test_each_counter_and_their_order_matter() -> None:
    counters = [*itertools.product(range(4), repeat=2), (1,), (1, 2, 3), (12,), (1, 23), (12, 3), (0, 0, 0)]
    assert len({draw(*each) for each in counters}) == len(counters)


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    draw(7)
    assert torch.rand(()) == expected


def test_known_answer() -> None:
    assert seeded(0, 1, 2).initial_seed() == 5458876493991123480  # results must not change between machines
