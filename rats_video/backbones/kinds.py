"""The families of models, listed once, and the one that loads a pipeline folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.cogvideox import CogVideoXBackbone
from rats_video.backbones.cogvideox_i2v import CogVideoXImageBackbone
from rats_video.backbones.custom import CustomBackboneConfig
from rats_video.backbones.flux import FluxBackbone
from rats_video.backbones.flux2 import Flux2KleinBackbone
from rats_video.backbones.folder import read_index
from rats_video.backbones.hunyuan import HunyuanVideoBackbone
from rats_video.backbones.ltx import LTXBackbone
from rats_video.backbones.ltx2 import LTX2Backbone
from rats_video.backbones.qwen_image import QwenImageBackbone
from rats_video.backbones.sd3 import StableDiffusion3Backbone
from rats_video.backbones.wan import WanBackbone
from rats_video.backbones.wan_i2v import WanImageBackbone
from rats_video.backbones.wan_paths import PathWanBackbone
from rats_video.config.fields import Config
from rats_video.errors import UserError

FAMILIES: tuple[type[PipelineBackbone], ...] = (
    PathWanBackbone,  # before Wan, which loads its folders as well
    WanImageBackbone,
    WanBackbone,
    LTXBackbone,
    LTX2Backbone,
    HunyuanVideoBackbone,
    CogVideoXImageBackbone,
    CogVideoXBackbone,
    FluxBackbone,
    StableDiffusion3Backbone,
    QwenImageBackbone,
    Flux2KleinBackbone,
)


class AutoBackboneConfig(Config):
    """The family that knows the networks in the folder."""

    kind: Literal["auto"] = "auto"

    def families(self) -> Sequence[type[PipelineBackbone]]:
        """The families to choose from."""
        return FAMILIES

    def sources(self) -> list[Path]:
        """Files of code that is not ours: none."""
        return []


BackboneConfig = Annotated[AutoBackboneConfig | CustomBackboneConfig, Field(discriminator="kind")]
AUTO = AutoBackboneConfig()


def find_family(folder: Path, backbone: BackboneConfig = AUTO) -> type[PipelineBackbone]:
    """The family of a pipeline folder, told by its `model_index.json`.

    Raises:
        UserError: it is no pipeline, or of no family we know; or the user's own cannot be imported.
    """
    return family_of(read_index(folder), backbone.families(), where=str(folder))


def family_of(
    index: Mapping[str, Any], families: Sequence[type[PipelineBackbone]], *, where: str
) -> type[PipelineBackbone]:
    """The first family that loads the folder of this `model_index.json`.

    Raises:
        UserError: none does.
    """
    for family in families:
        if family.knows(index):
            return family
    known = dict.fromkeys(name for family in families for name in family.pipelines)
    raise UserError(f"is a {index['_class_name']}", where=where, fix=f"give one of: {', '.join(known)}")


def load_backbone(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backbone: BackboneConfig = AUTO,
    *,
    with_text: bool = True,
    with_denoiser: bool = True,
    quantization: str = "none",
) -> PipelineBackbone:
    """Load a pipeline folder of any family; see `from_pretrained`.

    Raises:
        UserError: it is no pipeline, of no family we know, or damaged.
    """
    family = find_family(folder, backbone)
    return family.from_pretrained(
        folder, device, dtype, with_text=with_text, with_denoiser=with_denoiser, quantization=quantization
    )
