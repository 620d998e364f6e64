"""`comfyui`: the student under the names its model had before diffusers, which ComfyUI's loaders look for.

Each map here is the inverse of one in diffusers; loading the file through diffusers' own converter checks it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.experts import HIGH_NOISE, LOW_NOISE
from rats_video.backbones.ltx import LTXBackbone
from rats_video.backbones.wan import WanBackbone
from rats_video.errors import UserError
from rats_video.export.stock import class_in, open_pipeline

WAN_NAMES = (
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"\.scale_shift_table$", ".modulation"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"\.norm2\.", ".norm3."),
)
LTX_NAMES = (
    (r"^proj_in\.", "patchify_proj."),
    (r"^time_embed\.", "adaln_single."),
    (r"\.norm_([qk])\.", r".\1_norm."),
)
PREFIX = "diffusion_model."
NOISE = {HIGH_NOISE: "high-noise", LOW_NOISE: "low-noise"}


def check_family(pipeline: str) -> None:
    """Raise UserError for a pipeline whose original names no converter of diffusers can check."""
    if pipeline not in (*WanBackbone.pipelines, *LTXBackbone.pipelines):
        raise UserError(
            f"ComfyUI's names for a {pipeline} cannot be checked with diffusers' converters", where="--format comfyui",
            fix="take --format diffusers, lora or merged",
        )  # fmt: skip


def original_name(student: PipelineBackbone, name: str) -> str:
    """A weight's name as the model was first published, from diffusers' name of it."""
    for pattern, original in WAN_NAMES if isinstance(student, WanBackbone) else LTX_NAMES:
        name = re.sub(pattern, original, name)
    return name


def file_name(part: str, parts: Sequence[str], *, is_lora: bool) -> str:
    """ComfyUI loads each of two experts from a file of its own."""
    noise = f"-{NOISE[part]}" if len(parts) > 1 else ""
    return f"rats-{'lora' if is_lora else 'model'}{noise}.safetensors"


def write_comfyui(student: PipelineBackbone, remarks: Mapping[str, str], folder: Path) -> None:
    """A LoRA student's adapter, or the whole denoiser of another; a file an expert, with `remarks` in its header."""
    is_lora = student.adapters is not None and student.role is not None
    for part in student.denoiser_parts:
        tensors = _lora(student, part) if is_lora else _whole(student, part)
        save_file(tensors, folder / file_name(part, student.denoiser_parts, is_lora=is_lora), dict(remarks))


def _whole(student: PipelineBackbone, part: str) -> dict[str, Tensor]:
    state = student.parts[part].state_dict()
    return {original_name(student, name): weight.cpu().contiguous() for name, weight in state.items()}


def _lora(student: PipelineBackbone, part: str) -> dict[str, Tensor]:
    """A and B of each layer; Wan's alphas beside them, and LTX's, which diffusers would not read, within B."""
    adapters = student.adapters
    assert adapters is not None
    assert student.role is not None
    cfg, tensors = adapters.configs[student.role], {}
    for key, weight in adapters.weights(student.role).items():
        owner, _, name = key.partition(".")
        if owner != part:
            continue
        name = PREFIX + original_name(student, name)
        tensors[name] = weight.detach().cpu().contiguous()
        if isinstance(student, WanBackbone):
            tensors[re.sub(r"lora_[AB]\.weight$", "alpha", name)] = torch.tensor(float(cfg.alpha))
        elif ".lora_B." in name:
            tensors[name] = tensors[name] * (cfg.alpha / cfg.rank)
    return tensors


def load_comfyui(folder: Path, base: Path, device: torch.device, dtype: torch.dtype, scheduler: Any) -> Any:
    """The base's pipeline with the files as diffusers converts them."""
    files = sorted(folder.glob("*.safetensors"))  # high noise before low
    parts = dict(zip((HIGH_NOISE, LOW_NOISE), files, strict=False))
    if files[0].name.startswith("rats-lora"):
        pipeline = open_pipeline(base, device, dtype, scheduler=scheduler)
        for part, file in parts.items():
            second = {"load_into_transformer_2": True} if part == LOW_NOISE else {}
            pipeline.load_lora_weights(folder, weight_name=file.name, **second)
        return pipeline
    networks = {
        part: class_in(base / part / "config.json").from_single_file(
            str(file), config=str(base), subfolder=part, dtype=dtype, local_files_only=True
        )
        for part, file in parts.items()
    }
    return open_pipeline(base, device, dtype, **networks, scheduler=scheduler)


def sigma_string(sigmas: Sequence[float]) -> str:
    """What to paste into ComfyUI's ManualSigmas: "1.000000, 0.900000, 0.750000, 0.500000, 0.000000"."""
    return ", ".join(f"{sigma:.6f}" for sigma in sigmas)
