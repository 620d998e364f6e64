"""`train reward --data`: a reward of prepared clips, from preferences or from damaged copies."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch

from rats_video.assets import resolve_folder
from rats_video.backbones.kinds import load_backbone
from rats_video.commands.device import pick_device
from rats_video.commands.folders import refuse_changes
from rats_video.commands.record import environment
from rats_video.commands.train_folder import RECORD, training_in
from rats_video.commands.train_reward import done_before
from rats_video.config.load import load_seeded
from rats_video.datasets.prepared.cache import CLIPS, ClipCache, ClipRecord
from rats_video.datasets.prepared.preferences import Preference, read_preferences, split_by_source
from rats_video.distillation.real_data import check_cache
from rats_video.errors import UserError, warn
from rats_video.evaluation.tables import aligned
from rats_video.files import weights_digest, write_json
from rats_video.pretraining.comparisons import CorruptedPairs, PairSource, PreferencePairs
from rats_video.pretraining.decoded import DecodedClips
from rats_video.pretraining.preference import (
    ALL,
    Accuracy,
    PreferenceTrainConfig,
    calibration,
    measure,
    train_preference,
    word_accuracy,
)
from rats_video.pretraining.vocabulary import content_words
from rats_video.reading import read_json
from rats_video.rewards.reward import build_reward, check_reward_prompts
from rats_video.rewards.word import WordReward
from rats_video.seeds import seeded
from rats_video.types import ClipSpec, Reward

DATA, PIXELS = "data.json", "pixels"
_FEWEST_FRAMES = 5  # that every corruption can damage
_WORDS_TOLD = 0.55  # of word pairs, below which words are hardly better than guessed
Item = TypeVar("Item", ClipRecord, Preference)
Decode = Callable[[Sequence[ClipRecord]], tuple[DecodedClips, torch.device]]
"""The pixels of clips, and the device that they are to be looked at on."""


@dataclass(frozen=True)
class Parts:
    """Pairs to train on, to choose the best weights by, and to validate on; no source is in two of these."""

    train: PairSource
    choosing: PairSource | None
    validation: PairSource
    records: tuple[ClipRecord, ...]
    """The clips that are trained on."""
    clip: ClipSpec
    """The size of one of them."""
    left_out: int
    """Pairs that would have one source in two parts."""


def run_train_preference(
    *,
    data: Path,
    preferences: Path | None,
    config: str,
    output: Path,
    seed: int | None,
    device: str,
    overrides: Sequence[str],
    resume: bool,
    overwrite: bool,
) -> list[str]:
    """`train reward --data`: a folder that the `word` reward loads, and OUTPUT/training.json says what it tells apart.

    Raises:
        UserError: the clips are of another VAE, the preferences are wrong, or there are too few of either.
    """
    given = {"data": data, "preferences": preferences}
    named = [f"{key}={json.dumps(str(path))}" for key, path in given.items() if path is not None]
    cfg = load_seeded(PreferenceTrainConfig, config, group="preference", overrides=[*overrides, *named], seed=seed)
    where, began = pick_device(device), time.monotonic()
    cache, model = ClipCache(data), resolve_folder(cfg.model, where="model")
    check_cache(cache, model, "VAE")
    pairs = None if cfg.preferences is None else read_preferences(Path(cfg.preferences), cache)
    with training_in(cfg, output, "preference", resume=resume, overwrite=overwrite) as is_done:
        if is_done:
            return done_before(output)
        _refuse_other_data(cfg, cache, output)

        def decode(records: Sequence[ClipRecord]) -> tuple[DecodedClips, torch.device]:
            backbone = load_backbone(model, where, with_text=False)
            return DecodedClips(cache, records, backbone, output / PIXELS), where

        parts = _damaged(cfg, cache, decode) if pairs is None else _preferred(cfg, cache, pairs, decode)
        lines, content = _train(cfg, parts, where, output)
        shutil.rmtree(output / PIXELS)
        seconds = time.monotonic() - began
        record = {"config": cfg.model_dump(mode="json"), "seed": cfg.seed, "seconds": round(seconds, 1)}
        write_json(output / RECORD, record | {"environment": environment(where)} | content)
        return [*lines, f"{seconds:.0f} s: {output}"]


def _refuse_other_data(cfg: PreferenceTrainConfig, cache: ClipCache, output: Path) -> None:
    """Remember what a training learns from; raises UserError if it is to go on with something else."""
    files = {"data": cache.folder / CLIPS} | ({"preferences": Path(cfg.preferences)} if cfg.preferences else {})
    digests = {key: weights_digest([path]) for key, path in files.items()}
    if (output / DATA).is_file():
        before = read_json(output / DATA)
        refuse_changes(output, [key for key, digest in digests.items() if before[key] != digest])
    write_json(output / DATA, digests)


def _preferred(cfg: PreferenceTrainConfig, cache: ClipCache, pairs: list[Preference], decode: Decode) -> Parts:
    """Pairs that people judged."""
    train, choosing, validation, left_out = _split(cfg, pairs, cache)
    records = [record for pair in [*train, *choosing, *validation] for record in _clips(pair)]
    clips, device = decode(records)
    return Parts(
        PreferencePairs(clips, train, device),
        PreferencePairs(clips, choosing, device) if choosing else None,
        PreferencePairs(clips, validation, device),
        tuple({record.key: record for pair in train for record in _clips(pair)}.values()),
        cache.spec(records[0]),
        left_out,
    )


def _damaged(cfg: PreferenceTrainConfig, cache: ClipCache, decode: Decode) -> Parts:
    """Clips, and damaged copies of them."""
    whole = [record for record in cache.records if record.num_frames >= _FEWEST_FRAMES]
    if not whole:
        what = f"no clip has the {_FEWEST_FRAMES} frames that are damaged in time"
        raise UserError(what, where=str(cache.folder), fix="prepare longer clips, or give --preferences")
    train, choosing, validation, left_out = _split(cfg, whole, cache)
    clips, device = decode([*train, *choosing, *validation])
    return Parts(
        CorruptedPairs(clips, train, device, cfg.seed),
        CorruptedPairs(clips, choosing, device, cfg.seed, in_turn=True) if choosing else None,
        CorruptedPairs(clips, validation, device, cfg.seed),
        tuple(train),
        cache.spec(train[0]),
        left_out,
    )


def _clips(item: ClipRecord | Preference) -> tuple[ClipRecord, ...]:
    return (item,) if isinstance(item, ClipRecord) else (item.preferred, item.rejected)


def _split(
    cfg: PreferenceTrainConfig, items: Sequence[Item], cache: ClipCache
) -> tuple[list[Item], list[Item], list[Item], int]:
    """To train on, to choose by, to validate on, at most as many as are asked for; and how many have sources in two.

    Raises:
        UserError: their sources cannot be split.
    """
    heldout = frozenset(record.digest for record in cache.of_split("heldout"))
    rest, validation = _divide(cfg, items, heldout)
    used = _some(rest, cfg.num_pairs, cfg.seed)
    train, choosing = _divide(cfg, used, frozenset())
    if not (train and validation):
        raise UserError(
            f"{len(items)} cannot be split by source into some to train on and some to validate on",
            where=cfg.preferences or str(cfg.data), fix="give more, of other sources",
        )  # fmt: skip
    left_out = len(items) - len(rest) - len(validation) + len(used) - len(train) - len(choosing)
    return train, choosing, _some(validation, cfg.validation_pairs, cfg.seed), left_out


def _divide(
    cfg: PreferenceTrainConfig, items: Sequence[Item], heldout: frozenset[str]
) -> tuple[list[Item], list[Item]]:
    wanted = min(cfg.validation_pairs, math.ceil(cfg.validation_share * len(items)))
    links = [frozenset(record.digest for record in _clips(item)) for item in items]
    sides = split_by_source(links, heldout, wanted, cfg.seed)
    sided = list(zip(items, sides, strict=True))
    return [item for item, side in sided if side is False], [item for item, side in sided if side is True]


def _some(items: list[Item], most: int, seed: int) -> list[Item]:
    chosen = torch.randperm(len(items), generator=seeded(seed, 22))[:most]
    return [items[index] for index in chosen.sort().values.tolist()]


def _train(
    cfg: PreferenceTrainConfig, parts: Parts, device: torch.device, output: Path
) -> tuple[list[str], dict[str, object]]:
    """Train and save the reward; returns lines to show, and what goes on record."""
    words = content_words([record.caption for record in parts.records], cfg.num_words, cfg.word_count)
    torch.manual_seed(cfg.seed)
    reward = WordReward(words, cfg.encoder, cfg.width, any_prompt=True, quality_weight=cfg.quality_weight).to(device)
    baseline = _baseline(cfg, parts, device)
    found = {"before": measure(reward, parts.validation, cfg.batch_size)}
    if baseline is not None:
        found["baseline"] = measure(baseline, parts.validation, cfg.batch_size)
    train_preference(cfg, reward, parts.train, parts.choosing, output)
    found = {"reward": measure(reward, parts.validation, cfg.batch_size)} | found
    metrics = calibration(reward, parts.validation, cfg.batch_size)
    told = word_accuracy(reward, parts.validation, cfg.batch_size) if words else None
    if told is not None:
        metrics["word_accuracy"] = told
    reward.save(output)
    counts = {
        "train": len(parts.train), "choosing": len(parts.choosing or ()), "validation": len(parts.validation),
        "left_out": parts.left_out,
    }  # fmt: skip
    accuracies = {name: {kind: asdict(one) for kind, one in kinds.items()} for name, kinds in found.items()}
    lines = [
        ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items()),
        f"words: {' '.join(words) or 'none'}",
        *_table(cfg, found),
        *(f"{name.replace('_', ' ')}: {value:.3f}" for name, value in metrics.items()),
        *_verdict(found["reward"][ALL], told, output),
    ]
    return lines, {"pairs": counts, "accuracy": accuracies, "metrics": metrics}


def _baseline(cfg: PreferenceTrainConfig, parts: Parts, device: torch.device) -> Reward | None:
    """The reward to compare with, unless it cannot judge these captions."""
    if cfg.baseline is None:
        return None
    baseline = build_reward(cfg.baseline, device, where="baseline", clip=parts.clip)
    try:
        check_reward_prompts(
            baseline, [prompt for one in parts.validation.fixed(cfg.batch_size) for prompt in one.prompts]
        )
    except UserError as error:
        warn(f"left out: {error.what}", where="baseline")
        return None
    return baseline


def _table(cfg: PreferenceTrainConfig, found: dict[str, dict[str, Accuracy]]) -> list[str]:
    """Shares of held-out pairs ranked right, by what makes the difference."""
    names = {"reward": "this reward", "before": "untrained"}
    if cfg.baseline is not None:
        names["baseline"] = cfg.baseline.kind
    rows = [["held-out pairs ranked right", "pairs", *(names[name] for name in found)]]
    for kind, one in found["reward"].items():
        shares = [kinds[kind] for kinds in found.values()]
        cells = [f"{share.share:.3f} ({share.low:.3f} to {share.high:.3f})" for share in shares]
        rows.append([kind, str(one.num_pairs), *cells])
    return aligned(rows, num_texts=1)


def _verdict(accuracy: Accuracy, told: float | None, output: Path) -> list[str]:
    """What to do next; warns of a reward that knows nothing."""
    if told is not None and told < _WORDS_TOLD:
        warn(
            "words are told apart hardly better than by guessing: set num_words=0, or give more clips",
            where=str(output),
        )
    if not accuracy.beats_chance:
        warn(
            f"no better than chance on held-out pairs: {accuracy.share:.3f}, 95% interval {accuracy.low:.3f} to "
            f"{accuracy.high:.3f} of {accuracy.num_sources} sources; do not distill with it, give more pairs",
            where=str(output),
        )
        return []
    chosen = f"--set reward.kind=word --set reward.path={shlex.quote(str(output))}"
    return [f"check it: rats-video rewards check reward {chosen}", f"use it:   rats-video distill {chosen}"]
