"""Folders of reward models: what is in them, and loading it whole and without running code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from rats_video.errors import UserError


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a CLIP tokenizer."""
    return (folder / "tokenizer.json").is_file() or all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )


def load_transformers_model(kind: Any, folder: Path, model_type: str, dtype: torch.dtype) -> Any:
    """A model of the transformers class `kind` from a hub folder, on the CPU.

    Raises:
        UserError: the folder holds another model, lacks a weight, or has only pickled ones.
    """
    from transformers.utils import logging

    _check_files(kind, folder, model_type)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of missing weights is a table; ours is a line
    logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot load it as a {kind.__name__}: {reason}", where=str(folder)) from error
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"lacks {len(missing)} weights of a {kind.__name__}, e.g. {missing[0]}", where=str(folder))
    return model


def _check_files(kind: Any, folder: Path, model_type: str) -> None:
    try:
        found = json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"not a {kind.__name__}: no readable config.json in it",
            where=str(folder), fix="give the folder of a hub download",
        ) from error  # fmt: skip
    if found != model_type:
        raise UserError(f"is a {found!r} model, not a {kind.__name__} (model_type {model_type!r})", where=str(folder))
    if not list(folder.glob("*.safetensors")) and list(folder.glob("*.bin")):
        raise UserError(
            "only has pickled weights, which can run code when they are loaded", where=str(folder),
            fix=f"if you trust them: {kind.__name__}.from_pretrained(folder).save_pretrained(folder)",
        )  # fmt: skip
