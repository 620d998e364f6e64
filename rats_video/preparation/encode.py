"""Turns clips of pixels into shards of latents and text, unit by unit."""

from __future__ import annotations

import io
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from rats_video.backbones.text_cache import TextCache
from rats_video.condition import Condition
from rats_video.datasets.prepared.cache import EMPTY, SHARDS, ClipRecord, save_shard
from rats_video.datasets.video.records import CutClip, ReadSource, SourceVideo, split_of
from rats_video.datasets.video.settings import PrepareConfig
from rats_video.errors import UserError
from rats_video.files import replacing
from rats_video.preparation.units import (
    Fingerprint,
    KeptClip,
    RunningStats,
    SourceBatch,
    SourceRecord,
    thumbs_path,
    write_record,
)

THUMB_HEIGHT = 96  # pixels of each of the three frames
THUMB_QUALITY = 70
Size = tuple[int, int, int]


class Encoder(Protocol):
    """The part of a backbone that is needed."""

    @property
    def device(self) -> torch.device:
        """The device of its models."""
        ...

    def encode(self, videos: Tensor) -> Tensor:
        """Normalised latents `[B, C, F, H, W]` of `[B, T, 3, height, width]` in [0, 1]."""
        ...

    def encode_text(self, prompts: Sequence[str]) -> Condition:
        """Encode B prompts."""
        ...


@dataclass
class _BucketBuffer:
    """Clips of one size, by their places in the unit, on their way into a shard: as pixels, then as latents."""

    waiting: list[int] = field(default_factory=list)
    frames: list[Tensor] = field(default_factory=list)
    encoded: list[int] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    first: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class SourceResult:
    """The result of a source, or of a piece of one.

    Args:
        read: neither clips nor a reason why is a prompt alone.
        waited: seconds after which it was given up.
        is_last: whether nothing more comes of the source.
    """

    read: ReadSource
    waited: float | None = None
    is_last: bool = True


class UnitEncoder:
    """Encodes one unit's sources, added in order, into shards of its own, and then writes its record.

    What comes out depends on the unit and the configuration alone.

    Args:
        folder: the cache.
        unit: what is encoded.
        cfg: how.
        encoder: VAE and text encoder.
    """

    def __init__(self, folder: Path, unit: SourceBatch, cfg: PrepareConfig, encoder: Encoder) -> None:
        self._folder, self._unit, self._cfg, self._encoder = folder, unit, cfg, encoder
        self._dtype: torch.dtype = getattr(torch, cfg.dtype)
        self._entries: list[tuple[SourceRecord, range]] = []
        self._pieces: list[SourceResult] = []
        self._clips: list[KeptClip] = []
        self._thumbs: dict[str, Tensor] = {}
        self._buffers: dict[Size, _BucketBuffer] = {}
        self._num_shards = 0

    def add(self, mark: Fingerprint, given: SourceResult) -> int:
        """Take the result of a source; returns how many clips.

        Args:
            mark: the source as it was before it was read.
            given: pieces of one source come one after the other.
        """
        read = given.read
        cuts: tuple[CutClip | None, ...] = read.clips if read.clips or read.skipped else (None,)
        for cut in cuts:
            record = describe(read, cut, self._cfg)
            buffer = self._buffers.setdefault(record.size, _BucketBuffer())
            if cut is None:
                buffer.encoded.append(len(self._clips))
            else:
                buffer.waiting.append(len(self._clips))
                buffer.frames.append(cut.frames)
                self._thumbs[record.key] = thumbnail(cut.frames)
            self._clips.append(KeptClip(record, RunningStats()))
            if len(buffer.waiting) == self._cfg.batch_size:
                self._encode(buffer)
            if len(buffer.encoded) >= self._cfg.shard_clips:
                self._write_shard(buffer)
        self._pieces.append(given)
        if given.is_last:
            skipped = tuple(each for piece in self._pieces for each in piece.read.skipped)
            waited = next((piece.waited for piece in self._pieces if piece.waited is not None), None)
            own = range(self._entries[-1][1].stop if self._entries else 0, len(self._clips))
            self._entries.append((SourceRecord(mark, read.digest, (), skipped, waited), own))
            self._pieces = []
        return len(cuts)

    def finish(self) -> None:
        """Write the rest, and the record last."""
        for buffer in self._buffers.values():
            self._encode(buffer)
            while buffer.encoded:
                self._write_shard(buffer)
        if self._thumbs:
            with replacing(thumbs_path(self._folder, self._unit.number), "thumbnails") as aside:
                save_file(self._thumbs, aside)
        entries = (replace(entry, clips=tuple(self._clips[i] for i in own)) for entry, own in self._entries)
        write_record(self._folder, self._unit.number, entries)

    @cached_property
    def _texts(self) -> TextCache:
        prompts = [source.caption or "" for _, source in self._unit.sources]
        return TextCache.encode(self._encoder.encode_text, prompts)

    def _encode(self, buffer: _BucketBuffer) -> None:
        if buffer.frames:
            videos = torch.stack(buffer.frames).to(self._encoder.device).float() / 255
            latents = self._encoder.encode(videos).cpu()
            buffer.latents += to_dtype(latents, self._dtype, "the latents").split(1)
            buffer.first += [frames[0].clone() for frames in buffer.frames]  # not a view, which would keep the clip
            for place, row in zip(buffer.waiting, latents, strict=True):
                self._clips[place] = replace(self._clips[place], moments=moments_of(row))
            buffer.encoded += buffer.waiting
            buffer.waiting, buffer.frames = [], []

    def _write_shard(self, buffer: _BucketBuffer) -> None:
        """Move the first clips from a buffer to the disk, a shard's worth at most."""
        most, name = self._cfg.shard_clips, f"{self._unit.number:06d}-{self._num_shards:04d}.safetensors"
        places, latents, first = buffer.encoded[:most], buffer.latents[:most], buffer.first[:most]
        text = self._texts.look_up([self._clips[place].record.caption for place in places], torch.device("cpu"))
        stored = stored_text(text, self._dtype)
        videos = (torch.cat(latents), torch.stack(first)) if latents else (None, None)
        save_shard(self._folder / SHARDS / name, videos[0], stored, videos[1])
        for row, place in enumerate(places):
            clip = self._clips[place]
            self._clips[place] = replace(clip, record=replace(clip.record, shard=name, row=row))
        del buffer.encoded[:most], buffer.latents[:most], buffer.first[:most]
        self._num_shards += 1


