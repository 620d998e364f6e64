"""Which family a pipeline folder is of."""

from __future__ import annotations

from pathlib import Path

import torch

from rats_video.backbones.base import PipelineBackbone, check_pipeline
from rats_video.backbones.wan import WanBackbone

FAMILIES: tuple[type[PipelineBackbone], ...] = (WanBackbone,)


def load_backbone(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    with_text: bool = True,
) -> PipelineBackbone:
    """Load a pipeline folder of any family, told by its `model_index.json`; see `from_pretrained`.

    Raises:
        UserError: it is no pipeline, of no family we know, or damaged.
    """
    name = check_pipeline(folder, [name for family in FAMILIES for name in family.pipelines])
    family = next(family for family in FAMILIES if name in family.pipelines)
    return family.from_pretrained(folder, device, dtype, with_text=with_text)
