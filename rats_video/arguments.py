"""Arguments of the Python API: what is wrong with one is told by its name, not by that of a command's option."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from rats_video.errors import UserError

_OPTION = re.compile(
    r"--(model|base|num-frames|height|width|image|last-image|nfe|num-clips|batch-size|seed|device|output|overwrite|resume)\b"
)


@contextmanager
def in_python() -> Iterator[None]:
    """Context, or decorator, whose `UserError` names arguments, as `batch_size`, for options, as `--batch-size`."""
    try:
        yield
    except UserError as error:
        told = [text.replace("--set", "settings") for text in (error.what, error.where, error.fix)]
        what, where, fix = (_OPTION.sub(lambda found: found[1].replace("-", "_"), text) for text in told)
        raise type(error)(what, where=where, fix=fix) from error.__cause__


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise UserError unless `value` is a whole number from `least`, or None, which stands for the default."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise UserError(f"must be a whole number from {least}, got {value!r}", where=name)
