"""Which family a pipeline folder is of."""

from __future__ import annotations

from pathlib import Path

import torch

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.cogvideox import CogVideoXBackbone
from rats_video.backbones.folder import read_index
from rats_video.backbones.hunyuan import HunyuanVideoBackbone
from rats_video.backbones.ltx import LTXBackbone
from rats_video.backbones.wan import WanBackbone
from rats_video.backbones.wan_paths import PATH_ENCODER, PathWanBackbone

FAMILIES: tuple[type[PipelineBackbone], ...] = (WanBackbone, LTXBackbone, HunyuanVideoBackbone, CogVideoXBackbone)


def find_family(folder: Path) -> type[PipelineBackbone]:
    """The family of a pipeline folder, told by its `model_index.json`.

    Raises:
        UserError: it is no pipeline, or of no family we know.
    """
    index = read_index(folder, [name for family in FAMILIES for name in family.pipelines])
    if index.get(PATH_ENCODER):  # stock diffusers loads such a folder as well, and leaves the paths out
        return PathWanBackbone
    return next(family for family in FAMILIES if index["_class_name"] in family.pipelines)


def load_backbone(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    with_text: bool = True,
    with_denoiser: bool = True,
) -> PipelineBackbone:
    """Load a pipeline folder of any family; see `from_pretrained`.

    Raises:
        UserError: it is no pipeline, of no family we know, or damaged.
    """
    family = find_family(folder)
    return family.from_pretrained(folder, device, dtype, with_text=with_text, with_denoiser=with_denoiser)
