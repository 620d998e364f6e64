"""`comfyui`: the student under the names its model had before diffusers, which ComfyUI's loaders look for.

A family's `original_names` are the inverse of a map in diffusers; loading the file through its converter checks them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.experts import LOW_NOISE
from rats_video.backbones.family import DENOISER
from rats_video.backbones.folder import read_configs
from rats_video.backbones.lora import NOISE, has_adapter
from rats_video.errors import UserError
from rats_video.export.base import ExportedStudent, Form
from rats_video.export.comfyui_card import levels_label, sampling_section
from rats_video.export.comfyui_models import MODELS, ComfyModel, denoiser_config, refusal
from rats_video.export.comfyui_workflow import (
    API,
    needs_of,
    page_file,
    workflow,
    workflow_section,
    workflow_steps,
)
from rats_video.export.lora import check_unscaled, fuse_base_loras, header
from rats_video.export.stock import class_in, open_base
from rats_video.export.usage import sigma_string
from rats_video.files import write_json
from rats_video.reading import read_json

PREFIX = "diffusion_model."
MUSUBI = "musubi-tuner"  # folder


class ComfyUI(Form):
    """A LoRA student's adapter, or the whole denoiser of another; a file an expert."""

    name = "comfyui"
    summary = "the student under its model's original names, for ComfyUI's loaders"
    tags = ("comfyui",)
    limits = ("The file was read back by diffusers' converter; ComfyUI itself was not run on it.",)

    def check(self, student: Path, base: Path, family: type[PipelineBackbone], scale: float) -> None:
        """Refuse a scaled LoRA, what we know no original names for, and sizes that ComfyUI does not build."""
        check_unscaled(student, scale)
        is_lora = has_adapter(student)
        reason = refusal(read_configs(base, family.family).get(DENOISER, {}), is_lora=is_lora)
        if not family.original_names:  # a family of the user's own
            reason = reason or f"{family.__name__} declares no original_names"
        if reason:
            raise UserError(
                reason, where=f"--format comfyui: {base / DENOISER / 'config.json'}",
                fix=f"take --format diffusers{', lora' if is_lora else ''} or merged",
            )  # fmt: skip

    def write(self, student: PipelineBackbone, exported: ExportedStudent, folder: Path) -> None:
        """Write the files, with remarks in their headers."""
        remarks = header(student, exported)
        place = folder / placed(exported)
        place.mkdir(parents=True)
        for part, file in file_names(exported).items():
            config = read_json(exported.base / part / "config.json")
            if exported.is_lora:
                tensors, sizes = _lora(student, part), {}
                if model_of(exported).for_musubi:
                    (folder / MUSUBI).mkdir(exist_ok=True)
                    save_file(
                        {kohya_name(name): tensor for name, tensor in tensors.items()}, folder / MUSUBI / file, remarks
                    )
            else:
                is_causal = exported.pipeline == "LTXConditionPipeline"  # as LTX-Video is since 0.9.5
                tensors, sizes = (
                    whole_weights(student, part),
                    MODELS[config["_class_name"]].config(config, is_causal=is_causal),
                )
            save_file(tensors, place / file, remarks | sizes)
        self._write_workflow(exported, folder)

    def _write_workflow(self, exported: ExportedStudent, folder: Path) -> None:
        if (needs := needs_of(exported, denoiser_config(exported))) is None:
            return
        graph = workflow(exported, needs, list(file_names(exported).values()), workflow_steps(exported))
        write_json(folder / API, graph.api())
        page = folder / page_file(exported)
        page.parent.mkdir(parents=True)
        write_json(page, graph.page())

    def load(self, exported: ExportedStudent, device: torch.device, folder: Path) -> Any:
        """The base's pipeline with the files as diffusers converts them."""
        base, dtype, scheduler = exported.base, exported.dtype, exported.stock.scheduler
        parts = {part: folder / placed(exported) / file for part, file in file_names(exported).items()}
        if exported.is_lora:
            pipeline = open_base(exported, device, scheduler=scheduler)
            fuse_base_loras(pipeline, exported)
            for part, file in parts.items():
                second = {"load_into_transformer_2": True} if part == LOW_NOISE else {}
                pipeline.load_lora_weights(file.parent, weight_name=file.name, **second)
            return pipeline
        networks = {
            part: class_in(base / part / "config.json").from_single_file(
                str(file), config=str(base), subfolder=part, dtype=dtype, local_files_only=True
            )
            for part, file in parts.items()
        }
        return open_base(exported, device, **networks, scheduler=scheduler)

    def own_card(self, exported: ExportedStudent, folder: Path) -> None:  # noqa: ARG002
        """None: the names are others."""
        return

    def picture_prefix(self, exported: ExportedStudent) -> str:
        """ComfyUI's folder of pictures, where each export's have names of their own."""
        return f"input/{exported.file_stem}-"

    def install(self, exported: ExportedStudent) -> str:  # noqa: ARG002
        """Nothing."""
        return ""

    def programs(self, exported: ExportedStudent) -> str:
        """As they were run on files of this kind."""
        if not exported.is_lora:
            return "This is for ComfyUI. Diffusers takes `--format diffusers` or `merged`."
        return f"{model_of(exported).lora_programs}. Diffusers takes it too; `--format lora` has its own names."

    def sampling(self, exported: ExportedStudent, name: str) -> str:  # noqa: ARG002
        """Folder, nodes and noise levels."""
        files = [f"{placed(exported)}/{file}" for file in file_names(exported).values()]
        needs = needs_of(exported, denoiser_config(exported))
        alone = "Copy `models` over ComfyUI's folder. There is no ready workflow for this model."
        ready = alone if needs is None else workflow_section(exported, needs)
        return "\n\n".join([ready, sampling_section(exported, model_of(exported), files)])

    def note(self, exported: ExportedStudent) -> str:
        """The base's LoRAs: what the stock pipeline must be told is no concern of ComfyUI's."""
        return exported.base_lora_note

    def hints(self, exported: ExportedStudent) -> list[str]:
        """Noise levels to paste."""
        return [
            f"ManualSigmas for {levels_label(exported, n)}: {sigma_string(levels)}"
            for n, levels in exported.sigmas.items()
        ]


