"""The model that fine-tuning trains: loaded, then saved as a pipeline folder."""

from __future__ import annotations

from pathlib import Path

import torch

from rats_video.backbones.apply_compute import apply_compute
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.compute import FullWeightsConfig, LoraConfig
from rats_video.backbones.kinds import load_backbone
from rats_video.backbones.low_bit_folder import check_quantiser, refuse_low_bit
from rats_video.backbones.offload import OffloadedWeights
from rats_video.datasets.prepared.cache import ClipCache
from rats_video.export.diffusers import write_denoiser
from rats_video.export.merged import merge
from rats_video.files import replacing, write_json
from rats_video.hub import CARD
from rats_video.inference.student import StudentCard
from rats_video.pretraining.finetune import FinetuneConfig
from rats_video.runtime import Runtime

PIPELINE, LORA = "pipeline", "lora"


def load_role(cfg: FinetuneConfig, folder: Path, cache: ClipCache, runtime: Runtime) -> PipelineBackbone:
    """The model in the role that trains, on this process's device.

    Raises:
        UserError: the model cannot be loaded or cannot do what is asked, or a clip's size does not suit it.
    """
    is_full = isinstance(cfg.weights, FullWeightsConfig)
    dtype = getattr(torch, cfg.compute.dtype)
    check_quantiser(cfg.compute.quantization)
    base = load_backbone(
        folder, "cpu", torch.float32 if is_full else dtype, with_text=False, quantization=cfg.compute.quantization
    )
    if is_full:
        refuse_low_bit(base.denoiser, where="weights.kind")
    base.fps, base.embedded_guidance = cache.manifest.fps, cfg.embedded_guidance
    for record in {record.size: record for record in cache.records}.values():
        base.latent_shape(cache.spec(record))
    for name, part in base.parts.items():
        if name in base.denoiser_parts and cfg.compute.offload != "none":
            OffloadedWeights(part.requires_grad_(requires_grad=False), runtime.device, cfg.compute.offload)
        elif isinstance(part, torch.nn.Module):
            part.to(runtime.device)
    torch.manual_seed(cfg.seed)  # where adapters start, the same on all processes
    match cfg.weights:
        case FullWeightsConfig():
            role = base
            role.autocast = None if dtype == torch.float32 else dtype
        case LoraConfig():
            role = base.with_adapter("teacher", cfg.weights)
    apply_compute(cfg.compute, role)
    return role


def save_model(cfg: FinetuneConfig, role: PipelineBackbone, card: StudentCard, folder: Path, output: Path) -> None:
    """OUTPUT/pipeline; an adapter also as the file it is, merged into a fresh base in float32."""
    if isinstance(cfg.weights, LoraConfig):
        role.save_role(output / LORA)
        role = load_backbone(folder, "cpu", torch.float32, with_text=False).load_role(output / LORA)
        merge(role)
    with replacing(output / PIPELINE, "model") as aside:
        aside.mkdir()
        write_denoiser(role, folder, aside)
        write_json(aside / CARD, card.as_json())
