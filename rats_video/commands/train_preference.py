"""`train reward --data`: a reward of prepared clips, from preferences or from corrupted copies."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Unpack

import torch

from rats_video.assets import resolve_folder
from rats_video.backbones.kinds import load_backbone
from rats_video.commands.folders import refuse_changes
from rats_video.commands.preference_split import PairSplit, check_split, corrupted_pairs, preferred_pairs
from rats_video.commands.train_folder import Made, Training, TrainOptions
from rats_video.datasets.prepared.cache import CLIPS, ClipCache, ClipRecord
from rats_video.datasets.prepared.preferences import read_preferences
from rats_video.distillation.real_data import check_cache
from rats_video.errors import UserError, warn
from rats_video.evaluation.tables import aligned
from rats_video.files import weights_digest, write_json
from rats_video.pretraining.comparisons import PairSource
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
from rats_video.types import ClipSpec, Reward

DATA, PIXELS = "data.json", "pixels"
_WORDS_TOLD = 0.55  # of word pairs, below which words are hardly better than guessed


def run_train_preference(*, data: Path, preferences: Path | None, **options: Unpack[TrainOptions]) -> list[str]:
    """`train reward --data`: a folder that the `word` reward loads, and OUTPUT/training.json says what it tells apart.

    Raises:
        UserError: the clips are of another VAE, the preferences are wrong, or there are too few of either.
    """
    given = {"data": data, "preferences": preferences}
    named = [f"{key}={json.dumps(str(path))}" for key, path in given.items() if path is not None]
    options["overrides"] = [*options["overrides"], *named]
    training, output = Training(PreferenceTrainConfig, "preference", options), options["output"]
    cfg, device = training.cfg, training.device
    cache, model = ClipCache(data), resolve_folder(cfg.model, where="model")
    check_cache(cache, model, "VAE")
    pairs = None if cfg.preferences is None else read_preferences(Path(cfg.preferences), cache)
    check_split(cfg, cache, pairs)

    def decode(records: Sequence[ClipRecord]) -> tuple[DecodedClips, torch.device]:
        backbone = load_backbone(model, device, with_text=False)
        return DecodedClips(cache, records, backbone, output / PIXELS), device

    def make() -> Made:
        _refuse_other_data(cfg, cache, output)
        split = corrupted_pairs(cfg, cache, decode) if pairs is None else preferred_pairs(cfg, cache, pairs, decode)
        made = _train(cfg, split, device, output)
        shutil.rmtree(output / PIXELS)
        return made

    return training.run(make)


def _refuse_other_data(cfg: PreferenceTrainConfig, cache: ClipCache, output: Path) -> None:
    """Record digests of the training data; raises UserError if a resumed training has other data."""
    files = {"data": cache.folder / CLIPS} | ({"preferences": Path(cfg.preferences)} if cfg.preferences else {})
    digests = {key: weights_digest([path]) for key, path in files.items()}
    if (output / DATA).is_file():
        before = read_json(output / DATA)
        refuse_changes(output, [key for key, digest in digests.items() if before[key] != digest])
    write_json(output / DATA, digests)


def _train(cfg: PreferenceTrainConfig, split: PairSplit, device: torch.device, output: Path) -> Made:
    """Train and save the reward; returns lines to show, and what goes on record."""
    words = content_words([record.caption for record in split.records], cfg.num_words, cfg.word_count)
    torch.manual_seed(cfg.seed)
    reward = WordReward(words, cfg.encoder, cfg.width, any_prompt=True, quality_weight=cfg.quality_weight).to(device)
    found, metrics, told, validation = {}, {}, None, split.validation
    if validation is not None:
        found["before"] = measure(reward, validation, cfg.batch_size)
        if (baseline := _baseline(cfg, split.clip, validation, device)) is not None:
            found["baseline"] = measure(baseline, validation, cfg.batch_size)
    train_preference(cfg, reward, split.train, split.choosing, output)
    if validation is not None:
        found = {"reward": measure(reward, validation, cfg.batch_size)} | found
        metrics = calibration(reward, validation, cfg.batch_size)
        told = word_accuracy(reward, validation, cfg.batch_size) if words else None
    if told is not None:
        metrics["word_accuracy"] = told
    reward.save(output)
    counts = {
        "train": len(split.train), "choosing": len(split.choosing or ()), "validation": len(validation or ()),
        "left_out": split.left_out,
    }  # fmt: skip
    accuracies = {name: {kind: asdict(one) for kind, one in kinds.items()} for name, kinds in found.items()}
    lines = [
        ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items()),
        f"words: {' '.join(words) or 'none'}",
        *(_table(cfg, found) if found else ()),
        *(f"{name.replace('_', ' ')}: {value:.3f}" for name, value in metrics.items()),
        *_verdict(found["reward"][ALL] if found else None, told, output),
    ]
    return lines, {"pairs": counts, "accuracy": accuracies, "metrics": metrics}


def _baseline(
    cfg: PreferenceTrainConfig, clip: ClipSpec, validation: PairSource, device: torch.device
) -> Reward | None:
    """The reward to compare with, unless it cannot score these captions."""
    if cfg.baseline is None:
        return None
    baseline = build_reward(cfg.baseline, device, where="baseline", clip=clip)
    try:
        check_reward_prompts(baseline, [prompt for one in validation.fixed(cfg.batch_size) for prompt in one.prompts])
    except UserError as error:
        warn(f"left out: {error.what}", where="baseline")
        return None
    return baseline


def _table(cfg: PreferenceTrainConfig, found: dict[str, dict[str, Accuracy]]) -> list[str]:
    """Shares of held-out pairs ranked right, by kind of difference."""
    names = {"reward": "this reward", "before": "untrained"}
    if cfg.baseline is not None:
        names["baseline"] = cfg.baseline.kind
    rows = [["held-out pairs ranked right", "pairs", *(names[name] for name in found)]]
    for kind, one in found["reward"].items():
        shares = [kinds[kind] for kinds in found.values()]
        cells = [f"{share.share:.3f} ({share.low:.3f} to {share.high:.3f})" for share in shares]
        rows.append([kind, str(one.num_pairs), *cells])
    return aligned(rows, num_texts=1)


def _verdict(accuracy: Accuracy | None, told: float | None, output: Path) -> list[str]:
    """The next commands; warns of a reward that is no better than chance."""
    if told is not None and told < _WORDS_TOLD:
        warn(
            "words are told apart hardly better than by guessing: set num_words=0, or give more clips",
            where=str(output),
        )
    if accuracy is None:
        warn("nothing was held out: nobody knows what it tells apart; do not distill with it alone", where=str(output))
    elif not accuracy.beats_chance:
        warn(
            f"no better than chance on held-out pairs: {accuracy.share:.3f}, 95% interval {accuracy.low:.3f} to "
            f"{accuracy.high:.3f} of {accuracy.num_sources} sources; do not distill with it, give more pairs",
            where=str(output),
        )
        return []
    chosen = f"--set reward.kind=word --set reward.path={shlex.quote(str(output))}"
    return [f"check it: rats-video rewards check reward {chosen}", f"use it:   rats-video distill {chosen}"]
