"""Files and folders that appear complete or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from rats_video.errors import UserError

HASHED_BYTES = 2**24  # at a time


@contextlib.contextmanager
def replacing(path: Path, what: str) -> Iterator[Path]:
    """Yield a path beside `path` for a file or folder that is moved onto it at the end, or deleted on any error.

    Args:
        path: the file or folder to appear, complete or not at all; missing parent folders are made.
        what: what it holds, for the error ("video").

    Raises:
        UserError: the folder or the file cannot be written (permissions, a full disk, a folder in its place).
    """
    unique = uuid.uuid4().hex
    partial, old = (path.with_name(f".{unique}.{kind}{path.suffix}") for kind in ("partial", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            if path.is_dir() and partial.is_dir():  # a folder cannot be replaced: step aside, never delete first
                path.replace(old)
            partial.replace(path)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            if partial.is_dir():
                shutil.rmtree(partial)
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:  # PyAV's disk errors derive from OSError, safetensors' do not
        reason = getattr(error, "strerror", None) or str(error)
        fix = "check that the folder can be written to and has space left"
        raise UserError(f"cannot write the {what}: {reason}", where=str(path), fix=fix) from error


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON."""
    with replacing(path, "record") as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def weights_digest(folders: Iterable[Path], suffixes: Collection[str] = (".safetensors",)) -> str:
    """SHA-256 of the files of these suffixes under each folder in turn; a file in a folder's place counts whole."""
    digest = hashlib.sha256()
    files = (
        sorted(path for path in folder.rglob("*") if path.suffix in suffixes) if folder.is_dir() else [folder]
        for folder in folders
    )
    for path in itertools.chain.from_iterable(files):
        with path.open("rb") as file:  # piece by piece: a model need not fit into host memory
            while piece := file.read(HASHED_BYTES):
                digest.update(piece)
    return digest.hexdigest()
