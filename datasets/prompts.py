"""Prompts for training and evaluation, split once and for all."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from rats_video.config.distill import FilePrompts, ShapesPrompts
from rats_video.datasets.shapes import split_combinations
from rats_video.errors import CONTROLS, UserError
from rats_video.reading import read_text

MOST_PROMPTS = 2**20  # in a file
MOST_CHARACTERS = 10_000  # in a prompt; tokenizers that read 512 tokens take minutes over a megabyte


@dataclass(frozen=True)
class PromptSplit:
    """Prompts the student trains on, and prompts it is judged on."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]


def load_prompts(cfg: ShapesPrompts | FilePrompts) -> PromptSplit:
    """The prompts a configuration names; raises UserError if a file is unreadable, empty or shares prompts."""
    match cfg:
        case ShapesPrompts():
            train, heldout = split_combinations()
            return PromptSplit(tuple(a.prompt for a in train), tuple(a.prompt for a in heldout))
        case FilePrompts():
            split = PromptSplit(*(read_prompt_file(prompt_path(name)) for name in (cfg.train, cfg.heldout)))
            shared = sorted(set(split.train) & set(split.heldout))
            if shared:
                raise UserError(
                    f"{len(shared)} prompts are in the training file too, e.g. {shared[0]!r}", where=cfg.heldout
                )
            return split


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


def read_prompt_file(path: Path) -> tuple[str, ...]:
    """One prompt a line, empty lines skipped.

    Raises:
        UserError: it cannot be read, holds no prompt or more than `MOST_PROMPTS`, or one that is not `check_plain`.
    """
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read the prompts: {reason}", where=str(path)) from error
    lines = {number: line.strip() for number, line in enumerate(text.splitlines(), 1) if line.strip()}
    prompts = tuple(lines.values())
    if not prompts:
        raise UserError("no prompt in it", where=str(path), fix="write one prompt a line")
    if len(prompts) > MOST_PROMPTS:
        raise UserError(f"{len(prompts)} prompts; at most {MOST_PROMPTS} are taken", where=str(path))
    for number, prompt in lines.items():
        check_plain(prompt, where=f"{path}, line {number}")
    return prompts


def check_plain(prompt: str, *, where: str) -> None:
    """Refuse a prompt that is no text a person wrote: control characters, stray bytes, a book on one line."""
    if found := CONTROLS.search(prompt):
        raise UserError(f"holds the control character {found[0]!a}", where=where, fix="save it as plain UTF-8 text")
    if len(prompt) > MOST_CHARACTERS:
        raise UserError(f"a prompt of {len(prompt)} characters; models read {MOST_CHARACTERS} at most", where=where)


def check_prompt(prompt: str, unknown_words: Callable[[str], Sequence[str]], *, where: str = "--prompt") -> None:
    """Refuse a prompt the model cannot follow: no plain text, empty, or with words its text encoder never saw."""
    check_plain(prompt, where=where)
    if not prompt.strip():
        raise UserError("the prompt is empty", where=where, fix="say what to draw")
    if unknown := unknown_words(prompt):
        raise UserError(
            f"this model does not know {', '.join(map(repr, unknown))} in {prompt!r}",
            where=where,
        )
