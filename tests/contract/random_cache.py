"""Writes small caches of random latents, in which every clip can be told from every other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from rats_video.datasets.cache import (
    CLIPS,
    EMPTY,
    FORMAT,
    SHARDS,
    CacheManifest,
    ClipCache,
    ClipRecord,
    Split,
    save_file,
    save_shard,
    text_tensors,
    write_lines,
)
from rats_video.seeds import seeded
from rats_video.types import TextCondition

Size = tuple[int, int, int]
Shape = tuple[int, int, int, int]
SIZE: Size = (5, 32, 32)
SHAPE: Shape = (2, 2, 4, 4)


def write_cache(
    folder: Path,
    clips: Mapping[Size, int],
    *,
    shapes: Mapping[Size, Shape] | None = None,
    heldout: int = 0,
    shard_clips: int = 4,
    dtype: torch.dtype = torch.float32,
    text_dim: int = 3,
    text_length: int = 4,
    vae: str = "vae",
    text: str = "text",
    seed: int = 0,
) -> ClipCache:
    """A cache of that many clips of each size, and `heldout` more of each, of random latents and text.

    The first number of a clip's latents is its place among all, so that a batch says which clips it holds; the text of
    clip i is full of i + 1, and the empty prompt's of 0.
    """
    generator, records = seeded(seed), []
    for size, count in clips.items():
        for start in range(0, count + heldout, shard_clips):
            rows = range(start, min(start + shard_clips, count + heldout))
            shape = (shapes or {}).get(size, SHAPE)
            places = torch.arange(len(rows)) + len(records)
            latents = torch.randn(len(rows), *shape, generator=generator)
            latents[:, 0, 0, 0, 0] = places
            embeds = (places + 1).float()[:, None, None].expand(-1, text_length, text_dim)
            name = f"{'x'.join(map(str, size))}-{start:05}.safetensors"
            save_shard(folder / SHARDS / name, latents.to(dtype), TextCondition(embeds.to(dtype)))
            for row, place in enumerate(rows):
                split: Split = "train" if place < count else "heldout"
                key = f"{len(records):04}"
                records.append(ClipRecord(key, f"{key}.mp4", key, 0.0, 1.0, f"clip {key}", *size, split, name, row))
    empty = TextCondition(torch.zeros(1, text_length, text_dim, dtype=dtype))
    save_file(text_tensors(empty), folder / EMPTY)
    write_lines(folder / CLIPS, records, "records")
    CacheManifest(FORMAT, "tiny", "Wan", vae, text, {"fps": 8.0}, fps=8.0, complete=True).save(folder)
    return ClipCache(folder)
