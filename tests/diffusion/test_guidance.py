"""Classifier-free guidance: the formula, one batched call, prompts of unequal length."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rats_video.condition import Condition
from rats_video.diffusion.guidance import guided

LATENTS = torch.zeros(2, 1, 1, 1, 1)
SIGMA = torch.tensor([0.5, 0.5])


def text(*lengths: int, value: float) -> Condition:
    return Condition(torch.full((len(lengths), max(lengths), 2), value))


class Spy:
    """Returns the mean of the first text row and remembers what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        self.calls.append((latents, sigma, condition.embeds))
        return condition.embeds[:, 0].mean(dim=1).view(-1, 1, 1, 1, 1).expand_as(latents)


@pytest.mark.parametrize(("scale", "expected"), [(3.0, 4.0), (1.0, 2.0), (0.0, 1.0), (7.5, 8.5)])
def test_formula(scale: float, expected: float) -> None:
    velocity = guided(Spy(), text(2, value=1.0), scale)
    assert velocity(LATENTS, SIGMA, text(2, 2, value=2.0)).flatten().tolist() == [expected] * 2


@pytest.mark.parametrize(("prompt_length", "negative_length"), [(5, 2), (2, 5), (3, 3)])
def test_the_shorter_text_is_padded_with_zero_rows(prompt_length: int, negative_length: int) -> None:
    spy = Spy()
    guided(spy, text(negative_length, value=1.0), 3.0)(LATENTS, SIGMA, text(prompt_length, prompt_length, value=2.0))
    (latents, sigma, embeds) = spy.calls[0]
    assert len(spy.calls) == 1
    assert (len(latents), sigma.tolist(), embeds.shape) == (4, [0.5] * 4, (4, max(prompt_length, negative_length), 2))
    rows = [embeds[i, :, 0].count_nonzero().item() for i in range(4)]
    assert rows == [prompt_length] * 2 + [negative_length] * 2
    assert embeds[:, 0, 0].tolist() == [2.0, 2.0, 1.0, 1.0]  # prompts first
