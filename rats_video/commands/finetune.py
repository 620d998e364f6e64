"""`train teacher --data`: an existing model, fine-tuned on prepared clips."""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from rats_video.assets import resolve_folder
from rats_video.backbones.attention import check_attention
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.compute import FullWeightsConfig
from rats_video.commands.device import explain_memory, start_runtime
from rats_video.commands.folders import locked_output
from rats_video.commands.record import environment
from rats_video.commands.train_folder import TrainOptions, claim_training, load_pinned
from rats_video.datasets.prepared.cache import ClipCache, ClipRecord
from rats_video.distillation.real_data import check_cache
from rats_video.evaluation.finetune_plot import plot_finetune
from rats_video.evaluation.stats import Estimate, mean_ci95, paired_difference
from rats_video.files import RECORD, write_json
from rats_video.inference.student import ITSELF, StudentCard
from rats_video.pretraining.finetune import CHECKPOINTS, METRICS, FinetuneConfig, check_splits, evenly, fine_tune
from rats_video.pretraining.finetune_role import PIPELINE, load_role, save_model
from rats_video.pretraining.resumable import delete_checkpoints
from rats_video.training.metrics import read_metrics

FIGURE = "training.png"


def run_finetune(*, data: Path, echo: Callable[[str], None], **options: Unpack[TrainOptions]) -> None:
    """Train, and write OUTPUT/pipeline, a pipeline folder, with OUTPUT/lora beside it where an adapter was trained."""
    output = options["output"]
    cfg = load_pinned(FinetuneConfig, "finetune", options, [f"data={json.dumps(str(data))}"])
    folder = resolve_folder(cfg.model, where="model")
    cache = ClipCache(data)
    check_cache(cache, folder)
    check_splits(cache)
    runtime, began = start_runtime(options["device"]), time.monotonic()
    check_attention(cfg.compute.attention, runtime.device, cfg.compute.dtype)
    runtime.rows(cfg.batch_size)
    with locked_output(output, runtime), explain_memory(lambda: memory_advice(cfg)):
        role = load_role(cfg, folder, cache, runtime)
        is_done = False
        if runtime.is_main:
            is_done = claim_training(cfg, output, "finetune", resume=options["resume"], overwrite=options["overwrite"])
        lines = [f"done before: {output}"]
        if not runtime.broadcast(is_done):
            losses = fine_tune(cfg, role, cache, output, runtime)
            lines = _finish(cfg, role, cache, folder, output, losses, began) if runtime.is_main else []
        runtime.barrier()
        runtime.close()
    if runtime.is_main:
        for line in lines:
            echo(line)


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
    sizes = Counter(record.size for record in cache.records)
    size = max(sizes, key=lambda each: (each[0] > 1, sizes[each]))  # an image's, where there are only images
    card = StudentCard(
        model=ITSELF, num_steps=(cfg.validation.num_steps,), shift=cfg.shift, steps=cfg.steps, seed=cfg.seed,
        clip={**dict(zip(("num_frames", "height", "width"), size, strict=True)), "fps": cache.manifest.fps},
        embedded_guidance=cfg.embedded_guidance, dtype=cfg.compute.dtype, guidance_scale=cfg.validation.guidance_scale,
    )  # fmt: skip
    save_model(cfg, role, card, folder, output)
    change = HeldoutChange.of(records, *losses) if records else None
    ends = (change.before.mean, change.after.mean) if change else None
    plot_finetune(read_metrics(output / METRICS), ends, output / FIGURE)
    seconds = time.monotonic() - began
    write_json(
        output / RECORD,
        {
            "config": cfg.model_dump(mode="json"),
            "seconds": round(seconds, 1),
            "environment": environment(role.device),
            "cache": {"folder": str(cache.folder.resolve()), "clips": len(cache.records)},
            "heldout": {"clips": [record.key for record in records], "before": losses[0], "after": losses[1]},
            "metrics": change.metrics if change else {},
        },
    )
    delete_checkpoints(output / CHECKPOINTS)
    calls = card.num_steps[0] * (1 if card.guidance_scale == 1.0 else 2)
    where, caption = shlex.quote(str(output / PIPELINE)), (records or cache.records)[0].caption
    return [
        *(change.lines if change else ["no clips were held out: look at what it makes"]),
        f"{seconds:.0f} s: {output}",
        "Next:",
        f"    rats-video sample --model {where} --nfe {calls} --prompt {shlex.quote(caption)}",
        f"    rats-video distill --config NAME --set model={where}",
    ]


@dataclass(frozen=True)
class HeldoutChange:
    """The loss of the held-out clips before and after, and how it changed."""

    before: Estimate
    after: Estimate
    change: Estimate

    @classmethod
    def of(cls, records: Sequence[ClipRecord], before: Sequence[float], after: Sequence[float]) -> HeldoutChange:
        """Of each clip's losses, by source: clips of one are not independent."""
        sources = [record.digest for record in records]
        return cls(mean_ci95(before, sources), mean_ci95(after, sources), paired_difference(after, before, sources))

    @property
    def metrics(self) -> dict[str, float | None]:
        """For the record of the training."""
        return {
            "heldout_loss_before": self.before.mean,
            "heldout_loss_after": self.after.mean,
            "change": self.change.mean,
            "change_ci95": self.change.ci95 if self.change.num > 1 else None,
        }

    @property
    def lines(self) -> list[str]:
        """For people."""
        change = self.change
        interval = f" +- {change.ci95:.4f} (95%, {change.num} sources)" if change.num > 1 else ""
        verdict = "better" if change.mean < 0 else "WORSE: fewer steps, a lower optimizer.lr, or more clips"
        if change.num < 2:
            verdict += "; one held-out source says little"  # no interval
        elif abs(change.mean) <= change.ci95:
            verdict = "no clear change"
        return [
            f"held-out loss: {self.before.mean:.4f} before, {self.after.mean:.4f} after",
            f"    change {change.mean:+.4f}{interval}: {verdict}",
        ]
