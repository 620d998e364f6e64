"""`train teacher --data`: an existing model, fine-tuned on prepared clips."""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from rats_video.assets import resolve_folder
from rats_video.backbones.apply_compute import apply_compute
from rats_video.backbones.attention import check_attention
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.compute import FullWeightsConfig, LoraConfig
from rats_video.backbones.kinds import load_backbone
from rats_video.backbones.offload import OffloadedWeights
from rats_video.commands.device import explain_memory, start_runtime
from rats_video.commands.folders import locked_output
from rats_video.commands.record import environment
from rats_video.commands.train_folder import RECORD, claim_training
from rats_video.config.load import load_seeded
from rats_video.datasets.prepared.cache import ClipCache
from rats_video.distillation.real_data import check_cache
from rats_video.evaluation.finetune_plot import plot_finetune
from rats_video.evaluation.stats import Estimate, mean_ci95, paired_difference
from rats_video.export.diffusers import write_denoiser
from rats_video.export.merged import merge
from rats_video.files import replacing, write_json
from rats_video.inference.student import CARD, ITSELF, StudentCard
from rats_video.pretraining.finetune import CHECKPOINTS, METRICS, FinetuneConfig, check_splits, evenly, fine_tune
from rats_video.pretraining.resumable import delete_checkpoints
from rats_video.runtime import Runtime
from rats_video.training.metrics import read_metrics

PIPELINE, LORA, FIGURE = "pipeline", "lora", "training.png"


def run_finetune(
    *,
    data: Path,
    config: str,
    output: Path,
    seed: int | None,
    device: str,
    overrides: Sequence[str],
    resume: bool,
    overwrite: bool,
    echo: Callable[[str], None],
) -> None:
    """Train, and write OUTPUT/pipeline, a pipeline folder, with OUTPUT/lora beside it where an adapter was trained."""
    overrides = [*overrides, f"data={json.dumps(str(data))}"]
    cfg = load_seeded(FinetuneConfig, config, group="finetune", overrides=overrides, seed=seed)
    folder = resolve_folder(cfg.model, where="model")
    cache = ClipCache(data)
    check_cache(cache, folder)
    check_splits(cache)
    runtime, began = start_runtime(device), time.monotonic()
    check_attention(cfg.compute.attention, runtime.device, cfg.compute.dtype)
    runtime.rows(cfg.batch_size)
    with locked_output(output, runtime), explain_memory(lambda: memory_advice(cfg)):
        role = load_role(cfg, folder, cache, runtime)
        is_done = runtime.broadcast(
            claim_training(cfg, output, "finetune", resume=resume, overwrite=overwrite) if runtime.is_main else False
        )
        if is_done:
            lines = [f"done before: {output}"] if runtime.is_main else []
        else:
            losses = fine_tune(cfg, role, cache, output, runtime)
            lines = []
            if runtime.is_main:
                lines = _finish(cfg, role, cache, folder, output, losses, began)
        runtime.barrier()
        runtime.close()
    for line in lines:
        echo(line)


def load_role(cfg: FinetuneConfig, folder: Path, cache: ClipCache, runtime: Runtime) -> PipelineBackbone:
    """The model in the role that trains, on this process's device.

    Raises:
        UserError: the model cannot be loaded or cannot do what is asked, or a clip's size does not suit it.
    """
    is_full = isinstance(cfg.weights, FullWeightsConfig)
    dtype = getattr(torch, cfg.compute.dtype)
    base = load_backbone(folder, "cpu", torch.float32 if is_full else dtype, with_text=False)
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


def memory_advice(cfg: FinetuneConfig) -> str:
    """The settings that would save memory and are not on, roughly the one that saves most first."""
    compute, is_full = cfg.compute, isinstance(cfg.weights, FullWeightsConfig)
    levers = {
        "micro_batch_size=1": cfg.batch_size > 1 and cfg.micro_batch_size != 1,
        "compute.activation_checkpointing=true": not compute.activation_checkpointing,
        "weights.kind=lora": is_full,
        "compute.dtype=bfloat16": compute.dtype == "float32",
        "optimizer.kind=adamw8bit": cfg.optimizer.kind == "adamw",
        "compute.offload=block": compute.offload == "none" and not is_full and not compute.compile,
        "validation.num_videos=0": cfg.validation.num_videos > 0,
    }
    unused = [setting for setting, helps in levers.items() if helps]
    return f"--set, the first saves most: {', '.join(unused)}" if unused else "prepare smaller clips"


