"""Pairs of clips, one better than the other: what a reward of prepared data learns from and is validated on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Generator, Tensor

from rats_video.datasets.prepared.cache import ClipRecord
from rats_video.datasets.prepared.preferences import Preference
from rats_video.datasets.shapes.corruptions import CORRUPTIONS, corrupt
from rats_video.pretraining.decoded import DecodedClips
from rats_video.seeds import seeded

Item = TypeVar("Item")


@dataclass(frozen=True)
class PairBatch:
    """B pairs of clips of one size.

    Args:
        good: `[B, T, 3, height, width]` in [0, 1].
        bad: likewise, the worse ones.
        damaged: frames of the bad ones that show why, `[B, T]` bool; None where only the clips as wholes are known.
        captions: of the clips whose words are known: the good ones, then the bad ones unless `damaged`.
        prompts: B, that both clips of a pair are scored for; empty where their captions differ.
        sources: B, where the good ones come from; pairs of one source are not independent.
        kind: what makes the difference: a corruption's name, or "preference".
    """

    good: Tensor
    bad: Tensor
    damaged: Tensor | None
    captions: list[str]
    prompts: list[str]
    sources: list[str]
    kind: str


class PairSource(Protocol):
    """A source of pairs."""

    def __len__(self) -> int:
        """The number of pairs to draw from."""
        ...

    def draw(self, size: int, generator: Generator) -> PairBatch:
        """At most `size` random pairs, all different."""
        ...

    def fixed(self, size: int) -> Iterator[PairBatch]:
        """All pairs, `size` at a time and of one kind each; the same at every call."""
        ...


class PreferencePairs:
    """Pairs that people judged."""

    def __init__(self, clips: DecodedClips, pairs: Sequence[Preference], device: torch.device) -> None:
        self._clips, self._device = clips, device
        self._sizes = _by_size(pairs, lambda pair: pair.preferred.size)

    def __len__(self) -> int:
        return sum(map(len, self._sizes))

    def draw(self, size: int, generator: Generator) -> PairBatch:
        """See `PairSource`."""
        return self._compare(_draw(self._sizes, size, generator))

    def fixed(self, size: int) -> Iterator[PairBatch]:
        """See `PairSource`."""
        return map(self._compare, _batches(self._sizes, size))

    def _compare(self, pairs: Sequence[Preference]) -> PairBatch:
        good, bad = [pair.preferred for pair in pairs], [pair.rejected for pair in pairs]
        said = [pair.caption for pair in pairs]
        own = [(pair.preferred.caption, pair.rejected.caption) for pair in pairs]
        return PairBatch(
            good=self._clips.videos(good, self._device),
            bad=self._clips.videos(bad, self._device),
            damaged=None,
            captions=[
                *(one if caption is None else caption for caption, (one, _) in zip(said, own, strict=True)),
                *(other if caption is None else caption for caption, (_, other) in zip(said, own, strict=True)),
            ],
            prompts=[
                caption if caption is not None else one if one == other else ""
                for caption, (one, other) in zip(said, own, strict=True)
            ],
            sources=[record.digest for record in good],
            kind="preference",
        )


class CorruptedPairs:
    """Clips, and copies of them that went wrong in one of the ways of `datasets.corruptions`.

    Args:
        clips: the pixels.
        records: which clips.
        device: to bring them to.
        seed: of what `fixed` draws.
        in_turn: `fixed` damages one batch in one way, the next in the next, rather than each in all.
    """

    def __init__(
        self,
        clips: DecodedClips,
        records: Sequence[ClipRecord],
        device: torch.device,
        seed: int,
        *,
        in_turn: bool = False,
    ) -> None:
        self._clips, self._device, self._seed, self._in_turn = clips, device, seed, in_turn
        self._sizes = _by_size(records, lambda record: record.size)

    def __len__(self) -> int:
        return sum(map(len, self._sizes))

    def draw(self, size: int, generator: Generator) -> PairBatch:
        """See `PairSource`; ways are mixed."""
        records = _draw(self._sizes, size, generator)
        good = self._clips.videos(records, self._device)
        return _damaged(records, good, corrupt(good, generator), "mixed")

    def fixed(self, size: int) -> Iterator[PairBatch]:
        """See `PairSource`: each clip in each way, or `in_turn`."""
        for number, records in enumerate(_batches(self._sizes, size)):
            good = self._clips.videos(records, self._device)
            ways = [number % len(CORRUPTIONS)] if self._in_turn else range(len(CORRUPTIONS))
            for index in ways:
                corruption = CORRUPTIONS[index]
                if corruption.__name__ == "swap" and len(records) == 1:  # with no other clip of its size
                    continue
                pair = corruption(good, good.roll(1, dims=0), seeded(self._seed, 23, number, index))
                yield _damaged(records, good, pair, corruption.__name__)


def _damaged(records: Sequence[ClipRecord], good: Tensor, pair: tuple[Tensor, Tensor], kind: str) -> PairBatch:
    captions = [record.caption for record in records]
    return PairBatch(good, *pair, captions, captions, [record.digest for record in records], kind)


def _by_size(items: Sequence[Item], size: Callable[[Item], Hashable]) -> list[list[Item]]:
    sizes: defaultdict[Hashable, list[Item]] = defaultdict(list)
    for item in items:
        sizes[size(item)].append(item)
    return list(sizes.values())


def _draw(sizes: list[list[Item]], size: int, generator: Generator) -> list[Item]:
    """Items of one size, which is drawn by how many there are of it."""
    counts = torch.tensor([float(len(items)) for items in sizes])
    items = sizes[int(torch.multinomial(counts, 1, generator=generator))]
    return [items[index] for index in torch.randperm(len(items), generator=generator)[:size].tolist()]


def _batches(sizes: list[list[Item]], size: int) -> Iterator[list[Item]]:
    return (items[start : start + size] for items in sizes for start in range(0, len(items), size))
