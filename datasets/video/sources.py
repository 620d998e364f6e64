"""Lists the source videos of a user: a folder, a table, archives, prompts, or the synthetic shapes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rats_video.datasets.prepared.cache import Skipped
from rats_video.datasets.prompts.files import check_plain, read_prompts
from rats_video.datasets.video.archives import DamagedArchive, index_archive
from rats_video.datasets.video.records import SourceVideo
from rats_video.datasets.video.settings import PrepareConfig
from rats_video.datasets.video.shape_clips import list_shapes
from rats_video.datasets.video.tables import (
    IN_FOLDER,
    LISTS,
    LISTS_OF_CAPTIONS,
    SUFFIXES,
    VideoRow,
    read_lists,
    read_table,
)
from rats_video.errors import UserError, printable
from rats_video.reading import check_plain_file, read_text

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".flv", ".wmv", ".ogv", ".3gp",
     ".gif")
)  # fmt: skip
CAPTION_SUFFIXES = (".txt", ".caption")
LOOKED_FOR = f"videos (*.mp4, *.mkv, *.webm ...), {', '.join(IN_FOLDER)}, videos.txt with prompts.txt, or *.tar"

NO_CAPTION = "no caption"
MISSING = "missing file"
NOT_LISTED = "not in the folder's table"
OUTSIDE = "a link that leads out of the folder"
DUPLICATE = "duplicate row"
BAD_NAME = "file name is not UTF-8"


@dataclass(frozen=True)
class SourceList:
    """Contents of SOURCE: `videos` to read, in a fixed order, and the skipped rest, with reasons."""

    videos: tuple[SourceVideo, ...]
    skipped: tuple[Skipped, ...] = ()


Found = SourceVideo | Skipped


def find_sources(source: str, cfg: PrepareConfig) -> SourceList:
    """List what SOURCE holds, in an order that the file system has no part in.

    Args:
        source: `shapes`; a folder of videos, of a table (`metadata.csv`), of `videos.txt` with `prompts.txt`, or of
            tar archives, at any depth; a table; an archive; a video; a text file of prompts.
        cfg: `missing_caption`, and what shapes depend on.

    Raises:
        UserError: there is nothing of this, or a table is damaged.
    """
    if source == "shapes":
        return SourceList(tuple(list_shapes(cfg)))
    path = Path(source)
    try:
        check_plain_file(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no such file or folder"
        raise UserError(
            f"cannot read it: {reason}", where=source, fix="give a folder, a table, an archive, or shapes"
        ) from error
    found = list(_in_folder(path) if path.is_dir() else _in_file(path))
    return _sorted(found, cfg, source)


def _sorted(found: Iterable[Found], cfg: PrepareConfig, source: str) -> SourceList:
    videos: dict[tuple[str, float, float], SourceVideo] = {}
    skipped = []
    for each in found:
        one = _checked(each, cfg) if isinstance(each, SourceVideo) else each
        if isinstance(one, Skipped):
            skipped.append(replace(one, name=printable(one.name)))
            continue
        place = (one.name, one.start, float("inf") if one.end is None else one.end)
        if place in videos:
            skipped.append(Skipped(one.name, DUPLICATE))
        videos.setdefault(place, one)
    if not videos and not skipped:
        raise UserError("no video in it", where=source, fix=f"looked for {LOOKED_FOR}")
    ordered = tuple(videos[place] for place in sorted(videos))
    return SourceList(ordered, tuple(sorted(skipped, key=lambda each: (each.name, each.reason))))


def _checked(source: SourceVideo, cfg: PrepareConfig) -> Found:
    try:
        source.name.encode()
        caption = " ".join((source.caption or "").removeprefix("\ufeff").split())
        check_plain(caption, where=source.name)
    except UnicodeEncodeError:
        return Skipped(source.name, BAD_NAME)
    except UserError as error:
        return Skipped(source.name, "caption is no plain text", error.what)
    if not caption and cfg.missing_caption == "skip" and source.kind == "video":
        return Skipped(source.name, NO_CAPTION)
    return replace(source, caption=caption or None)


def _in_file(path: Path) -> Iterator[Found]:
    suffix = path.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        names = {path.with_suffix(each).name for each in CAPTION_SUFFIXES if path.with_suffix(each).is_file()}
        yield from _video(path, path.name, names)
    elif suffix == ".tar":
        yield from _archive(path, path.name)
    elif suffix in SUFFIXES:
        rows = read_table(path)
        if any(row.file for row in rows):
            yield from _rows(rows, path.parent, "")
        else:
            texts = (row.caption for row in rows)
            yield from (
                SourceVideo(f"{path.name}:{number}", path, text, kind="prompt", index=number)
                for number, text in enumerate(texts, 1)
            )
    elif suffix == ".txt":
        prompts = read_prompts(path)
        if all(os.path.splitext(prompt)[1].lower() in VIDEO_SUFFIXES for prompt in prompts):  # noqa: PTH122
            raise UserError("lists videos, not prompts", where=str(path), fix="give its folder, with prompts.txt in it")
        yield from (
            SourceVideo(f"{path.name}:{number}", path, text, kind="prompt", index=number)
            for number, text in enumerate(prompts, 1)
        )
    else:
        raise UserError(
            "is nothing that can be prepared", where=str(path), fix=f"give a folder, or a file of {LOOKED_FOR}"
        )


def _in_folder(top: Path) -> Iterator[Found]:
    """The sources below a folder; files that a table does not list, below its own folder, are skipped."""
    root = os.path.realpath(top)
    inside = [root]
    if os.path.basename(parent := os.path.dirname(root)) == "snapshots":  # noqa: PTH119, PTH120
        inside.append(os.path.join(os.path.dirname(parent), "blobs"))  # noqa: PTH118, PTH120  # where the hub links to
    todo: list[tuple[str, set[str] | None]] = [("", None)]
    while todo:
        below, listed = todo.pop()
        folder = top / below
        try:
            with os.scandir(folder) as entries:
                seen = sorted((each for each in entries if not each.name.startswith(".")), key=lambda each: each.name)
        except OSError as error:
            yield Skipped(below or ".", "cannot be read", error.strerror or "")
            continue
        names = {entry.name for entry in seen}
        if (rows := _folder_table(folder, names)) is not None:
            yield from _rows(rows, folder, below)
            listed = {os.path.normpath(os.path.join(below, row.file)) for row in rows}  # noqa: PTH118
        for entry in seen:
            name = f"{below}{entry.name}"
            if entry.is_symlink() and not _is_in(inside, target := os.path.realpath(entry.path)):
                yield Skipped(name, OUTSIDE, target)
            elif entry.is_dir(follow_symlinks=False):
                todo.append((f"{name}/", listed))
            elif os.path.isfile(entry.path):  # noqa: PTH113  # entry.is_file raises at a loop of links
                yield from _folder_file(Path(entry.path), name, names, listed)


def _is_in(folders: list[str], target: str) -> bool:
    return any(target == folder or target.startswith(folder + os.sep) for folder in folders)


def _folder_file(path: Path, name: str, names: set[str], listed: set[str] | None) -> Iterator[Found]:
    """A file of a folder: `names` lie beside it, `listed` are the videos of the table it is subject to."""
    suffix = path.suffix.lower()
    if suffix == ".tar":
        yield from _archive(path, name)
    elif suffix in VIDEO_SUFFIXES and listed is None:
        yield from _video(path, name, names)
    elif suffix in VIDEO_SUFFIXES and listed is not None and name not in listed:
        yield Skipped(name, NOT_LISTED)


def _folder_table(folder: Path, names: set[str]) -> list[VideoRow] | None:
    tables = [name for name in IN_FOLDER if name in names]
    videos = next((name for name in LISTS if name in names), None)
    captions = next((name for name in LISTS_OF_CAPTIONS if name in names), None)
    pair = [f"{videos} with {captions}"] if videos and captions else []
    if len(tables) + len(pair) > 1:
        raise UserError(f"has {' and '.join(tables + pair)}", where=str(folder), fix="give one of them as SOURCE")
    if tables:
        return read_table(folder / tables[0])
    return read_lists(folder / videos, folder / captions) if videos and captions else None


def _video(path: Path, name: str, names: set[str]) -> Iterator[Found]:
    """A video and the caption beside it; `names` are the files there."""
    caption = next((each for s in CAPTION_SUFFIXES if (each := path.stem + s) in names), None)
    try:
        text = read_text(path.with_name(caption), 2**20) if caption else None
    except OSError as error:
        yield Skipped(name, "caption cannot be read", error.strerror or "")
    except ValueError:
        yield Skipped(name, "caption is not UTF-8 text")
    else:
        yield SourceVideo(name, path, text)


def _rows(rows: Iterable[VideoRow], folder: Path, below: str) -> Iterator[Found]:
    for number, row in enumerate(rows, 1):
        name = row.file if os.path.isabs(row.file) else os.path.normpath(below + row.file)  # noqa: PTH117
        path = folder / row.file
        if not row.file:
            yield Skipped(f"row {number}", "names no file")
        elif row.problem:
            reason, _, detail = row.problem.partition(": ")
            yield Skipped(name, reason, detail)
        elif "\0" in row.file or not os.path.exists(path):  # noqa: PTH110  # Path.exists raises at a name too long
            yield Skipped(name, MISSING)
        elif not os.path.isfile(path):  # noqa: PTH113
            yield Skipped(name, "no plain file")
        else:
            yield SourceVideo(name, path, row.caption, row.start or 0.0, row.end)


def _archive(path: Path, name: str) -> Iterator[Found]:
    try:
        members = index_archive(path, VIDEO_SUFFIXES)
    except DamagedArchive as error:
        yield Skipped(name, "damaged archive", str(error))
    except OSError as error:
        yield Skipped(name, "cannot be read", error.strerror or "")
    else:
        for each in members:
            yield SourceVideo(f"{name}/{each.name}", path, each.caption, member=(each.offset, each.size))