def original_name(student: PipelineBackbone, name: str) -> str:
    """A weight's name as the model was first published, from diffusers' name of it."""
    for pattern, original in student.original_names:
        name = re.sub(pattern, original, name)
    return name


def model_of(exported: ExportedStudent) -> ComfyModel:
    """ComfyUI's side of the student."""
    return MODELS[denoiser_config(exported)["_class_name"]]


def placed(exported: ExportedStudent) -> str:
    """The folder of the files, in the export as in ComfyUI."""
    return f"models/{'loras' if exported.is_lora else 'diffusion_models'}"


def kohya_name(name: str) -> str:
    """Kohya's name of a LoRA's weight, from ours, as musubi-tuner's `convert_lora.py --target default` makes it."""
    layer, dot, kind = re.split(r"(\.)(?=lora_[AB]\.|alpha$)", name.removeprefix(PREFIX))
    return f"lora_unet_{layer.replace('.', '_')}{dot}{kind.replace('lora_A', 'lora_down').replace('lora_B', 'lora_up')}"


def file_names(exported: ExportedStudent) -> Mapping[str, str]:
    """The file of each denoising part: ComfyUI loads each of two experts from one of its own."""
    kind = "-lora" if exported.is_lora else ""
    noise = NOISE if len(exported.networks) > 1 else {}
    return {
        part: f"{exported.file_stem}{kind}{f'-{noise[part]}' if noise else ''}.safetensors"
        for part in exported.networks
    }


def whole_weights(student: PipelineBackbone, part: str) -> dict[str, Tensor]:
    """The denoiser's weights; what was published as one matrix is put together again."""
    pieces: dict[str, dict[str, Tensor]] = {}
    for name, weight in student.parts[part].state_dict().items():
        halves = weight.chunk(2) if name.rpartition(".")[0] in student.swapped_halves else ()
        place = re.search(r"\[\d\]", original := original_name(student, name))
        whole = original.replace(place[0], "") if place else original
        pieces.setdefault(whole, {})[place[0] if place else ""] = torch.cat(halves[::-1]) if halves else weight
    return {
        name: (torch.cat([parts[place] for place in sorted(parts)]) if len(parts) > 1 else parts[""]).cpu().contiguous()
        for name, parts in pieces.items()
    }


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
