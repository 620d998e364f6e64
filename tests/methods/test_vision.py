"""The discriminator of pixels, part by part."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rats_video.methods.vision import (
    SpectralConv,
    VisionDiscriminator,
    VisionGanConfig,
    VisionHead,
    WordVisionConfig,
    augment,
    build_heads,
    largest_singular_value,
)
from rats_video.types import PromptBatch


class Colours:
    """Vision features of a test: the pixels themselves, and a prompt's length."""

    widths = (3, 3)
    text_width = 2

    def maps(self, frames: Tensor) -> tuple[Tensor, ...]:
        return frames, frames[..., ::2, ::2]

    def text(self, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([[float(len(prompt)), 1.0] for prompt in prompts])


CONFIG = VisionGanConfig(vision=WordVisionConfig(kind="word"), frames=2, halvings=0, augment=False)
BATCH = PromptBatch(0, ("a", "abc"), torch.zeros(2, 1, 1, 1, 1), 4, seeds=(5, 6))


def test_a_weight_is_divided_by_its_largest_singular_value() -> None:
    matrix = torch.diag(torch.tensor([3.0, 1.0, 0.5])).requires_grad_()
    value = largest_singular_value(matrix)
    assert value.item() == pytest.approx(3.0, abs=1e-5)
    (slope,) = torch.autograd.grad(value, matrix)  # u v^T
    torch.testing.assert_close(slope, torch.diag(torch.tensor([1.0, 0.0, 0.0])), atol=1e-3, rtol=0)
    conv = SpectralConv(2, 2, 1)
    with torch.no_grad():
        conv.weight.copy_(torch.diag(torch.tensor([4.0, 2.0]))[:, :, None, None])
        conv.bias.zero_()  # type: ignore[union-attr]  # it has one
    torch.testing.assert_close(conv(torch.ones(1, 2, 1, 1)).flatten(), torch.tensor([1.0, 0.5]), atol=1e-4, rtol=0)


def test_a_heads_logit_by_hand() -> None:
    head, (here, there, text) = VisionHead(3, 2, 0), torch.randn(3, 2, 3, 4, 4).unbind()
    text = text[:, :2, 0, 0]
    found = head(here, text, there)
    wanted = head.text(text)[:, :, None, None] + head.real(there)
    torch.testing.assert_close(found, (head.judged(here) * wanted).sum(dim=1).flatten(1) / 8)  # of 64 channels
    assert found.shape == (2, 16)
    assert VisionHead(3, 2, 3)(here, text, there).shape == (2, 1)  # 4 x 4, halved three times


def test_the_hinge_loss_by_hand() -> None:
    student, real = torch.tensor([[0.5, -2.0], [3.0, 0.0]]), torch.tensor([[2.0, 0.5], [-1.0, 1.0]])
    loss = VisionDiscriminator.discriminator_loss(student, real)
    assert loss.tolist() == [(1.5 + 0) / 2 + (0 + 0.5) / 2, (4 + 1) / 2 + (2 + 0) / 2]
    assert VisionDiscriminator.generator_loss(student).tolist() == [0.75, -1.5]


def test_a_clips_logits_are_its_own_frames() -> None:
    judge = VisionDiscriminator(Colours(), build_heads(Colours(), CONFIG, 3), CONFIG)
    clips, real = torch.rand(2, 2, 5, 3, 8, 8).unbind()
    videos, real = judge.seen(clips), judge.seen(real)
    torch.testing.assert_close(videos, clips[:, [0, 4]])
    assert judge.seen(clips[:, :1]).shape[1] == 1  # of images one
    found = judge(videos, real, BATCH, 0)
    assert found.shape == (2, 2 * (64 + 16))  # of two frames, each seen by two heads
    for row in range(2):
        one = PromptBatch(0, BATCH.prompts[row : row + 1], BATCH.noise[:1], 4, seeds=BATCH.seeds[row : row + 1])
        torch.testing.assert_close(judge(videos[row : row + 1], real[row : row + 1], one, 0)[0], found[row])
    again = build_heads(Colours(), CONFIG, 3).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in judge.heads.state_dict().items())


def test_augmentation_by_hand() -> None:
    half = torch.tensor([0.5])
    videos = torch.linspace(0.1, 0.9, 3 * 64).view(1, 1, 3, 8, 8)
    middle = augment(videos, [half] * 7)  # no other colour, no shift; the hole in the middle
    rows = torch.arange(8)
    hole = ((rows - 4).abs() < 2)[:, None] & ((rows - 4).abs() < 2)
    torch.testing.assert_close(middle, torch.where(hole, 0.5, videos))
    corner = [half] * 5 + [torch.tensor([10.0])] * 2  # out of sight
    bright = augment(videos, [torch.tensor([0.7]), *corner[1:]])
    torch.testing.assert_close(bright, videos + 0.1)
    grey = augment(videos, [half, torch.tensor([0.0]), *corner[2:]])
    torch.testing.assert_close(grey, videos.mean(dim=2, keepdim=True).expand_as(videos))
    flat = augment(videos, [half, half, torch.tensor([0.0]), *corner[3:]])
    torch.testing.assert_close(flat, (videos + videos.mean()) / 2)
    shifted = augment(videos, [half, half, half, torch.tensor([0.999]), half, *corner[5:]])
    torch.testing.assert_close(shifted[..., :-1, :], videos[..., 1:, :])
    assert shifted[..., -1, :].unique().tolist() == [0.5]


def test_each_prompt_is_augmented_by_its_own_seed() -> None:
    judge = VisionDiscriminator(
        Colours(), build_heads(Colours(), CONFIG, 3), CONFIG.model_copy(update={"augment": True})
    )
    video = torch.rand(1, 2, 3, 8, 8).expand(2, -1, -1, -1, -1)
    alike = PromptBatch(0, ("a", "a"), torch.zeros(2, 1, 1, 1, 1), 4, seeds=(5, 6))
    one, other = judge(video, video, alike, 0)
    assert not torch.allclose(one, other)
    torch.testing.assert_close(judge(video, video, alike, 0)[0], one)
    assert not math.isclose(judge(video, video, alike, 1)[0, 0].item(), one[0].item())
