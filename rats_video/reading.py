"""Reading files of strangers: in bounds, from plain files only, without a surprise."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rats_video.errors import UserError

MOST_TEXT = 2**26  # bytes: no tokenizer, log or list of prompts comes near
MOST_LAYERS = 1000  # of a network; the deepest published ones have about a hundred
MOST_UNITS = 2**20  # of anything a model's configuration counts: words, positions, channels
# Whatever its name, a file may be a playlist that reads other files, or fetches them.
DEMUXER_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi", "protocol_whitelist": "file",
}  # fmt: skip
"""What FFmpeg may open where a clip is expected."""
DAMAGED = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError,
    ImportError, SafetensorError,
)  # fmt: skip
"""Errors that libraries raise deep inside at a wrong or damaged model folder."""


def check_plain_file(path: Path) -> None:
    """Raise OSError unless there is a file or folder: a device never ends, a pipe may never begin."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is no plain file", str(path))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The weights in a safetensors file, by name.

    Raises:
        OSError, SafetensorError: it cannot be read.
        UserError: one of them holds NaN or infinity.
    """
    check_plain_file(path)
    tensors = load_file(path)
    check_finite(tensors.items(), where=path)
    return tensors


def check_finite(weights: Iterable[tuple[str, Tensor]], *, where: Path) -> None:
    """Raise UserError, naming the first, for a model's weights of which one holds NaN or infinity.

    A network hands them on to whatever it computes: later nobody could tell where they came from.
    """
    for name, weight in weights:
        if weight.is_floating_point() and weight.itemsize > 1:  # torch has no test for 8-bit floats
            finite = weight.isfinite()
            if not bool(finite.all()):
                odd = int(finite.logical_not().sum())
                what = f"{name} holds NaN or infinity ({odd} of its {weight.numel()} numbers)"
                raise UserError(what, where=str(where), fix="download, convert or train it again")


def read_text(path: Path, most: int = MOST_TEXT) -> str:
    """The UTF-8 text of a file.

    Raises:
        OSError: it cannot be read, is no plain file, or holds more than `most` bytes.
        ValueError: it is not UTF-8, or the path holds a zero byte.
    """
    check_plain_file(path)
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it holds more than {most} bytes", str(path))
    return data.decode()


def read_json(path: Path, most: int = MOST_TEXT) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: as `read_text`.
        ValueError: it is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(read_text(path, most))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_sizes(path: Path) -> dict[str, Any]:
    """The `config.json` by which a network is about to be built.

    Raises:
        OSError: as `read_text`.
        ValueError: it is no JSON object, or claims sizes that no network has.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError("it is no JSON object")  # noqa: TRY004  # a mistake in a file, like the others
    _check_sizes("", config)
    return config


def _check_sizes(key: str, value: object) -> None:
    if isinstance(value, dict):
        for name, below in value.items():
            _check_sizes(name, below)
    elif isinstance(value, list):
        for below in value:
            _check_sizes(key, below)
    elif isinstance(value, int) and "theta" not in key:  # a base of angles counts nothing
        most = MOST_LAYERS if "layers" in key or "blocks" in key or "depth" in key else MOST_UNITS
        if abs(value) > most:
            raise ValueError(f"{key} is over {most}")


def strays(folder: Path) -> list[Path]:
    """Entries under a folder that are neither file nor folder: links that lead out of it, pipes, devices."""
    root = Path(os.path.realpath(folder))  # Path.resolve raises at a loop of links
    found = (Path(parent, name) for parent, folders, files in os.walk(root) for name in (*folders, *files))
    return sorted(path for path in found if _strays(path, root))


def _strays(path: Path, root: Path) -> bool:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return not Path(os.path.realpath(path)).is_relative_to(root)
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
