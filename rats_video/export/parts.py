"""A base's parts beside a student's: copied byte for byte, big files linked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rats_video.backbones.folder import read_index
from rats_video.export.base import BASE, ExportedStudent
from rats_video.export.stock import TOKENIZER, misread_tokenizers
from rats_video.files import write_json
from rats_video.hub import INDEX

WEIGHTS = {".safetensors", ".bin"}


def bring_base(exported: ExportedStudent, folder: Path) -> None:
    """Copy the base too where no other program can have it."""
    if exported.carries_base:
        write_json(folder / BASE / INDEX, copy_parts(exported.base, folder / BASE, ()))


def copy_parts(base: Path, folder: Path, ours: Collection[str]) -> dict[str, Any]:
    """Copy a pipeline's parts but for ours, byte for byte; returns its index."""
    index = read_index(base)
    parts = {name for name, value in index.items() if isinstance(value, list) and value != [None, None]}
    for name in sorted(parts - set(ours)):
        shutil.copytree(base / name, folder / name, copy_function=_link_or_copy)
    index |= {name: ["transformers", TOKENIZER] for name in misread_tokenizers(base)}
    return {name: value for name, value in index.items() if name != "_name_or_path"}


def _link_or_copy(source: str, target: str) -> None:
    """Give a file of weights a second name, which takes no space and outlives the first; copy what people edit."""
    origin = Path(source).resolve()
    if origin.suffix in WEIGHTS:
        try:
            os.link(origin, target)
        except OSError:  # another file system, or a file that is not ours to link
            pass
        else:
            return
    shutil.copyfile(origin, target)
