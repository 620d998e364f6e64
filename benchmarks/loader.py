"""How long a training step waits for prepared clips, and how fast they are read.

    python benchmarks/loader.py [--steps 60]      -> results/loader.json

Random latents and text of the embedded default's sizes; the consumer is a whole training step of `train teacher --data`
on it (configs/finetune/tiny.yaml). Bar: the step waits for less than 1% of its time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import interleaved, median_ratio, write_result
from safetensors import safe_open

from rats_video.assets import resolve_folder
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.kinds import load_backbone
from rats_video.condition import Condition
from rats_video.config.load import load_config
from rats_video.datasets.prepared.cache import (
    CLIPS,
    EMPTY,
    FORMAT,
    SHARDS,
    CacheManifest,
    ClipCache,
    ClipRecord,
    save_shard,
    write_lines,
)
from rats_video.datasets.prepared.loader import ClipBatch, ClipLoader
from rats_video.optim import build_optimizer, ema_update_
from rats_video.pretraining.finetune import FinetuneConfig, flow_matching_losses
from rats_video.types import ClipSpec

BAR, SHARD_CLIPS, NUM_SHARDS = 0.01, 256, 8
CFG = load_config(FinetuneConfig, "tiny", group="finetune")
CLIP = ClipSpec(17, 64, 64, 8.0)


def write_cache(folder: Path, backbone: PipelineBackbone) -> ClipCache:
    """2,048 random clips in bfloat16."""
    text, records = backbone.encode_text([""]), []
    for shard in range(NUM_SHARDS):
        name = f"{shard}.safetensors"
        latents = torch.randn(SHARD_CLIPS, *backbone.latent_shape(CLIP)).bfloat16()
        rows = Condition(text.embeds.expand(SHARD_CLIPS, -1, -1).bfloat16())
        save_shard(folder / SHARDS / name, latents, rows)
        size = (CLIP.num_frames, CLIP.height, CLIP.width)
        records += [
            ClipRecord(f"{shard}-{row}", "", "", 0.0, 1.0, "", *size, "train", name, row) for row in range(SHARD_CLIPS)
        ]
    save_shard(folder / EMPTY, None, text)
    write_lines(folder / CLIPS, records, "records")
    CacheManifest(FORMAT, "tiny", "Wan", "", "", {}, CLIP.fps, complete=True).save(folder)
    return ClipCache(folder)


def wait_share(backbone: PipelineBackbone, next_batch: Callable[[], ClipBatch], steps: int) -> float:
    """Median over the steps of the share of their time that they wait for their clips."""
    shares = []
    optimizer = build_optimizer(CFG.optimizer, backbone.denoiser.parameters())
    average = {name: weight.detach().clone() for name, weight in backbone.weights.items()}
    for _ in range(steps):
        began = time.perf_counter()
        batch = next_batch()
        waited = time.perf_counter() - began
        noise, sigma = torch.randn_like(batch.latents), torch.rand(len(batch.latents))
        optimizer.zero_grad(set_to_none=True)
        flow_matching_losses(backbone, batch.latents, noise, sigma, batch.text).mean().backward()
        torch.nn.utils.clip_grad_norm_(backbone.denoiser.parameters(), CFG.optimizer.max_grad_norm)
        optimizer.step()
        ema_update_(average, backbone.weights, CFG.ema_decay)
        shares.append(waited / (time.perf_counter() - began))
    return statistics.median(shares[2:])


def plain_reads(folder: Path, records: tuple[ClipRecord, ...]) -> None:
    """The same rows by safetensors alone, from files that are open."""
    files = {name: safe_open(folder / SHARDS / name, framework="pt") for name in {each.shard for each in records}}
    for part in ("latents", "embeds"):
        rows = [files[each.shard].get_slice(part)[each.row : each.row + 1] for each in records]
        torch.cat(rows).float()


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    backbone = load_backbone(resolve_folder("tiny-wan", where="model"), torch.device("cpu"), torch.float32)
    with tempfile.TemporaryDirectory() as name:
        cache = write_cache(Path(name), backbone)
        loader = ClipLoader(cache, batch_size=CFG.batch_size, seed=0, prompt_dropout=0.1)
        batches = loader.batches(0)
        turns = iter(range(steps))
        ahead = wait_share(backbone, lambda: next(batches), steps)
        direct = wait_share(backbone, lambda: loader.batch(next(turns)), steps)
        plain = ClipLoader(cache, batch_size=256, seed=0)
        records = plain.batch(0).records
        taken = interleaved(
            {"loader": lambda: plain.batch(0), "plain": lambda: plain_reads(Path(name), records)}, repeats=5
        )
    write_result("loader", {
        "steps": steps,
        "clips a step": CFG.batch_size,
        "wait share": round(ahead, 5),
        "wait share without reading ahead": round(direct, 5),
        "bar": BAR,
        "clips a second": round(256 / statistics.median(taken["loader"])),
        "clips a second, plain safetensors": round(256 / statistics.median(taken["plain"])),
        "read time ratio": round(median_ratio(taken["loader"], taken["plain"]), 3),
    })  # fmt: skip


if __name__ == "__main__":
    main()
