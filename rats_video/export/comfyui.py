"""`comfyui`: the student under the names its model had before diffusers, which ComfyUI's loaders look for.

A family's `original_names` are the inverse of a map in diffusers; loading the file through its converter checks them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.experts import HIGH_NOISE, LOW_NOISE
from rats_video.errors import UserError
from rats_video.export.base import ExportedStudent, Form
from rats_video.export.lora import NOISE, check_unscaled, header
from rats_video.export.stock import class_in, open_pipeline
from rats_video.export.usage import fenced, sigma_string

PREFIX = "diffusion_model."


class ComfyUI(Form):
    """A LoRA student's adapter, or the whole denoiser of another; a file an expert."""

    name = "comfyui"
    summary = "the student under the names that ComfyUI's loaders take"
    tags = ("comfyui",)
    limits = ("The file was read back by diffusers' converter; ComfyUI itself was not run.",)

    def check(self, student: Path, family: type[PipelineBackbone], scale: float) -> None:
        """Refuse a scaled LoRA, and a family whose original names no converter of diffusers can check."""
        check_unscaled(student, scale)
        if not family.original_names:
            raise UserError(
                f"ComfyUI's names for a {family.pipelines[0]} cannot be checked with diffusers' converters",
                where="--format comfyui", fix="take --format diffusers, lora or merged",
            )  # fmt: skip

    def write(self, student: PipelineBackbone, exported: ExportedStudent, folder: Path) -> None:
        """Write the files, with remarks in their headers."""
        remarks = header(student, exported)
        for part in student.denoiser_parts:
            tensors = _lora(student, part) if exported.is_lora else _whole(student, part)
            save_file(tensors, folder / file_name(part, student.denoiser_parts, is_lora=exported.is_lora), remarks)

    def load(self, exported: ExportedStudent, device: torch.device, folder: Path) -> Any:
        """The base's pipeline with the files as diffusers converts them."""
        base, dtype, scheduler = exported.base, exported.dtype, exported.stock.scheduler
        files = sorted(folder.glob("*.safetensors"))  # high noise before low
        parts = dict(zip((HIGH_NOISE, LOW_NOISE), files, strict=False))
        if exported.is_lora:
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

    def sampling(self, exported: ExportedStudent, name: str) -> str:  # noqa: ARG002
        """Folder, nodes and noise levels."""
        if exported.is_lora:
            how = "Put it into `models/loras` and load it with LoraLoaderModelOnly at strength 1."
        else:
            how = "Put it into `models/diffusion_models` and load it with Load Diffusion Model."
        if len(exported.networks) > 1:
            how += " There is a file for each of the two experts."
        levels = "\n".join(sigma_string(levels) for levels in exported.sigmas.values())
        sample = "Sample with SamplerCustom, cfg 1.0 and KSamplerSelect `euler`, and paste a line into ManualSigmas:"
        return "\n\n".join([how, sample, fenced(levels, "text")])

    def hints(self, exported: ExportedStudent) -> list[str]:
        """Noise levels to paste."""
        return [f"ManualSigmas for {n} steps: {sigma_string(levels)}" for n, levels in exported.sigmas.items()]


def original_name(student: PipelineBackbone, name: str) -> str:
    """A weight's name as the model was first published, from diffusers' name of it."""
    for pattern, original in student.original_names:
        name = re.sub(pattern, original, name)
    return name


def file_name(part: str, parts: Sequence[str], *, is_lora: bool) -> str:
    """ComfyUI loads each of two experts from a file of its own."""
    noise = f"-{NOISE[part]}" if len(parts) > 1 else ""
    return f"rats-{'lora' if is_lora else 'model'}{noise}.safetensors"


def _whole(student: PipelineBackbone, part: str) -> dict[str, Tensor]:
    state = student.parts[part].state_dict()
    return {original_name(student, name): weight.cpu().contiguous() for name, weight in state.items()}


def _lora(student: PipelineBackbone, part: str) -> dict[str, Tensor]:
    """A and B of each layer, alpha / rank within B; and alpha as a tensor, the rank, for programs that ask for one."""
    adapters = student.adapters
    assert adapters is not None
    assert student.role is not None
    adapters.fold_alpha(student.role)
    cfg, tensors = adapters.configs[student.role], {}
    for key, weight in adapters.weights(student.role).items():
        owner, _, name = key.partition(".")
        if owner != part:
            continue
        name = PREFIX + original_name(student, name)
        tensors[name] = weight.detach().cpu().contiguous()
        if student.lora_alpha_tensors:
            tensors[re.sub(r"lora_[AB]\.weight$", "alpha", name)] = torch.tensor(float(cfg.alpha))
    return tensors
