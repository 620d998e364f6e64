"""Puts the `compute` section of a configuration to work: devices, cached text, advice on memory."""

from __future__ import annotations

from collections import ChainMap
from pathlib import Path

import torch

from rats_video.assets import resolve_folder
from rats_video.backbones.architecture import find_architecture
from rats_video.backbones.attention import used_attention
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.compute import FullWeightsConfig, LoraConfig
from rats_video.backbones.kinds import load_backbone
from rats_video.backbones.low_bit import bits_of
from rats_video.backbones.offload import OffloadedWeights
from rats_video.backbones.text_cache import TextCache, text_identity
from rats_video.datasets.prepared.cache import ClipCache
from rats_video.datasets.prepared.text import PreparedText
from rats_video.datasets.prompts.settings import PreparedPromptsConfig
from rats_video.datasets.prompts.split import load_prompts
from rats_video.distillation.real_data import check_cache
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError


def cached_text(cfg: DistillConfig, file: Path) -> TextCache | None:
    """The encoded prompts of `prepare` or of an earlier start of the run; None if one is missing.

    With them no text encoder is loaded.

    Raises:
        UserError: `prepare` encoded them with another one.
    """
    if not cfg.compute.cache_text:
        return None
    if isinstance(cfg.prompts, PreparedPromptsConfig):
        return _prepared_text(cfg, Path(cfg.prompts.path))
    return TextCache.load(file, _text_identity(cfg), _all_prompts(cfg))


def move_to_device(cfg: DistillConfig, backbone: PipelineBackbone, device: torch.device) -> None:
    """Move a model from host memory to the device, except what `compute.offload` keeps there.

    What `parallel.shard` will split stays as well: it need not fit as a whole.
    """
    for name, part in backbone.parts.items():
        if name in backbone.denoiser_parts and cfg.parallel.shard:
            continue
        if name in backbone.denoiser_parts and cfg.compute.offload != "none":
            OffloadedWeights(part.requires_grad_(requires_grad=False), device, cfg.compute.offload)
        elif isinstance(part, torch.nn.Module):
            part.to(device)


def encode_prompts(cfg: DistillConfig, backbone: PipelineBackbone) -> TextCache:
    """All prompts of a run, encoded."""
    return TextCache.encode(backbone.encode_text, _all_prompts(cfg))


def save_text(cfg: DistillConfig, backbone: PipelineBackbone, file: Path) -> None:
    """Keep the encoded prompts with the run, so that resuming it needs no text encoder; a cache keeps its own."""
    if backbone.text_cache is not None and not isinstance(cfg.prompts, PreparedPromptsConfig):
        backbone.text_cache.save(file, _text_identity(cfg))


def _prepared_text(cfg: DistillConfig, folder: Path) -> TextCache:
    cache = ClipCache(folder)
    check_cache(cache, resolve_folder(cfg.model, where="model"), "text encoder")
    dtype = getattr(torch, cfg.compute.dtype)
    rows, negative = PreparedText(cache, dtype), cfg.teacher.negative_prompt
    if negative in rows:
        return TextCache(rows)
    encoder = load_backbone(resolve_folder(cfg.model, where="model"), "cpu", dtype, cfg.backbone, with_denoiser=False)
    return TextCache(ChainMap({negative: encoder.encode_text([negative])}, rows))  # type: ignore[arg-type]  # only read


def _all_prompts(cfg: DistillConfig) -> list[str]:
    prompts = load_prompts(cfg.prompts)
    return ["", cfg.teacher.negative_prompt, *prompts.train, *prompts.heldout]


def _text_identity(cfg: DistillConfig) -> str:
    return text_identity(resolve_folder(cfg.model, where="model"), cfg.compute.dtype)


def describe(cfg: DistillConfig, student: PipelineBackbone) -> dict[str, str]:
    """The settings that are in force, read from the objects: for the record and for a run's first line."""
    weights = cfg.student.weights
    bits = bits_of(student.denoiser).removesuffix("none")
    trained = sum(weight.numel() for weight in student.weights.values())
    return {
        "student": f"{'LoRA' if isinstance(weights, LoraConfig) else 'full'}, {trained:,} weights train",
        "precision": str(student.autocast or student.dtype).removeprefix("torch.") + (bits and f", base in {bits}"),
        "attention": "+".join(dict.fromkeys(used_attention(network) for network in student.denoisers.values())),
    }


def memory_advice(cfg: DistillConfig) -> str:
    """The settings that would save memory and are off, roughly the one that saves most first."""
    compute, weights, critic = cfg.compute, cfg.student.weights, cfg.method.critic_optimizer
    is_full, in_chunks = isinstance(weights, FullWeightsConfig), _decodes_in_chunks(cfg)
    options = {
        "training.micro_batch_size=1": cfg.training.batch_size > 1 and cfg.training.micro_batch_size != 1,
        "compute.activation_checkpointing=true": not compute.activation_checkpointing,
        "compute.decode.window=2": in_chunks and compute.decode.window is None,
        "compute.decode.checkpoint=true": not compute.decode.checkpoint,
        "student.weights.kind=lora": is_full,
        "student.grad_steps=1": cfg.student.most_gradient_steps(max(cfg.student.num_steps)) > 1,
        "compute.dtype=bfloat16": compute.dtype == "float32",
        "compute.decode.dtype=bfloat16": compute.decode.dtype == "float32",
        "compute.quantization=nf4": compute.quantization == "none" and not is_full,
        "compute.cache_text=true": not compute.cache_text,
        "training.optimizer.kind=adamw8bit": cfg.training.optimizer.kind == "adamw",
        "method.fake_score.optimizer.kind=adamw8bit": critic is not None and critic.kind == "adamw",
        "compute.offload=block": compute.offload == "none" and not is_full and not compute.compile,
        "compute.activation_offload=true": compute.activation_checkpointing and not compute.activation_offload,
        "compute.decode.offload=true": in_chunks and compute.decode.checkpoint and not compute.decode.offload,
    }
    unused = [setting for setting, helps in options.items() if helps]
    if not unused:
        return "all levers are on: a smaller clip, or more GPUs with parallel.shard=true"
    return f"--set, the first saves most: {', '.join(unused)}"


def _decodes_in_chunks(cfg: DistillConfig) -> bool:
    """True if the decoder takes a clip piece by piece, so that pieces can be skipped or wait on the host."""
    if cfg.compute.decode.small is not None:
        return True
    try:
        return find_architecture(cfg.model, cfg.architecture, cfg.backbone).family.exact_window
    except UserError:  # the run itself tells what is wrong with the model
        return True
