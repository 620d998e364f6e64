"""Files that are there whole or not at all, also after a power cut; what killed processes left; a folder's owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rats_video import files
from rats_video.errors import UserError
from rats_video.files import locked, remove, replacing, tidy


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(path: Path, text: str) -> None:
    with replacing(path, "text") as aside:
        if path.suffix:
            aside.write_text(text)
        else:
            aside.mkdir()
            (aside / "inside").write_text(text)


def test_content_is_on_the_disk_before_its_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    replace = Path.replace

    def moved(path: Path, target: Path) -> Path:
        happened.append(f"moved to {target.name}")
        return replace(path, target)

    def synced(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        happened.append(f"synced {path.name.split('.')[-1]}")

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", moved)
    write(tmp_path / "run" / "folder", "text")
    assert happened == ["synced inside", "synced folder", "moved to folder", "synced run"]


def killed_at(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None], moves: int) -> None:
    """Do it in a fork that is killed instead of its `moves`-th renaming."""
    if pid := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        return
    replace, done = Path.replace, 0

    def counted(path: Path, target: Path) -> Path:
        nonlocal done
        done += 1
        if done == moves:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", counted)
    act()
    os._exit(1)


@pytest.mark.parametrize("moves", [1, 2])
def test_folder_is_never_lost_while_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int) -> None:
    write(tmp_path / "folder", "old")
    killed_at(monkeypatch, lambda: write(tmp_path / "folder", "new"), moves)
    assert names(tmp_path) != ["folder"]
    tidy(tmp_path)
    assert names(tmp_path) == ["folder"]
    assert (tmp_path / "folder" / "inside").read_text() == "old"


def test_folder_that_cannot_be_moved_in_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "folder", "old")
    replace = Path.replace

    def full(path: Path, target: Path) -> Path:
        if ".partial." in path.name:
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match="cannot write the text: No space left on device"):
        write(tmp_path / "folder", "new")
    assert names(tmp_path) == ["folder"]
    assert (tmp_path / "folder" / "inside").read_text() == "old"


def test_tidy_leaves_what_others_write(tmp_path: Path) -> None:
    with replacing(tmp_path / "theirs.txt", "text") as live:
        live.write_text("half")
        (tmp_path / live.name.replace("theirs", "mine")).touch()
        (tmp_path / ".partial.mine.txt").touch()  # not a name that we give
        tidy(tmp_path, {"mine.txt"})
        assert names(tmp_path) == sorted([live.name, ".partial.mine.txt"])
    assert (tmp_path / "theirs.txt").read_text() == "half"


def test_half_deleted_folder_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "folder", "old")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        killed_at(monkeypatch, lambda: remove(tmp_path / "folder"), 9)
    assert not (tmp_path / "folder").exists()
    tidy(tmp_path)
    assert names(tmp_path) == []


# -------------------------------------------------------------------------------------------------------------- locks

HOLD = """
import sys, time
from pathlib import Path
from rats_video.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_lock_names_its_holder_and_dies_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"run: process {holder.pid} on \S+ is working in it \(wait for it"):
        locked(folder).__enter__()
    holder.kill()
    holder.wait()
    assert names(folder) == [".lock"]
    with locked(folder):
        assert str(os.getpid()) in (folder / ".lock").read_text()
        (folder / "made").touch()
    assert names(folder) == ["made"]


def test_folder_in_which_nothing_was_made_is_not_left(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        assert names(tmp_path / "run") == [".lock"]
    assert names(tmp_path) == []
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine"):
        pass
    assert names(tmp_path) == ["mine"]


def test_lock_that_was_deleted_meanwhile_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = files.fcntl.flock

    def late(file: Any, how: int) -> None:
        (tmp_path / ".lock").unlink()  # by its former holder, between our opening and our locking it
        flock(file, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with pytest.raises(UserError, match="another process is working in it"):
        locked(tmp_path).__enter__()


def test_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", none)
    with locked(tmp_path):
        assert "this file system has no locks: make sure that nothing else works in it" in capsys.readouterr().err
