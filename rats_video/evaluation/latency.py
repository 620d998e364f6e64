"""The time of one clip on its own, by part of the model."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import torch

from rats_video.evaluation.sweep import EvaluatedModel
from rats_video.evaluation.tables import ArmRow, Latency, aligned
from rats_video.inference.sampler import clip_noise, draw_pictures, fresh_noise, timed_batch
from rats_video.runtime import GIB
from rats_video.types import ClipSpec


@torch.no_grad()
def measure_latency(arm: EvaluatedModel, prompt: str, clip: ClipSpec, *, repeats: int, seed: int = 0) -> Latency:
    """Sample one clip of a prompt `repeats` times, after one of a single step to warm up.

    On a GPU each part is waited for, and the peak counts all allocations, those of other models in this process
    included. On a CPU there is no peak: a process seldom gives memory back, so a second arm would show the first one's.
    """
    device = arm.backbone.device
    noise = clip_noise(arm.backbone, clip, seed, 0)
    fresh = fresh_noise(noise, [(seed, 0)])
    pictures = draw_pictures(arm.backbone, [prompt], seed, [0])
    given = None if pictures is None else arm.backbone.given_frames(clip, *pictures)
    timed_batch(arm.backbone, [prompt], noise, replace(arm.spec, num_steps=1), given=given, fresh=fresh)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began, runs = time.perf_counter(), []
    for _ in range(repeats):
        parts = timed_batch(arm.backbone, [prompt], noise, arm.spec, given=given, fresh=fresh)[2]
        now = time.perf_counter()
        runs.append((now - began, *parts))
        began = now
    seconds, text, denoiser, decode = (median(column) for column in zip(*runs, strict=True))
    return Latency(
        seconds=seconds,
        text=text,
        denoiser=denoiser,
        decode=decode,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        repeats=repeats,
        load_average=os.getloadavg()[0],
    )


def latency_table(rows: Sequence[ArmRow]) -> list[str]:
    """The measured arms as a Markdown table, and a line on the measurement; nothing if no arm was measured."""
    found = [(row, row.latency) for row in rows if row.latency is not None]
    if not found:
        return []
    has_peak = any(latency.peak_bytes is not None for _, latency in found)
    table = [["arm", "NFE", "one clip, s", "text", "denoiser", "decode", *(["peak GiB"] if has_peak else [])]]
    for row, latency in found:
        parts = (latency.seconds, latency.text, latency.denoiser, latency.decode)
        peak = [] if latency.peak_bytes is None else [f"{latency.peak_bytes / GIB:.2f}"]
        table.append([row.arm, str(row.nfe), *(f"{seconds:.3f}" for seconds in parts), *peak])
    busy = max(latency.load_average for _, latency in found)
    how = f"Medians of {found[0][1].repeats} clips sampled alone; load average of the machine at most {busy:.1f}"
    return ["\n".join(aligned(table)), f"{how} ({os.cpu_count()} processors)."]
