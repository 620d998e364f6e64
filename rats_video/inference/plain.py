"""A pipeline folder that nobody distilled, sampled as its stock pipeline would by default."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rats_video.backbones.family import DENOISER
from rats_video.backbones.folder import read_index
from rats_video.backbones.kinds import FAMILIES, family_of
from rats_video.errors import UserError
from rats_video.inference.student import ITSELF, StudentCard
from rats_video.reading import DAMAGED, read_json

INDEX = "model_index.json"


def plain_card(folder: Path, dtype: Literal["float32", "bfloat16"]) -> StudentCard:
    """The card that a pipeline would have: its class's own defaults of steps, guidance and size.

    Raises:
        UserError: it is no pipeline of a family we know.
    """
    import diffusers

    index = read_index(folder)
    family = family_of(index, FAMILIES, where=str(folder))
    kind = getattr(diffusers, index["_class_name"], None) or getattr(diffusers, family.pipelines[0])
    defaults = {name: option.default for name, option in inspect.signature(kind.__call__).parameters.items()}
    size = {key: defaults[key] for key in ("num_frames", "height", "width")}
    if None in size.values():
        size = _own_size(folder)
    return StudentCard(
        ITSELF, (defaults["num_inference_steps"],), 1.0, {**size, "fps": family.native_fps}, steps=0, seed=0,
        # Where guidance is an input of the network, guidance by two calls has another name.
        embedded_guidance=defaults["guidance_scale"], dtype=dtype,
        guidance_scale=defaults.get("true_cfg_scale", defaults["guidance_scale"]),
    )  # fmt: skip


def _own_size(folder: Path) -> dict[str, Any]:
    """CogVideoX's, which stands in its configuration in latents of 8 pixels and in frames."""
    try:
        config: Mapping[str, Any] = read_json(folder / DENOISER / "config.json")
        return {
            "num_frames": int(config["sample_frames"]),
            "height": int(config["sample_height"]) * 8,
            "width": int(config["sample_width"]) * 8,
        }
    except DAMAGED as error:
        raise UserError("says no clip size", where=str(folder / DENOISER / "config.json")) from error
