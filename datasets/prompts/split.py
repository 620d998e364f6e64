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
    """Prompts to train on, and prompts to score on; no prompt is there twice.

    Args:
        train: of the training.
        heldout: of the evaluation.
        dropped: how many more the source held: duplicates, and captions of a cache that are held out as well.
    """

    train: tuple[str, ...]
    heldout: tuple[str, ...]
    dropped: int = 0


def load_prompts(cfg: PromptsConfig) -> PromptSplit:
    """The prompts a configuration names.

    Raises:
        UserError: a file or cache is unreadable, a side is empty, or two files share prompts.
    """
    match cfg:
        case ShapesPromptsConfig():
            train, heldout = split_combinations()
            if cfg.paths:
                return PromptSplit(prompts_with_paths(train, cfg.paths), prompts_with_paths(heldout, cfg.paths))
            return PromptSplit(tuple(a.prompt for a in train), tuple(a.prompt for a in heldout))
        case FilePromptsConfig(heldout=str(heldout)):
            return _of_two_files(cfg.train, heldout)
        case FilePromptsConfig(heldout_share=float(share)):
            return _of_one_file(cfg.train, share)
        case PreparedPromptsConfig():
            return _of_cache(Path(cfg.path))
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


def _of_two_files(train_file: str, heldout_file: str) -> PromptSplit:
    found = [read_prompts(prompt_path(name)) for name in (train_file, heldout_file)]
    train, heldout = (tuple(dict.fromkeys(prompts)) for prompts in found)
    if shared := sorted(set(train) & set(heldout)):
        raise UserError(f"{len(shared)} prompts are in the training file too, e.g. {shared[0]!r}", where=heldout_file)
    return PromptSplit(train, heldout, sum(map(len, found)) - len(train) - len(heldout))


def _of_one_file(file: str, share: float) -> PromptSplit:
    found = read_prompts(prompt_path(file))
    prompts = tuple(dict.fromkeys(found))
    heldout = tuple(prompt for prompt in prompts if is_heldout(prompt, share))
    if not 0 < len(heldout) < len(prompts):
        raise UserError(
            f"holds out {len(heldout)} of the {len(prompts)} prompts of {file}", where="prompts.heldout_share",
            fix="give another share or more prompts, or a heldout file of its own",
        )  # fmt: skip
    return PromptSplit(
        tuple(prompt for prompt in prompts if not is_heldout(prompt, share)), heldout, len(found) - len(prompts)
    )


def _of_cache(folder: Path) -> PromptSplit:
    """The captions of a cache. A caption that held-out videos share with others is held out, and not trained on."""
    cache = ClipCache(folder)
    captions = [record.caption for record in cache.records if record.caption.strip()]
    heldout = dict.fromkeys(record.caption for record in cache.of_split("heldout") if record.caption.strip())
    train = dict.fromkeys(caption for caption in captions if caption not in heldout)
    for caption in (*train, *heldout):
        check_plain(caption, where=str(folder))
    if not train or not heldout:
        missing = "held out" if train else "to train on"
        fix = "prepare with another share held out, or give prompts as files: kind: file, train and heldout"
        raise UserError(f"no caption {missing} in it", where=str(folder), fix=fix)
    return PromptSplit(tuple(train), tuple(heldout), len(captions) - len(train) - len(heldout))