def encode_units(
    units: Iterable[SourceBatch],
    read: Callable[[Iterator[SourceVideo]], Iterable[SourceResult]],
    start: Callable[[SourceBatch], UnitEncoder],
    advance: Callable[[int, int], None],
) -> None:
    """Encode units one after the other, while the sources of those after them may be read ahead.

    Args:
        units: asked for when `read` wants their sources.
        read: gives what each source gave, in order, in one piece or several.
        start: makes a unit's encoder.
        advance: told of how many sources, 1 or 0, a piece was the last, and how many clips it gave.
    """
    begun: deque[SourceBatch] = deque()

    def sources() -> Iterator[SourceVideo]:
        for unit in units:
            begun.append(unit)
            yield from (source for _, source in unit.sources)

    results = iter(read(sources()))
    for first in results:
        unit = begun.popleft()
        encoder = start(unit)
        ours = itertools.chain((first,), results)
        for mark, _ in unit.sources:
            for given in ours:
                advance(int(given.is_last), encoder.add(mark, given))
                if given.is_last:
                    break
        encoder.finish()


def describe(read: ReadSource, cut: CutClip | None, cfg: PrepareConfig) -> ClipRecord:
    """A clip's record but for its place in a shard; of a prompt without a video where `cut` is None."""
    start, end = (0.0, 0.0) if cut is None else (cut.start, cut.end)
    num_frames, _, height, width = (0, 0, 0, 0) if cut is None else cut.frames.shape
    return ClipRecord(
        key=f"{read.digest[:24]}-{round(start * 1000)}-{round(end * 1000)}",
        source=read.source.name, digest=read.digest, start=start, end=end, caption=read.source.caption or "",
        num_frames=num_frames, height=height, width=width, split=split_of(read.digest, cfg), shard="", row=0,
    )  # fmt: skip


def moments_of(latents: Tensor) -> RunningStats:
    """Statistics of one clip's latents."""
    values = latents.double()
    mean = values.mean()
    return RunningStats(values.numel(), mean.item(), (values - mean).square().sum().item())


def to_dtype(values: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """Values as they are stored; raises UserError where that is no finite number."""
    if not values.isfinite().all():
        fix = "use float32" if values.dtype != torch.float32 else "it is float32 already: use another model"
        raise UserError(f"{what} come out as NaN or infinity", where="compute_dtype", fix=fix)
    stored = values.to(dtype)
    if not stored.isfinite().all():
        raise UserError(f"{what} are too large for it", where="dtype", fix="use float32, or bfloat16")
    return stored


def stored_text(condition: Condition, dtype: torch.dtype) -> Condition:
    """Encoded prompts as they are stored; their mask stays what it is."""
    pooled = None if condition.pooled is None else to_dtype(condition.pooled, dtype, "pooled prompts")
    return Condition(to_dtype(condition.embeds, dtype, "encoded prompts"), condition.mask, pooled)


def save_empty_prompt(folder: Path, encoder: Encoder, dtype: torch.dtype) -> None:
    """Write the encoded empty prompt, for guidance and prompt dropout, unless it exists."""
    if not (folder / EMPTY).is_file():
        save_shard(folder / EMPTY, None, stored_text(encoder.encode_text([""]), dtype))


def thumbnail(frames: Tensor) -> Tensor:
    """First, middle and last frame of `[T, 3, height, width]` uint8 side by side, as the bytes of a JPEG."""
    from PIL import Image

    chosen = [frames[index].permute(1, 2, 0).numpy() for index in (0, len(frames) // 2, len(frames) - 1)]
    width = max(1, round(frames.shape[3] * THUMB_HEIGHT / frames.shape[2]))
    strip = Image.new("RGB", (3 * width, THUMB_HEIGHT))
    for place, frame in enumerate(chosen):
        small = Image.fromarray(frame).resize((width, THUMB_HEIGHT), Image.Resampling.BICUBIC)
        strip.paste(small, (place * width, 0))
    file = io.BytesIO()
    strip.save(file, "JPEG", quality=THUMB_QUALITY)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
