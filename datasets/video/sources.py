"""Lists what a user wants prepared: a folder, a table, archives, a video or image, prompts, or the synthetic shapes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rats_video.datasets.prepared.cache import Skipped
from rats_video.datasets.prompts.files import TEXT_SUFFIXES, check_plain, read_prompts, table_rows
from rats_video.datasets.tables import SUFFIXES, read_table
from rats_video.datasets.video.archives import DamagedArchive, index_archive, key_of
from rats_video.datasets.video.images import SUFFIXES as IMAGE_SUFFIXES
from rats_video.datasets.video.records import SourceVideo
from rats_video.datasets.video.settings import PrepareConfig
from rats_video.datasets.video.shape_clips import list_shapes
from rats_video.datasets.video.tables import (
    IN_FOLDER,
    LISTS,
    LISTS_OF_CAPTIONS,
    FileRow,
    file_rows,
    read_lists,
)
from rats_video.errors import UserError, printable
from rats_video.reading import check_plain_file, read_text

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".flv", ".wmv", ".ogv", ".3gp",
     ".gif")
)  # fmt: skip
FILE_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES
CAPTION_SUFFIXES = (".txt", ".caption")
LOOKED_FOR = (
    f"videos (*.mp4, *.mkv, *.webm ...), images (*.jpg, *.png ...), {', '.join(IN_FOLDER)}, "
    "videos.txt with prompts.txt, or *.tar"
)

NO_CAPTION = "no caption"
MISSING = "missing file"
NOT_LISTED = "not in the folder's table"
OUTSIDE = "a link that leads out of the folder"
POSTER = "an image of the name of a video beside it"
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
        source: `shapes`; a folder of videos and images, of a table (`metadata.csv`), of `videos.txt` with
            `prompts.txt`, or of tar archives, at any depth; a table; an archive; a video; an image; prompts.
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
        raise UserError("no video or image in it", where=source, fix=f"looked for {LOOKED_FOR}")
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
    if not caption and cfg.missing_caption == "skip" and source.has_file:
        return Skipped(source.name, NO_CAPTION, source.looked_for)
    return replace(source, caption=caption or None)


def _in_file(path: Path) -> Iterator[Found]:
    suffix = path.suffix.lower()
    if suffix in FILE_SUFFIXES:
        yield _captioned(path, path.name, _by_suffix(os.listdir(path.parent)))  # noqa: PTH208  # names alone
    elif suffix == ".tar":
        yield from _archive(path, path.name)
    elif suffix in SUFFIXES:
        table = read_table(path)
        if table.column("file"):
            yield from _rows(file_rows(table), path.parent, "")
        elif table.column("caption"):
            yield from _prompts(path, (row.prompt for row in table_rows(table, is_strict=False)))
        else:
            raise UserError(table.missing("file", "caption"), where=str(path))
    elif suffix in TEXT_SUFFIXES:
        prompts = read_prompts(path)
        if all(_suffix(prompt) in FILE_SUFFIXES for prompt in prompts):
            raise UserError("lists videos, not prompts", where=str(path), fix="give its folder, with prompts.txt in it")
        yield from _prompts(path, prompts)
    else:
        raise UserError(
            "is nothing that can be prepared", where=str(path), fix=f"give a folder, or a file of {LOOKED_FOR}"
        )


def _prompts(path: Path, prompts: Iterable[str]) -> Iterator[Found]:
    for number, prompt in enumerate(prompts, 1):
        yield SourceVideo(f"{path.name}:{number}", path, prompt, kind="prompt", index=number)


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
        names = _by_suffix(entry.name for entry in seen)
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


def _folder_file(path: Path, name: str, names: Mapping[str, str], listed: set[str] | None) -> Iterator[Found]:
    """A file of a folder: `names` lie beside it, `listed` are the files of the table it is subject to."""
    suffix = path.suffix.lower()
    if suffix == ".tar":
        yield from _archive(path, name)
    elif suffix in FILE_SUFFIXES and listed is not None:
        yield from () if name in listed else (Skipped(name, NOT_LISTED),)
    elif suffix in IMAGE_SUFFIXES and any(path.stem + each in names for each in VIDEO_SUFFIXES):
        yield Skipped(name, POSTER)
    elif suffix in FILE_SUFFIXES:
        yield _captioned(path, name, names)


def _by_suffix(names: Iterable[str]) -> dict[str, str]:
    """Names of files by the same with the suffix in lower case."""
    return {os.path.splitext(name)[0] + _suffix(name): name for name in names}  # noqa: PTH122  # a million Paths


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def _folder_table(folder: Path, names: Mapping[str, str]) -> list[FileRow] | None:
    tables = [names[name] for name in IN_FOLDER if name in names]
    videos, captions = (
        next((names[name] for name in choice if name in names), None) for choice in (LISTS, LISTS_OF_CAPTIONS)
    )
    pair = [f"{videos} with {captions}"] if videos and captions else []
    if len(tables) + len(pair) > 1:
        raise UserError(f"has {' and '.join(tables + pair)}", where=str(folder), fix="give one of them as SOURCE")
    if tables:
        table = read_table(folder / tables[0])
        if not table.column("file"):
            raise UserError(table.missing("file"), where=str(table.path))
        return file_rows(table)
    return read_lists(folder / videos, folder / captions) if videos and captions else None


def _captioned(path: Path, name: str, names: Mapping[str, str]) -> Found:
    """A video or image with the caption beside it; `names`, by `_by_suffix`, are the files there."""
    choices = [stem + suffix for suffix in CAPTION_SUFFIXES for stem in (path.stem, path.name)]
    caption = next((names[each] for each in choices if each in names), None)
    try:
        text = read_text(path.with_name(caption), 2**20) if caption else None
    except OSError as error:
        return Skipped(name, "caption cannot be read", error.strerror or "")
    except ValueError:
        return Skipped(name, "caption is not UTF-8 text", caption or "")
    looked_for = f"{caption} is empty" if caption else f"looked for {', '.join(choices)}"
    if not caption and (tables := [each for each in names.values() if _suffix(each) in SUFFIXES]):
        name_it = f"metadata{_suffix(tables[0])}"
        looked_for += f"; {tables[0]} may be a table: give it as SOURCE, or name it {name_it}"
    return SourceVideo(name, path, text, kind=_kind(path.name), looked_for=looked_for)


def _kind(name: str) -> Literal["video", "image"]:
    return "image" if _suffix(name) in IMAGE_SUFFIXES else "video"


def _rows(rows: Iterable[FileRow], folder: Path, below: str) -> Iterator[Found]:
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
            yield SourceVideo(
                name, path, row.caption, row.start, row.end, kind=_kind(name), looked_for=row.looked_for
            )  # fmt: skip


def _archive(path: Path, name: str) -> Iterator[Found]:
    try:
        members = index_archive(path, FILE_SUFFIXES)
    except DamagedArchive as error:
        yield Skipped(name, "damaged archive", str(error))
    except OSError as error:
        yield Skipped(name, "cannot be read", error.strerror or "")
    else:
        for each in members:
            yield SourceVideo(
                f"{name}/{each.name}", path, each.caption, member=(each.offset, each.size), kind=_kind(each.name),
                looked_for=f"looked for {key_of(each.name)}.txt and .json in it",
            )  # fmt: skip
