"""Output folders: claimed, locked, kept whole."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from pathlib import Path

from rats_video.errors import Interrupted, UserError
from rats_video.files import LOCK, locked
from rats_video.runtime import ALONE, Runtime
from rats_video.training.run_folder import CONFIG

_MOST_NAMED = 3  # runs, in an error


def claim_folder(folder: Path, *, overwrite: bool) -> None:
    """Empty and create an output folder; raises UserError if it holds something and `overwrite` is off."""
    check_free(folder, overwrite=overwrite)
    held = sorted(contents(folder), key=Path.is_dir)  # files first: what is half deleted is no run
    if held and folder.is_symlink():
        raise UserError("is a link", where=str(folder), fix=f"give what it points to: {folder.readlink()}")
    for path in held:
        if path.is_dir() and not path.is_symlink():  # links go, never what they point to
            shutil.rmtree(path)
        else:
            path.unlink()
    make_folder(folder)


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Raise UserError if a file is where an output folder is to be, or it holds something and `overwrite` is off."""
    if folder.exists() and not folder.is_dir():
        raise UserError("is a file", where=str(folder), fix="give another --output")
    if contents(folder) and not overwrite:
        raise UserError("already exists and is not empty", where=str(folder), fix="add --overwrite or another --output")


def claim_run(folder: Path, *, resume: bool, overwrite: bool) -> bool:
    """True if an output folder holds a run to continue; otherwise the folder is emptied to start one.

    Raises:
        UserError: it holds something, and neither flag is given or there is no run to resume.
    """
    is_run = (folder / CONFIG).is_file()
    if resume and is_run:
        return True
    if resume and contents(folder):
        check_run(folder)
    if is_run and not overwrite:
        raise UserError("holds a run", where=str(folder), fix="--resume goes on with it, --overwrite replaces it")
    claim_folder(folder, overwrite=overwrite)
    return False


def check_run(folder: Path) -> None:
    """Raise UserError if a folder holds no run to go on with; names the runs near it."""
    if (folder / CONFIG).is_file():
        return
    check_free(folder, overwrite=True)
    around = (folder.parent, *folder.parent.glob("*"), *folder.glob("*"))
    near = [path for path in around if (path / CONFIG).is_file()]
    near.sort(key=lambda run: SequenceMatcher(None, run.name, folder.name).ratio(), reverse=True)
    if contents(folder):
        what, fix = f"not a run: it has no {CONFIG}", "check --output"
    else:
        what, fix = "no run to go on with", "leave --resume out to start one"
    runs = f"runs near it: {', '.join(map(str, near[:_MOST_NAMED]))}; " if near else ""
    raise UserError(what, where=str(folder), fix=runs + fix)


def refuse_changes(folder: Path, changed: Sequence[str], fix: str = "") -> None:
    """Raise UserError if keys of a run's configuration changed since it was started; `fix` names a way of its own."""
    if changed:
        verb = "differs" if len(changed) == 1 else "differ"
        raise UserError(
            f"holds a run of another configuration: {', '.join(changed)} {verb}",
            where=str(folder), fix=fix or "give the same options, another --output, or --overwrite to start anew",
        )  # fmt: skip


def contents(folder: Path) -> list[Path]:
    """The contents of a folder, without our own lock."""
    return [path for path in folder.iterdir() if path.name != LOCK] if folder.is_dir() else []


def locked_output(folder: Path, runtime: Runtime = ALONE) -> contextlib.AbstractContextManager[None]:
    """Context in which no other process works in an output folder; one process of `runtime` locks it for all.

    Raises:
        UserError: another process works there.
    """
    return locked(folder) if runtime.is_main else contextlib.nullcontext()


@contextlib.contextmanager
def clean_interrupt(output: Path) -> Iterator[None]:
    """Ctrl-C exits cleanly; everything recorded as finished is complete on disk."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(f"stopped; {output} keeps what is done, and the same command makes the rest") from stop


def make_folder(folder: Path) -> None:
    """Make a folder and its parents; raises UserError where a file is in the way or writing is not allowed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make this folder: {error.strerror}", where=str(folder), fix="give another --output"
        ) from error
