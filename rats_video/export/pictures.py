"""The pictures that an image-to-video student's export is checked with, and the one that its card's code opens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rats_video.backbones.base import PipelineBackbone
from rats_video.inference.student import StudentCard
from rats_video.inference.video import to_picture, write_png
from rats_video.types import ClipSpec, FirstFrames

EXAMPLE, LAST_EXAMPLE = "picture.png", "last_picture.png"  # beside the card


@dataclass(frozen=True)
class ExportPictures:
    """Pictures `[3, height, width]` in [0, 1], on the CPU, in steps of a 255th.

    Args:
        first: N, that the compared clips start from.
        last: N, that they end at; None where they end at none.
        example: for others; a user's own pictures stay with the user.
    """

    first: Tensor
    last: Tensor | None
    example: Tensor

    def call(self, index: int) -> dict[str, Any]:
        """Arguments of the stock pipeline's call for a clip."""
        last = {} if self.last is None else {"last_image": to_picture(self.last[index])}
        return {"image": to_picture(self.first[index])} | last

    def save(self, place: str) -> None:
        """Write the pictures that the card's code opens; `place` stands before their names."""
        write_png(self.example, Path(place + EXAMPLE))
        if self.last is not None:
            write_png(self.example.flip(-1), Path(place + LAST_EXAMPLE))


def starts_from_pictures(student: PipelineBackbone, card: StudentCard) -> bool:
    """True if an export is for image to video."""
    return student.pictures == "needed" or card.first_frame


def plain_picture(clip: ClipSpec) -> Tensor:
    """Two gradients: nobody's picture."""
    rows, columns = torch.linspace(0, 1, clip.height)[:, None], torch.linspace(0, 1, clip.width)[None]
    return torch.stack([rows.expand(-1, clip.width), columns.expand(clip.height, -1), (rows + columns) / 2])


def plain_pictures(student: PipelineBackbone, clip: ClipSpec) -> FirstFrames:
    """The plain picture for every clip, and its mirror image for the last one where the model needs one."""

    def draw(prompts: Any, _: Any) -> tuple[Tensor, Tensor | None]:
        first = plain_picture(clip).expand(len(prompts), -1, -1, -1).to(student.device)
        return first, first.flip(-1) if student.needs_last_picture else None

    return draw


def in_eight_bits(draw: FirstFrames) -> FirstFrames:
    """The same pictures as a file holds them."""

    def rounded(pictures: Tensor) -> Tensor:
        return (pictures.clamp(0, 1) * 255).round() / 255

    def drawn(prompts: Any, seeds: Any) -> tuple[Tensor, Tensor | None]:
        first, last = draw(prompts, seeds)
        return rounded(first), None if last is None else rounded(last)

    return drawn
