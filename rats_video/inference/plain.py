"""A pipeline folder that nobody distilled, sampled as its stock pipeline would by default."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rats_video.backbones.family import DENOISER
from rats_video.backbones.folder import read_configs, read_index
from rats_video.backbones.kinds import FAMILIES, family_of
from rats_video.errors import AsUserError, UserError
from rats_video.files import RECORD
from rats_video.inference.student import ITSELF, StudentCard
from rats_video.reading import DAMAGED, read_json


def plain_card(folder: Path, dtype: Literal["float32", "bfloat16"]) -> StudentCard:
    """The card that a pipeline would have: its class's own defaults of steps, guidance and size.

    A model of `train teacher` has those of its training.

    Raises:
        UserError: it is no pipeline of a family we know, or one of its files is damaged.
    """
    import diffusers

    index = read_index(folder)
    family = family_of(index, FAMILIES, where=str(folder))
    kind = getattr(diffusers, index["_class_name"], None) or getattr(diffusers, family.pipelines[0])
    defaults = {name: option.default for name, option in inspect.signature(kind.__call__).parameters.items()}
    size: dict[str, Any] = {key: defaults.get(key) for key in ("num_frames", "height", "width")}
    configs = read_configs(folder, family.family)
    clip = {**size, **family.native_clip(index, configs)}
    if None in clip.values():
        clip |= _own_size(configs, folder)
    trained = _training(folder)
    clip |= trained.get("clip", {})
    told = trained.get("guidance_scale", defaults["guidance_scale"])
    # Where guidance is an input of the network, guidance by two calls has another name; few-step models take none.
    scale = 1.0 if index.get("is_distilled") else defaults.get("true_cfg_scale", told)
    return StudentCard(
        ITSELF, (defaults["num_inference_steps"],), 1.0, clip, steps=0, seed=0,
        embedded_guidance=told or scale, dtype=dtype, guidance_scale=scale,
        further_guidance=family.further_guidance(configs),
    )  # fmt: skip


def _training(folder: Path) -> Mapping[str, Any]:
    """The settings of `train teacher`, if it made the model."""
    path = folder / RECORD
    if not path.is_file():
        return {}
    with AsUserError("no record of a training", where=str(path)):
        return dict(read_json(path)["config"])


def _own_size(configs: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    """That of CogVideoX before 1.5, which stands in its configuration in latents of 8 pixels and in frames."""
    try:
        config = configs[DENOISER]
        return {
            "num_frames": int(config["sample_frames"]),
            "height": int(config["sample_height"]) * 8,
            "width": int(config["sample_width"]) * 8,
        }
    except DAMAGED as error:
        raise UserError("says no clip size", where=str(folder / DENOISER / "config.json")) from error
