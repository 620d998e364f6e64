"""What a frozen teacher's rollouts depend on: a cache of them is good for these alone."""

from __future__ import annotations

from pathlib import Path

from rats_video.assets import resolve_folder
from rats_video.distillation.settings import DistillConfig
from rats_video.files import weights_digest
from rats_video.inference.style import base_styles
from rats_video.methods.teacher import FrozenTeacherConfig
from rats_video.rewards.reward import reward_folders

NOT_SCORED = {"path": True, "head": True, "tokenizer": True, "chunk": True}
"""Keys of a reward that are in its weights' hash, or change no score."""

DECIDES = {".safetensors", ".json", ".txt", ".model"}
"""Files of a model's or a reward's folder that decide what it computes: weights, configuration, tokenizer."""


def teacher_identity(cfg: DistillConfig, teacher: FrozenTeacherConfig) -> dict[str, object]:
    """All that a frozen teacher's rollout depends on besides prompts and noise, weights included."""
    folders = [
        resolve_folder(cfg.model, where="model"),
        *reward_folders(cfg.reward, where="reward"),
        *cfg.backbone.sources(),
    ]
    styles = base_styles(cfg.base_loras, where="base_loras")
    if cfg.compute.decode.small is not None:  # what the reward saw
        folders.append(Path(cfg.compute.decode.small))
    return {
        "weights": weights_digest(folders, DECIDES),
        **cfg.model_dump(include={"backbone"}),  # empty unless it is the user's own: old caches stay valid
        "num_steps": teacher.num_steps,
        "guidance_scale": teacher.guidance_scale,
        **({"guidance_scale_2": teacher.guidance_scale_2} if teacher.guidance_scale_2 else {}),  # old caches stay valid
        **({"negative_prompt": teacher.negative_prompt} if teacher.negative_prompt else {}),  # likewise
        **({"predictions": True} if cfg.method.compares_predictions else {}),
        **teacher.model_dump(include={"further_guidance"}),  # empty unless it is set: likewise
        "embedded_guidance": cfg.embedded_guidance,
        "shift": cfg.shift,
        "dtype": cfg.compute.dtype,
        **({"base_loras": [style.identity for style in styles]} if styles else {}),
        **({} if cfg.compute.quantization == "none" else {"quantization": cfg.compute.quantization}),
        "clip": cfg.clip.model_dump(),
        # The excluded keys are in the weights' hash, or change nothing that a teacher does.
        "decode": cfg.compute.decode.model_dump(exclude={"checkpoint", "offload", "window", "small"}),
        "reward": cfg.reward.model_dump(exclude=NOT_SCORED | {"terms": {"__all__": {"reward": NOT_SCORED}}}),
    }
