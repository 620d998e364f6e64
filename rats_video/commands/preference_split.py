"""Splits the pairs of `train reward --data` by source."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from rats_video.datasets.prepared.cache import ClipCache, ClipRecord
from rats_video.datasets.prepared.preferences import Preference, split_by_source
from rats_video.errors import UserError
from rats_video.pretraining.comparisons import CorruptedPairs, PairSource, PreferencePairs
from rats_video.pretraining.decoded import DecodedClips
from rats_video.pretraining.preference import (
    PreferenceTrainConfig,
)
from rats_video.seeds import seeded
from rats_video.types import ClipSpec

_FEWEST_FRAMES = 5  # that every corruption can damage
Item = TypeVar("Item", ClipRecord, Preference)
Decode = Callable[[Sequence[ClipRecord]], tuple[DecodedClips, torch.device]]
"""Decodes clips: returns their pixels, and the device to use them on."""


@dataclass(frozen=True)
class PairSplit:
    """Pairs to train on, to choose the best weights by, and to validate on; no source is in two of these."""

    train: PairSource
    choosing: PairSource | None
    validation: PairSource | None
    records: tuple[ClipRecord, ...]
    """The clips that are trained on."""
    clip: ClipSpec
    """The size of one of them."""
    left_out: int
    """Pairs that would have one source in two parts."""


def check_split(cfg: PreferenceTrainConfig, cache: ClipCache, pairs: list[Preference] | None) -> None:
    """Raise UserError if there are too few pairs, or without them clips, to split; decodes nothing."""
    if pairs is None:
        _split(cfg, _long_enough(cache), cache)
    else:
        _split(cfg, pairs, cache)


def preferred_pairs(cfg: PreferenceTrainConfig, cache: ClipCache, pairs: list[Preference], decode: Decode) -> PairSplit:
    """Pairs that people judged."""
    train, choosing, validation, left_out = _split(cfg, pairs, cache)
    records = [record for pair in [*train, *choosing, *validation] for record in _records_of(pair)]
    clips, device = decode(records)
    return PairSplit(
        PreferencePairs(clips, train, device),
        PreferencePairs(clips, choosing, device) if choosing else None,
        PreferencePairs(clips, validation, device) if validation else None,
        tuple({record.key: record for pair in train for record in _records_of(pair)}.values()),
        cache.spec(records[0]),
        left_out,
    )


def corrupted_pairs(cfg: PreferenceTrainConfig, cache: ClipCache, decode: Decode) -> PairSplit:
    """Pairs of clips and corrupted copies of them."""
    train, choosing, validation, left_out = _split(cfg, _long_enough(cache), cache)
    clips, device = decode([*train, *choosing, *validation])
    return PairSplit(
        CorruptedPairs(clips, train, device, cfg.seed),
        CorruptedPairs(clips, choosing, device, cfg.seed, in_turn=True) if choosing else None,
        CorruptedPairs(clips, validation, device, cfg.seed) if validation else None,
        tuple(train),
        cache.spec(train[0]),
        left_out,
    )


def _long_enough(cache: ClipCache) -> list[ClipRecord]:
    long = [record for record in cache.records if record.num_frames >= _FEWEST_FRAMES]
    if not long:
        what = f"no clip has the {_FEWEST_FRAMES} frames that are damaged in time"
        raise UserError(what, where=str(cache.folder), fix="prepare longer clips, or give --preferences")
    return long


def _records_of(item: ClipRecord | Preference) -> tuple[ClipRecord, ...]:
    return (item,) if isinstance(item, ClipRecord) else (item.preferred, item.rejected)


def _split(
    cfg: PreferenceTrainConfig, items: Sequence[Item], cache: ClipCache
) -> tuple[list[Item], list[Item], list[Item], int]:
    """Items to train on, to choose by and to validate on; and how many were dropped, having sources in two of these.

    Raises:
        UserError: their sources cannot be split.
    """
    heldout = frozenset(record.digest for record in cache.of_split("heldout"))
    rest, validation = _divide(cfg, items, heldout)
    used = _sample(rest, cfg.num_pairs, cfg.seed)
    train, choosing = _divide(cfg, used, frozenset())
    if not train or (not validation and cfg.validation_share):
        sources = frozenset(record.digest for item in items for record in _records_of(item))
        otherwise = "--set validation_share=0 trains on all, unvalidated"
        if sources <= heldout:
            otherwise = "prepare with a smaller heldout share: --set heldout=0 holds out none"
        raise UserError(
            f"{_count(items, 'pair' if cfg.preferences else 'clip')} of {_count(sources, 'source')} cannot be split by "
            "source into some to train on and some to validate on",
            where=cfg.preferences or str(cfg.data), fix=f"give more, of other sources, or {otherwise}",
        )  # fmt: skip
    left_out = len(items) - len(rest) - len(validation) + len(used) - len(train) - len(choosing)
    return train, choosing, _sample(validation, cfg.validation_pairs, cfg.seed), left_out


def _count(things: Collection[object], name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def _divide(
    cfg: PreferenceTrainConfig, items: Sequence[Item], heldout: frozenset[str]
) -> tuple[list[Item], list[Item]]:
    wanted = min(cfg.validation_pairs, math.ceil(cfg.validation_share * len(items)))
    links = [frozenset(record.digest for record in _records_of(item)) for item in items]
    sides = split_by_source(links, heldout, wanted, cfg.seed)
    sided = list(zip(items, sides, strict=True))
    return [item for item, side in sided if side is False], [item for item, side in sided if side is True]


def _sample(items: list[Item], most: int, seed: int) -> list[Item]:
    chosen = torch.randperm(len(items), generator=seeded(seed, 22))[:most]
    return [items[index] for index in chosen.sort().values.tolist()]
