"""What a model's folder says of how it was trained, beside what a run asks of it."""

from __future__ import annotations

from pathlib import Path

from rats_video.assets import resolve_folder
from rats_video.backbones.base import PipelineBackbone
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import AsUserError, warn
from rats_video.hub import CARD
from rats_video.inference.student import load_card
from rats_video.reading import read_json
from rats_video.types import ClipSpec

_CLOSE = 0.02  # relative: a shift that is rounded is still the model's own


def folder_settings(folder: Path, backbone: PipelineBackbone, clip: ClipSpec) -> dict[str, float]:
    """The settings that a pipeline folder states, by the run's keys, dotted; what it does not state is left out.

    They are of its scheduler and its networks, and of the `rats.json` that a fine-tuning leaves.

    Raises:
        UserError: one of these files is damaged.
    """
    stated: dict[str, float] = {}
    path = folder / "scheduler" / "scheduler_config.json"
    if path.is_file():
        with AsUserError("no scheduler's configuration", where=str(path)):
            stated = backbone.stated(read_json(path), clip)
    if (folder / CARD).is_file():
        card = load_card(folder)
        stated |= {"shift": card.shift, "teacher.guidance_scale": card.guidance_scale}
        stated |= {f"clip.{key}": value for key, value in card.clip.items()}
    return stated


def warn_of_differences(cfg: DistillConfig, backbone: PipelineBackbone) -> None:
    """Say once, of all settings in which the run differs from what its model's folder states: they may be meant."""
    folder = resolve_folder(cfg.model, where="model")
    chosen = {
        "shift": cfg.shift,
        "teacher.guidance_scale": cfg.teacher.guidance_scale,
        **{f"clip.{key}": float(value) for key, value in cfg.clip.model_dump().items()},
    }
    stated = folder_settings(folder, backbone, cfg.clip.spec)
    differ = {key: value for key, value in stated.items() if abs(value - chosen[key]) > _CLOSE * value}
    if differ:
        theirs = ", ".join(f"{key} {value:.4g}" for key, value in differ.items())
        ours = ", ".join(f"{chosen[key]:.4g}" for key in differ)
        options = " ".join(f"--set {key}={value:.4g}" for key, value in differ.items())
        warn(f"its own files say {theirs}, this run {ours}; if that is not meant: {options}", where=str(folder))
