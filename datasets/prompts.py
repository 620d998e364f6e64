"""Prompts for training and evaluation, split once and for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from rats_video.config.distill import FilePrompts, ShapesPrompts
from rats_video.datasets.shapes import split_combinations
from rats_video.errors import UserError


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
    if not path.suffix and not path.exists():
        raise UserError(
            "no such prompts", where=name_or_path, fix=f"give a text file or one of: {', '.join(sorted(packaged))}"
        )
    return path


def read_prompt_file(path: Path) -> tuple[str, ...]:
    """One prompt a line, empty lines skipped; raises UserError if there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read the prompts: {reason}", where=str(path)) from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise UserError("no prompt in it", where=str(path), fix="write one prompt a line")
    return prompts


def check_prompt(prompt: str, unknown_words: Sequence[str], *, where: str = "--prompt") -> None:
    """Refuse a prompt the model cannot follow: empty, or with words its text encoder never saw."""
    if not prompt.strip():
        raise UserError("the prompt is empty", where=where, fix="say what to draw")
    if unknown_words:
        raise UserError(
            f"this model does not know {', '.join(repr(word) for word in unknown_words)} in {prompt!r}",
            where=where,
        )
