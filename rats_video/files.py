"""Files and folders that appear complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import uuid
from collections.abc import Collection, Container, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from rats_video.errors import BusyError, UserError, warn

HASHED_BYTES = 2**24  # at a time
LOCK = ".lock"
RECORD = "training.json"  # in a model's folder: how it was trained
_LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.(?P<kind>partial|old)\.(?P<name>.+)", re.DOTALL)
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # of a file system that has none


@contextlib.contextmanager
def replacing(path: Path, what: str) -> Iterator[Path]:
    """Yield a path beside `path` for a file or folder that is moved onto it at the end, or deleted on any error.

    What is there at the end is on the disk itself: it survives a power cut. A process that is killed leaves nothing
    that `tidy` does not undo.

    Args:
        path: the file or folder to appear, complete or not at all; missing parent folders are made.
        what: what it holds, for the error ("video").

    Raises:
        UserError: the folder or the file cannot be written (permissions, a full disk, a folder in its place).
    """
    partial, old = beside(path, "partial"), beside(path, "old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            _sync(partial)  # or the name might reach the disk before the content
            if path.is_dir() and partial.is_dir():  # a folder cannot be replaced: step aside, never delete first
                path.replace(old)
            partial.replace(path)
            _sync(path.parent, below=False)
        finally:
            if old.is_dir() and not path.exists():
                old.replace(path)
            if old.is_symlink():  # what it points to is not ours to delete
                old.unlink()
            shutil.rmtree(old, ignore_errors=True)
            if partial.is_dir():
                shutil.rmtree(partial)
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:  # PyAV's disk errors derive from OSError, safetensors' do not
        raise cannot_write(path, what, error) from error


def cannot_write(path: Path, what: str, error: Exception) -> UserError:
    """The one line of a write that failed."""
    reason = getattr(error, "strerror", None) or str(error)
    fix = "check that the folder can be written to and has space left"
    return UserError(f"cannot write the {what}: {reason}", where=str(path), fix=fix)


def beside(path: Path, kind: str = "partial") -> Path:
    """A new name in the same folder, of what `tidy` deletes (partial) or puts back (old) should we be killed."""
    return path.with_name(f".{uuid.uuid4().hex}.{kind}.{path.name}")


def _sync(path: Path, *, below: bool = True) -> None:
    """Wait until the disk holds a file, or a folder and what is in it."""
    for each in (*(path.rglob("*") if below else ()), path):
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL or not each.is_dir():  # some network file systems sync no folders
                raise
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a folder that is there whole or not at all, should we be killed meanwhile."""
    doomed = beside(path, "partial")
    path.replace(doomed)
    shutil.rmtree(doomed)


def tidy(folder: Path, names: Container[str] | None = None) -> None:
    """Undo what killed processes left in a folder: delete what was half-written, put back what was set aside.

    Args:
        folder: not those below it.
        names: the files and folders in it, which nobody else may be writing now; None for all.
    """
    for left in folder.glob(".*"):
        match = _LEFTOVER.fullmatch(left.name)
        if match is None or (names is not None and match["name"] not in names):
            continue
        target = folder / match["name"]
        if match["kind"] == "old" and not target.exists():  # killed between stepping aside and moving in
            left.replace(target)
        elif left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep all other processes that ask from working in a folder; one that stays empty is deleted again.

    The lock is the kernel's, on FOLDER/.lock, and ends with its process, however that ends. On NFS it also holds
    between machines (of one that crashed it is freed when its lease runs out); a file system without locks only gets a
    warning.

    Raises:
        BusyError: another process works there.
        UserError: the folder cannot be made.
    """
    path, is_ours = folder / LOCK, not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot make this folder: {error.strerror}", where=str(folder), fix="give another --output"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())  # or just deleted
        except BlockingIOError:
            is_free = False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            is_free = True
            warn("this file system has no locks: make sure that nothing else works in it", where=str(folder))
        if not is_free:
            file.seek(0)
            raise BusyError(
                f"{file.read() or 'another process'} is working in it", where=str(folder),
                fix="wait for it, or give another --output",
            )  # fmt: skip
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if is_ours:
                with contextlib.suppress(OSError):  # it holds something
                    folder.rmdir()


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON."""
    with replacing(path, "record") as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def json_digest(content: object) -> str:
    """SHA-256 of `content` as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
