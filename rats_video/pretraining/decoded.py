"""Prepared clips as pixels: decoded once, kept as bytes on disk, read from there row by row."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rats_video.datasets.prepared.cache import ClipCache, ClipRecord
from rats_video.errors import UserError
from rats_video.files import json_digest, replacing, tidy
from rats_video.progress import ProgressBar
from rats_video.types import Backbone

_FILE_BYTES = 2**28  # of a file, and so of the memory that writing one takes
_BATCH_PIXELS = 2**21  # decoded at a time: thirty clips of the embedded model, one of a real one


class DecodedClips:
    """Clips as the VAE makes them, which is what a reward will judge.

    They lie in `folder` until `forget`; decoding that was interrupted goes on with what is there.

    Args:
        cache: where the latents are.
        records: the clips; one that is named twice is decoded once.
        backbone: whose VAE made them.
        folder: for the bytes.

    Raises:
        UserError: the disk has no room for them, or a shard is damaged.
    """

    def __init__(self, cache: ClipCache, records: Iterable[ClipRecord], backbone: Backbone, folder: Path) -> None:
        self._places: dict[str, tuple[Any, int]] = {}
        parts = {folder / _name(cache, part): part for part in _parts(records)}
        tidy(folder)
        missing = {path: part for path, part in parts.items() if not path.is_file()}
        _check_room(folder, sum(_bytes(record) for part in missing.values() for record in part))
        with ProgressBar("decode clips", sum(map(len, missing.values()))) as progress:
            for path, part in missing.items():
                videos = [_advance(progress, piece) for piece in _decode(cache, part, backbone)]
                with replacing(path, "decoded clips") as aside:
                    save_file({"videos": torch.cat(videos)}, aside)
        for path, part in parts.items():
            file: Any = safe_open(path, framework="pt")  # mapped, not read
            rows = file.get_slice("videos")
            self._places |= {record.key: (rows, row) for row, record in enumerate(part)}

    def videos(self, records: Sequence[ClipRecord], device: torch.device) -> Tensor:
        """`[B, T, 3, height, width]` in [0, 1], of B clips of one size."""
        places = [self._places[record.key] for record in records]
        return torch.cat([rows[row : row + 1] for rows, row in places]).to(device).float() / 255


def _advance(progress: ProgressBar, videos: Tensor) -> Tensor:
    progress.advance(len(videos))
    return videos


def _bytes(record: ClipRecord) -> int:
    return 3 * record.num_frames * record.height * record.width


def _parts(records: Iterable[ClipRecord]) -> Iterator[list[ClipRecord]]:
    """The clips of a file each: of one size."""
    sizes: defaultdict[tuple[int, int, int], list[ClipRecord]] = defaultdict(list)
    for record in {record.key: record for record in records}.values():
        sizes[record.size].append(record)
    for part in sizes.values():
        yield from _pieces(part, _FILE_BYTES // _bytes(part[0]))


def _pieces(records: list[ClipRecord], length: int) -> Iterator[list[ClipRecord]]:
    length = max(1, length)
    return (records[start : start + length] for start in range(0, len(records), length))


def _name(cache: ClipCache, part: list[ClipRecord]) -> str:
    """The name of a file, by a digest of all that decides its content."""
    content = [cache.manifest.vae, cache.manifest.settings, *((record.key, record.size) for record in part)]
    return f"{json_digest(content)[:32]}.safetensors"


def _check_room(folder: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the decoded clips take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free", where=str(folder),
            fix="set a smaller num_pairs, or another --output",
        )  # fmt: skip


@torch.no_grad()
def _decode(cache: ClipCache, part: list[ClipRecord], backbone: Backbone) -> Iterator[Tensor]:
    for piece in _pieces(part, 3 * _BATCH_PIXELS // _bytes(part[0])):
        latents, _ = cache.read(piece)
        yield (backbone.decode(latents.to(backbone.device)).clamp(0, 1) * 255).round().byte().cpu()
