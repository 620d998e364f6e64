"""Batches of prepared clips in an order that any number of processes, and any resumed run, agree on."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rats_video.condition import Condition
from rats_video.datasets.prepared.cache import ClipCache, ClipRecord, Split
from rats_video.errors import UserError
from rats_video.seeds import seeded
from rats_video.types import ClipSpec

ORDER, DROPOUT = 31, 32
"""Streams of random numbers."""


@dataclass(frozen=True)
class ClipBatch:
    """Prepared clips of one size.

    Args:
        latents: `[B, C, F, H, W]`, float32, on the CPU (in pinned memory where this process uses CUDA).
        text: of B prompts, on the CPU; the empty prompt's where it was dropped.
        records: where each clip comes from.
        spec: their size.
    """

    latents: Tensor
    text: Condition
    records: tuple[ClipRecord, ...]
    spec: ClipSpec


class ClipLoader:
    """An endless, seeded stream of batches; `batch(step)` depends on nothing else, so nothing has to be resumed.

    The clips of one size are a bucket: a stream in which each is seen once, in random order, before any is seen again.
    A batch holds the next clips of one bucket, also across that border, so that no clip is left out and fewer clips
    than a batch repeat in it. Buckets take turns in proportion to their clips.

    Args:
        cache: where the clips are.
        batch_size: clips a batch, over all processes.
        seed: of the order.
        split: which clips.
        rows: of each batch, this process's share (`Runtime.rows`); None for all.
        size: frames, height and width of the only bucket to take; None for all.
        prompt_dropout: share of prompts, 0 to 1, that are replaced by the empty one.
        prefetch: batches that `batches` reads ahead.

    Raises:
        UserError: there are no such clips.
    """

    def __init__(
        self,
        cache: ClipCache,
        *,
        batch_size: int,
        seed: int,
        split: Split = "train",
        rows: slice | None = None,
        size: tuple[int, int, int] | None = None,
        prompt_dropout: float = 0.0,
        prefetch: int = 2,
    ) -> None:
        self._cache, self._batch_size, self._seed = cache, batch_size, seed
        self._rows, self._dropout, self._prefetch = rows or slice(None), prompt_dropout, prefetch
        clips: dict[tuple[int, int, int], list[ClipRecord]] = {}
        for record in cache.of_split(split):
            if size in {None, record.size}:
                clips.setdefault(record.size, []).append(record)
        if not clips:
            what = f"{split} clips" if size is None else f"{split} clips of {size[0]} x {size[1]} x {size[2]}"
            raise UserError(
                f"it has no {what}", where=str(cache.folder), fix="prepare more videos, or with other settings"
            )
        self._buckets = [_Bucket(clips[each], seed) for each in sorted(clips)]
        self._sizes = [len(clips[each]) for each in sorted(clips)]

    def batch(self, step: int) -> ClipBatch:
        """This process's rows of the batch of any step, counted from 0.

        Raises:
            UserError: a shard is missing or damaged.
        """
        bucket, before = turn(self._sizes, step)
        places = range(before * self._batch_size, (before + 1) * self._batch_size)[self._rows]
        records = tuple(map(self._buckets[bucket].clip, places))
        latents, text = self._cache.read(records)
        drawn = torch.rand(self._batch_size, generator=seeded(self._seed, DROPOUT, step))
        text = _without(text, (drawn < self._dropout)[self._rows].tolist(), self._cache.empty_prompt)
        if torch.cuda.is_initialized():
            latents, text = latents.pin_memory(), text.map(Tensor.pin_memory)
        return ClipBatch(latents, text, records, self._cache.spec(records[0]))

    def batches(self, start: int) -> Iterator[ClipBatch]:
        """The batches from a step on, read ahead by a thread that ends when the iterator is closed or dropped.

        Raises:
            UserError: as `batch`, when it is that batch's turn.
        """
        reader = ThreadPoolExecutor(1, "clips")
        try:
            ahead = deque(reader.submit(self.batch, step) for step in range(start, start + self._prefetch))
            for step in itertools.count(start + self._prefetch):
                ahead.append(reader.submit(self.batch, step))
                yield ahead.popleft().result()
        finally:
            reader.shutdown(cancel_futures=True)


def turn(sizes: Sequence[int], step: int) -> tuple[int, int]:
    """The bucket whose turn a step is, and the turns it had before; each has its share of the clips in turns.

    The first bucket takes its share of the steps as evenly as whole numbers can, the second its share of those that
    are left, and so on: no step's answer needs another's.
    """
    left = sum(sizes)
    for bucket, size in enumerate(sizes):
        before = step * size // left
        if (step + 1) * size // left > before:
            return bucket, before
        step -= before
        left -= size
    raise AssertionError("the last bucket takes all that are left")


class ReadAhead:
    """`loader.batch` for somebody who mostly asks for one step after the other: a thread has read it by then."""

    def __init__(self, loader: ClipLoader) -> None:
        self._loader, self._next = loader, -1
        self._batches: Iterator[ClipBatch] = iter(())

    def __call__(self, step: int) -> ClipBatch:
        """The batch of a step; raises UserError as `ClipLoader.batch`."""
        if step != self._next:  # a run that begins, goes on or goes back; the former thread ends with its iterator
            self._batches = self._loader.batches(step)
        self._next = -1  # where reading fails, nothing was read ahead
        batch = next(self._batches)
        self._next = step + 1
        return batch


class _Bucket:
    """The clips of one size as an endless stream of permutations."""

    def __init__(self, records: Sequence[ClipRecord], seed: int) -> None:
        self._records, self._seed = records, seed
        self._order = lru_cache(maxsize=2)(self._shuffled)  # two: a batch may lie across their border

    def clip(self, place: int) -> ClipRecord:
        epoch, index = divmod(place, len(self._records))
        return self._records[int(self._order(epoch)[index])]

    def _shuffled(self, epoch: int) -> Tensor:
        generator = seeded(self._seed, ORDER, *self._records[0].size, epoch)
        return torch.randperm(len(self._records), generator=generator)


def _without(condition: Condition, dropped: Sequence[bool], empty: Condition) -> Condition:
    """The conditions of B prompts, those dropped replaced by the empty one's."""
    if not any(dropped):
        return condition
    return Condition.cat([empty if drop else _row(condition, place) for place, drop in enumerate(dropped)])


def _row(condition: Condition, place: int) -> Condition:
    return condition.map(lambda part: part[place : place + 1])