def _finish(
    cfg: FinetuneConfig, role: PipelineBackbone, cache: ClipCache, folder: Path, output: Path,
    losses: tuple[list[float], list[float]], began: float,
) -> list[str]:  # fmt: skip
    records = evenly(cache.of_split("heldout"), cfg.validation.num_clips)
    sources = [record.digest for record in records]  # clips of one are not independent
    before, after = (mean_ci95(each, sources) for each in losses)
    change = paired_difference(losses[1], losses[0], sources)
    size = Counter(record.size for record in cache.records).most_common(1)[0][0]
    card = StudentCard(
        model=ITSELF, num_steps=(cfg.validation.num_steps,), shift=cfg.shift, steps=cfg.steps, seed=cfg.seed,
        clip={**dict(zip(("num_frames", "height", "width"), size, strict=True)), "fps": cache.manifest.fps},
        embedded_guidance=cfg.embedded_guidance, dtype=cfg.compute.dtype, guidance_scale=cfg.validation.guidance_scale,
    )  # fmt: skip
    _write_model(cfg, role, card, folder, output)
    plot_finetune(read_metrics(output / METRICS), before.mean, after.mean, output / FIGURE)
    seconds = time.monotonic() - began
    write_json(
        output / RECORD,
        {
            "config": cfg.model_dump(mode="json"),
            "seconds": round(seconds, 1),
            "environment": environment(role.device),
            "cache": {"folder": str(cache.folder.resolve()), "clips": len(cache.records)},
            "heldout": {"clips": [record.key for record in records], "before": losses[0], "after": losses[1]},
            "metrics": {
                "heldout_loss_before": before.mean,
                "heldout_loss_after": after.mean,
                "change": change.mean,
                "change_ci95": change.ci95 if change.num > 1 else None,
            },
        },
    )
    delete_checkpoints(output / CHECKPOINTS)
    return _tell(before, after, change, card, records[0].caption, output, seconds)


def _write_model(cfg: FinetuneConfig, role: PipelineBackbone, card: StudentCard, folder: Path, output: Path) -> None:
    """OUTPUT/pipeline; an adapter also as the file it is, merged into a fresh base in float32."""
    if isinstance(cfg.weights, LoraConfig):
        role.save_role(output / LORA)
        role = load_backbone(folder, "cpu", torch.float32, with_text=False).load_role(output / LORA)
        merge(role)
    with replacing(output / PIPELINE, "model") as aside:
        aside.mkdir()
        write_denoiser(role, folder, aside)
        write_json(aside / CARD, card.as_json())


def _tell(
    before: Estimate, after: Estimate, change: Estimate, card: StudentCard, caption: str, output: Path, seconds: float
) -> list[str]:
    interval = f" +- {change.ci95:.4f} (95%, {change.num} sources)" if change.num > 1 else ""
    verdict = "better" if change.mean < 0 else "WORSE: fewer steps, a lower optimizer.lr, or more clips"
    if change.num < 2:
        verdict += "; one held-out source says little"  # no interval
    elif abs(change.mean) <= change.ci95:
        verdict = "no clear change"
    calls = card.num_steps[0] * (1 if card.guidance_scale == 1.0 else 2)
    where = shlex.quote(str(output / PIPELINE))
    return [
        f"held-out loss: {before.mean:.4f} before, {after.mean:.4f} after",
        f"    change {change.mean:+.4f}{interval}: {verdict}",
        f"{seconds:.0f} s: {output}",
        "Next:",
        f"    rats-video sample --model {where} --nfe {calls} --prompt {shlex.quote(caption)}",
        f"    rats-video distill --config NAME --set model={where}",
    ]
