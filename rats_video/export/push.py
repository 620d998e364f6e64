"""An export on the model hub: what may go there, and its upload."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import rats_video
from rats_video.errors import Interrupted, UserError
from rats_video.export.card import TAG, read_front_matter
from rats_video.export.verify import UNCHECKED
from rats_video.hub import is_repository
from rats_video.hub_errors import client_errors, refusal

_CARD = "README.md"
_OURS = ["*.safetensors", "*.json"]  # left by an earlier export of another form, they would pass for this one's
_EMPTY = {".gitattributes", _CARD, "LICENSE", "LICENSE.md", "LICENSE.txt"}  # what a new repository may hold


def check_name(repository: str, *, where: str) -> None:
    """Raise UserError unless the hub takes the name."""
    if not is_repository(repository):
        raise UserError(
            f"not a repository's name: {repository}", where=where,
            fix="give USER/NAME: letters, digits, and . - _ between them, at most 96 in all",
        )  # fmt: skip


def check_export(folder: Path) -> None:
    """Raise UserError unless a folder holds an export that was compared with its student."""
    card = folder / _CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if TAG not in (read_front_matter(text).get("tags") or []):
        raise UserError(f"no export: no {_CARD} of `export model` in it", where=str(folder),
                        fix="give a folder that `rats-video export model` wrote")  # fmt: skip
    if UNCHECKED in text:
        raise UserError("was never compared with its student", where=str(folder),
                        fix="export it again without --no-verify")  # fmt: skip


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload all of a checked export in one go, over an earlier one; returns its address.

    Weights and configurations that the export does not have are deleted there; pictures and clips are not.

    Args:
        folder: of the export.
        repository: USER/NAME, made if it is not there.
        private: whether it is to be one that only its owner sees.

    Raises:
        UserError: the hub does not take it, or holds something else of that name; says how to try again.
        Interrupted: by Ctrl-C.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import LocalTokenNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    again = f"the export is whole in {folder}; to try again: {_command(folder, repository, private=private)}"
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        if get_token() is None:
            raise LocalTokenNotFoundError
        api = HfApi()
        _check_place(api, repository, private=private)
        api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, delete_patterns=_OURS,
            commit_message=f"Export of rats-video {rats_video.__version__}",
        )  # fmt: skip
    except KeyboardInterrupt as stop:
        raise Interrupted(f"stopped; {again}") from stop
    except UserError as error:
        raise UserError(error.what, where=repository, fix=f"{error.fix}; {again}") from error
    except client_errors() as error:
        if (found := refusal(error, repository)) is None:
            raise
        what, fix = found
        raise UserError(what, where=repository, fix=f"{fix}; {again}") from error
    return f"{api.endpoint}/{repository}"


def _check_place(api: Any, repository: str, *, private: bool) -> None:
    """Raise UserError where the name is that of something else, or of what everybody sees."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        there = api.model_info(repository)
    except RepositoryNotFoundError:  # or one that the token may not see: making it tells
        return
    files = {file.rfilename for file in there.siblings or ()}
    if TAG not in (there.tags or []) and files - _EMPTY:
        what = f"holds something else than an export of rats-video: {min(files - _EMPTY)}"
        raise UserError(what, fix="give another name")
    if private and there.private is False:
        raise UserError("is public already", fix="make it private in its settings on the hub, or leave --private out")


def _command(folder: Path, repository: str, *, private: bool) -> str:
    return shlex.join(["rats-video", "export", "push", str(folder), repository, *(["--private"] if private else [])])
