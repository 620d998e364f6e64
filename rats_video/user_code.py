"""Code of the user's own, named in a configuration as `package.module:Name`: when it may run, and how it is imported.

It runs with all the user's rights, whoever wrote the configuration that names it: a downloaded one, a run's or a latent
reward's. So it runs only where the environment says `RATS_VIDEO_TRUST_CODE=1`, and says so.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import traceback
from contextlib import AbstractContextManager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, JsonValue

from rats_video.errors import UserError

TRUST = "RATS_VIDEO_TRUST_CODE"
"""Environment variable that lets code of the user's run; processes that are started inherit it."""


def _module_and_name(target: str) -> str:
    module, _, name = target.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise ValueError(f"must be package.module:Name, got {target!r}")
    return target


def _can_be_written_down(options: dict[str, Any]) -> dict[str, Any]:
    json.dumps(options, allow_nan=False)  # raises ValueError at infinity, and at integers of thousands of digits
    return options


Target = Annotated[str, AfterValidator(_module_and_name)]
"""`package.module:Name`; modules of the current directory are found too."""

Options = Annotated[dict[str, JsonValue], AfterValidator(_can_be_written_down)]
"""Named arguments."""


def load_code(target: str, *, kind: str, where: str) -> tuple[Any, Path]:
    """Import a target, if the user trusts it: the object and the file of its code.

    Args:
        target: `package.module:Name`.
        kind: "reward" or "method", for messages.
        where: the section of the configuration that names it.

    Raises:
        UserError: the code is not trusted, there is no such module or name, or the module raises something.
    """
    source = source_file(target, where=where)
    if os.environ.get(TRUST) != "1":
        raise UserError(
            f"{target} is code, in {source}, and would run with all your rights", where=f"{where}.target",
            fix=f"read it, then start again with {TRUST}=1 in the environment",
        )  # fmt: skip
    _announce(kind, source)
    module_name, _, name = target.partition(":")
    with Blame(f"{kind} {target}", source, "cannot be imported"):
        module = importlib.import_module(module_name)
    found = getattr(module, name, None)
    if found is None:
        raise UserError(f"no {name!r} in {source}", where=f"{where}.target")
    return found, source


def source_file(target: str, *, where: str) -> Path:
    """The file of a target's module; neither it nor a package above it is run.

    Raises:
        UserError: there is none.
    """
    module = target.partition(":")[0]
    # At the end, so that nothing here hides an installed package; for good, because code may import when it runs.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()
    names = module.split(".")
    spec: ModuleSpec | None = None
    for end in range(1, len(names) + 1):  # importlib.util.find_spec would import the packages above
        within = None if spec is None else spec.submodule_search_locations
        full = ".".join(names[:end])
        found = None if end > 1 and within is None else (finder.find_spec(full, within) for finder in sys.meta_path)
        spec = next(filter(None, found or ()), None)
    if spec is None or not spec.has_location or spec.origin is None:
        raise UserError(
            f"no module {module!r}, neither in {here} nor installed", where=f"{where}.target",
            fix="start rats-video in the folder that holds it",
        )  # fmt: skip
    return Path(spec.origin)


@functools.cache  # once a process, however often it is built
def _announce(kind: str, source: Path) -> None:
    print(f"{kind}: runs code of {source}", file=sys.stderr)  # noqa: T201


class Blame(AbstractContextManager[None]):
    """Turns an exception of the user's code into one line, with the exception as its cause.

    Args:
        where: the kind and the target, e.g. "reward my_module:Name".
        source: the file of its code; the line that raised is named if it is in there.
        what: "fails" or "cannot be built".
    """

    def __init__(self, where: str, source: Path, what: str) -> None:
        self._where, self._source, self._what = where, source, what

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Memory that ran out is explained elsewhere.
        if not isinstance(error, Exception) or isinstance(error, UserError | torch.OutOfMemoryError):
            return
        lines = [frame.lineno for frame in traceback.extract_tb(trace) if frame.filename == str(self._source)]
        at = f"{self._source.name}, line {lines[-1]}" if lines else ""
        raise UserError(
            f"{self._what}: {type(error).__name__}: {error}".rstrip(": "), where=self._where, fix=at
        ) from error
