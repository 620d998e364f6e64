"""Prompts for training and evaluation, split once and for all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Protocol

from rats_video.config.explain import nearest_of
from rats_video.datasets.prepared.cache import ClipCache
from rats_video.datasets.prompts.files import check_plain, place_of, read_prompts
from rats_video.datasets.prompts.pictured import PicturedPrompt, read_pictured
from rats_video.datasets.prompts.settings import (
    FilePromptsConfig,
    PreparedPromptsConfig,
    PromptsConfig,
    ShapesPromptsConfig,
)
from rats_video.datasets.shapes.paths import prompts_with_paths
from rats_video.datasets.shapes.render import split_combinations
from rats_video.errors import UserError

_MOST_KNOWN = 40  # words that an error lists


@dataclass(frozen=True)
class PromptSplit:
    """Prompts to train on, and prompts to score on; none is on both sides, nor there twice, but with another picture.

    Args:
        train: of the training.
        heldout: of the evaluation.
        dropped: how many more the source held: duplicates, and captions of a cache that are held out as well.
        pictures: of a list whose clips start from pictures, each row once; a prompt may be there with several.
    """

    train: tuple[str, ...]
    heldout: tuple[str, ...]
    dropped: int = 0
    pictures: tuple[PicturedPrompt, ...] = ()


def load_prompts(cfg: PromptsConfig) -> PromptSplit:
    """The prompts a configuration names.

    Raises:
        UserError: a file or cache is unreadable, a side is empty, two files share prompts, or no picture can be read.
    """
    match cfg:
        case ShapesPromptsConfig():
            train, heldout = split_combinations()
            if cfg.paths:
                return PromptSplit(prompts_with_paths(train, cfg.paths), prompts_with_paths(heldout, cfg.paths))
            return PromptSplit(tuple(a.prompt for a in train), tuple(a.prompt for a in heldout))
        case FilePromptsConfig(heldout=str(heldout)):
            return _of_two_files(cfg, heldout)
        case FilePromptsConfig(heldout_share=float(share)):
            return _of_one_file(cfg, share)
        case PreparedPromptsConfig():
            return _of_cache(Path(cfg.path), with_videos=cfg.first_frame)
        case _:
            raise AssertionError(cfg)  # pydantic lets none through


def is_heldout(prompt: str, share: float) -> bool:
    """True if a prompt belongs to the held-out `share`; depends on this prompt alone."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def prompt_path(name_or_path: str) -> Path:
    """The packaged prompts of that name, or the file at that path.

    Raises:
        UserError: it is neither.
    """
    packaged = {
        path.stem: path for path in (Path(str(resources.files("rats_video.configs"))) / "prompts").glob("*.txt")
    }
    path = packaged.get(name_or_path, Path(name_or_path))
    if not path.suffix and not os.path.exists(path):  # noqa: PTH110  # Path.exists raises at a name too long
        raise UserError(
            "no such prompts", where=name_or_path, fix=f"give a text file or one of: {', '.join(sorted(packaged))}"
        )
    return path


class Reader(Protocol):
    """A model, by the words that it knows."""

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt that it does not know."""

    def known_words(self) -> list[str]:
        """All words that it knows; none where it spells them."""


def check_prompt(prompt: str, reader: Reader, *, where: str = "--prompt", files: Sequence[Path] = ()) -> None:
    """Refuse a prompt the model cannot follow: no plain text, empty, or with words its text encoder never saw.

    Args:
        prompt: a prompt.
        reader: the model.
        where: what holds it.
        files: the lists that may hold it; the error names the line of the first that does.
    """
    check_plain(prompt, where=where)
    if not prompt.strip():
        raise UserError("the prompt is empty", where=where, fix="say what to draw")
    try:
        _check_words(prompt, reader)
    except UserError as error:
        place = next(filter(None, (place_of(prompt, file) for file in files)), where)
        raise UserError(error.what, where=place, fix=error.fix) from error


def prompt_files(cfg: PromptsConfig) -> list[Path]:
    """The lists that a configuration's prompts are read from."""
    names = [cfg.train, cfg.heldout] if isinstance(cfg, FilePromptsConfig) else []
    return [prompt_path(name) for name in names if name is not None]


