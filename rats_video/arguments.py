"""The Python API's own words: its messages name arguments, as `batch_size`, where a command's name options."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import yaml

from rats_video.errors import Interrupted, UserError, worded

_COMMAND = r"(?:rats-video|hf|pip) [^,;()`]*"  # is to be typed in a shell, so it stays as it is
_SET = r"--set [\w.]+=(?:\[[^\]]*\]|\{[^}]*\}|[^\s,;()]+)"
_NAMES = "prompt|model|base|num-frames|height|width|image|last-image|nfe|num-clips|batch-size|seed|device|output"
_WORDS = re.compile(
    rf"{_COMMAND}|(?P<set>{_SET}(?: {_SET})*)|--(?P<bare>set)\b|--(?P<flag>overwrite|resume)\b"
    rf"|--(?P<name>{_NAMES})\b(?: (?P<value>\d+|cpu|cuda|DIR)\b)?"
)


@contextmanager
def in_python() -> Iterator[None]:
    """Context, or decorator, in which errors, warnings and `Interrupted` name arguments, not options."""
    try:
        with worded(as_arguments):
            yield
    except UserError as error:
        what, where, fix = map(as_arguments, (error.what, error.where, error.fix))
        raise type(error)(what, where=where, fix=fix) from error.__cause__
    except Interrupted as stopped:
        raise Interrupted(as_arguments(str(stopped)), stopped.code) from None


def as_arguments(text: str) -> str:
    """`text` with arguments for options: `nfe=8` for `--nfe 8`, `settings={'seed': 1}` for `--set seed=1`."""
    return _WORDS.sub(_as_argument, text)


def _as_argument(found: re.Match[str]) -> str:
    if found["set"]:
        pairs = (text.removeprefix("--set ").split("=", 1) for text in re.findall(_SET, found["set"]))
        return f"settings={ {key: _value(text) for key, text in pairs} }"
    if found["bare"]:
        return "settings"
    if found["flag"]:
        return f"{found['flag']}=True"
    if found["name"] is None:
        return found[0]
    name, value = found["name"].replace("-", "_"), found["value"]
    if value is None:
        return name
    return f"{name}={value}" if value.isdigit() or value == "DIR" else f'{name}="{value}"'


def _value(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def check_count(name: str, value: object, least: int = 1, *, optional: bool = False) -> None:
    """Raise UserError unless `value` is a whole number from `least`, or None where that is `optional`."""
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"must be a whole number from {least}, got {value!r}", where=name)
