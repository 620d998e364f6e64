"""Model folders by path or by the name of one that ships with the package."""

from __future__ import annotations

import difflib
from pathlib import Path

from rats_video.errors import UserError

ASSETS = Path(__file__).parent / "assets"


def is_embedded(name: str) -> bool:
    """Whether a name is that of a folder that ships with the package."""
    return name not in {"", ".", ".."} and "/" not in name and (ASSETS / name).is_dir()


def resolve_folder(name_or_path: str, *, where: str) -> Path:
    """The folder a configuration names: an embedded one such as `tiny-wan`, or any path.

    Raises:
        UserError: there is no such folder.
    """
    if is_embedded(name_or_path):
        return ASSETS / name_or_path
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    embedded = sorted(path.name for path in ASSETS.iterdir() if path.is_dir()) if ASSETS.is_dir() else []
    close = difflib.get_close_matches(name_or_path, embedded, n=1)
    fix = f"did you mean {close[0]}?" if close else f"embedded ones: {', '.join(embedded)}"
    raise UserError(f"no such folder: {name_or_path}", where=where, fix=fix)
