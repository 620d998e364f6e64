"""The pictures that a run's clips start from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rats_video.backbones.base import PipelineBackbone
from rats_video.datasets.prompts.settings import ShapesPromptsConfig
from rats_video.datasets.shapes.render import parse_prompt, render
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.seeds import seeded
from rats_video.types import FirstFrames

WHERE = "prompts.first_frame"


def check_family(cfg: DistillConfig, family: type[PipelineBackbone]) -> None:
    """Refuse a family whose videos always start from a picture where the run has none; raises UserError."""
    if family.needs_picture and not starts_from_pictures(cfg):
        raise UserError(
            f"is a {family.pipelines[0]}, and this run's prompts have no pictures", where="model",
            fix="give a text-to-video model; `rats-video sample --image` takes this one",
        )  # fmt: skip


def starts_from_pictures(cfg: DistillConfig) -> bool:
    """True if the run's clips start from pictures."""
    return isinstance(cfg.prompts, ShapesPromptsConfig) and cfg.prompts.first_frame


def first_frames(cfg: DistillConfig, backbone: PipelineBackbone) -> FirstFrames | None:
    """Where the run's pictures come from; None if its clips are made from text alone.

    Raises:
        UserError: the model takes no picture.
    """
    if not starts_from_pictures(cfg):
        return None
    if backbone.pictures == "none":
        raise UserError(
            f"this {backbone.family} makes {backbone.makes}s from text alone", where=WHERE, fix="set it to false"
        )
    clip = cfg.clip.spec

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """The first frame of a clip that shows the prompt and stays in view, another one a seed."""
        frames = [
            render([parse_prompt(prompt)], clip, seeded(seed))[:, 0]
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return torch.cat(frames).to(backbone.device)

    return draw