def _check_words(prompt: str, reader: Reader) -> None:
    """Raise UserError, saying nothing of where, for unknown words; the model itself does for a wrong motion path."""
    if unknown := reader.unknown_words(prompt):
        what = f"this model does not know {', '.join(map(repr, unknown))} in {prompt!r}"
        raise UserError(what, fix=_known_instead(unknown, reader.known_words()))


def _known_instead(unknown: Sequence[str], known: Sequence[str]) -> str:
    near = {word: found for word in unknown if (found := nearest_of(word.lower(), known))}
    if near:
        return "nearest known: " + ", ".join(f"{found!r} for {word!r}" for word, found in near.items())
    more = f" and {len(known) - _MOST_KNOWN} more" if len(known) > _MOST_KNOWN else ""
    return f"it knows {', '.join(known[:_MOST_KNOWN])}{more}" if known else ""


@dataclass(frozen=True)
class _List:
    """The prompts of a list: `all` as often as they are there, the `distinct` ones, and the pictures beside them."""

    all: tuple[str, ...]
    distinct: tuple[str, ...]
    pictures: tuple[PicturedPrompt, ...] = ()


def _read_list(cfg: FilePromptsConfig, name: str) -> _List:
    path = prompt_path(name)
    if not cfg.first_frame:
        prompts = read_prompts(path)
        return _List(prompts, tuple(dict.fromkeys(prompts)))
    pictures = read_pictured(path)
    prompts = tuple(row.prompt for row in pictures)
    return _List(prompts, prompts, pictures)


def _of_two_files(cfg: FilePromptsConfig, heldout_file: str) -> PromptSplit:
    train, heldout = (_read_list(cfg, name) for name in (cfg.train, heldout_file))
    if shared := sorted(set(train.all) & set(heldout.all)):
        raise UserError(f"{len(shared)} prompts are in the training file too, e.g. {shared[0]!r}", where=heldout_file)
    dropped = sum(len(side.all) - len(side.distinct) for side in (train, heldout))
    return PromptSplit(train.distinct, heldout.distinct, dropped, train.pictures + heldout.pictures)


def _of_one_file(cfg: FilePromptsConfig, share: float) -> PromptSplit:
    found = _read_list(cfg, cfg.train)
    heldout = tuple(prompt for prompt in found.distinct if is_heldout(prompt, share))
    if not 0 < len(heldout) < len(found.distinct):
        raise UserError(
            f"holds out {len(heldout)} of the {len(found.distinct)} prompts of {cfg.train}",
            where="prompts.heldout_share",
            fix="give another share or more prompts, or a heldout file of its own",
        )  # fmt: skip
    train = tuple(prompt for prompt in found.distinct if not is_heldout(prompt, share))
    return PromptSplit(train, heldout, len(found.all) - len(found.distinct), found.pictures)


def _of_cache(folder: Path, *, with_videos: bool) -> PromptSplit:
    """The captions of a cache. A caption that held-out videos share with others is held out, and not trained on.

    Those of prompts alone are left out `with_videos`.
    """
    cache = ClipCache(folder)
    records = [r for r in cache.records if r.caption.strip() and (r.num_frames or not with_videos)]
    captions = [record.caption for record in records]
    heldout = dict.fromkeys(record.caption for record in records if record.split == "heldout")
    train = dict.fromkeys(caption for caption in captions if caption not in heldout)
    for caption in (*train, *heldout):
        check_plain(caption, where=str(folder))
    if not train or not heldout:
        missing = "held out" if train else "to train on"
        fix = "prepare with another share held out, or give prompts as files: kind: file, train and heldout"
        raise UserError(f"no caption {missing} in it", where=str(folder), fix=fix)
    return PromptSplit(tuple(train), tuple(heldout), len(captions) - len(train) - len(heldout))
