"""What is still known of a student once its memory is freed: all that checking and describing an export takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rats_video.assets import HUB, is_embedded
from rats_video.export.recipe import StockCall
from rats_video.inference.student import StudentCard


@dataclass(frozen=True)
class ExportedStudent:
    """An exported student.

    Args:
        card: how it must be sampled.
        base: folder of its base pipeline.
        pipeline: class of that pipeline.
        networks: class of each denoising part.
        recipe: the stock pipeline's call.
        sigmas: noise levels by number of steps.
        is_lora: whether it is an adapter on the base.
        prompts: N prompts of the clips that follow.
        noises: `[1, C, F, H, W]` each, on the CPU.
        videos: `[N, T, 3, height, width]` in [0, 1], our sampler's, on the CPU; None where nothing is checked.
    """

    card: StudentCard
    base: Path
    pipeline: str
    networks: Mapping[str, str]
    recipe: StockCall
    sigmas: Mapping[int, tuple[float, ...]]
    is_lora: bool
    prompts: tuple[str, ...]
    noises: tuple[Tensor, ...]
    videos: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the denoiser."""
        dtype: torch.dtype = getattr(torch, self.card.dtype)
        return dtype


def base_id(model: str) -> str:
    """The base's name for others: its repository on the hub where its folder is called so, never a path of ours."""
    name = Path(model).name
    return next((repository for repository in HUB if repository.rpartition("/")[2] == name), name)


def base_source(model: str) -> tuple[str, str]:
    """Python of the base's place in a snippet: a line of import, if it takes one, and an expression."""
    if is_embedded(model):
        return "from rats_video.assets import ASSETS\n", f"ASSETS / {model!r}"
    name = base_id(model)
    return "", repr(name if "/" in name else model)
