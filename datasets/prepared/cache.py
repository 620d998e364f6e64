"""Prepared clips on disk: latents and text in safetensors shards, a manifest, and one line a clip.

    CACHE/manifest.json     CacheManifest: the properties that all clips share
    CACHE/clips.jsonl       ClipRecord a line, in the order of sources and time
    CACHE/skipped.jsonl     Skipped a line
    CACHE/shards/*.safetensors   clips of one bucket: `latents` [N, C, F, H, W], their first frames `first`
                            [N, 3, height, width] (uint8), `embeds` [N, L, D] (zero rows after a prompt's own), and
                            where there are any `mask` [N, L], `pooled` [N, P]
    CACHE/empty_prompt.safetensors   the same text tensors, N = 1, of the empty prompt
    CACHE/contact.html      what was kept, to look at

Nothing in it depends on how many processes wrote it or will read it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rats_video.condition import Condition
from rats_video.errors import UserError, first_line
from rats_video.files import replacing, write_json
from rats_video.reading import check_plain_file, read_json, read_text
from rats_video.types import ClipSpec

FORMAT = 1
MANIFEST, CLIPS, SKIPPED, SHARDS, EMPTY, CONTACT = (
    "manifest.json", "clips.jsonl", "skipped.jsonl", "shards", "empty_prompt.safetensors", "contact.html",
)  # fmt: skip
VIDEO = ("latents", "first")
"""The tensors of a shard that are no text."""
MOST_INDEX = 2**31  # bytes of clips.jsonl: some five million clips
OPEN_SHARDS = 256  # at a time: each is mapped into memory, which the kernel allows some 65,000 times
Split = Literal["train", "heldout"]
T = TypeVar("T")


@dataclass(frozen=True)
class ClipRecord:
    """One prepared clip.

    Args:
        key: unique in the cache and the same whoever makes it: the source's digest, cut, and the span's milliseconds.
        source: `SourceVideo.name`.
        digest: SHA-256 of the source's bytes.
        start: seconds into the source.
        end: seconds into the source.
        caption: the text it was encoded with.
        num_frames: pixel frames; 0, as height and width, for a prompt without a video, whose shard has no `latents`.
        height: pixels.
        width: pixels.
        split: `train` or `heldout`; all clips of a source are in the same.
        shard: file name below shards/.
        row: of the shard's tensors.
    """

    key: str
    source: str
    digest: str
    start: float
    end: float
    caption: str
    num_frames: int
    height: int
    width: int
    split: Split
    shard: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    row: Annotated[int, Field(ge=0)]

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width: the bucket."""
        return self.num_frames, self.height, self.width


@dataclass(frozen=True)
class CacheManifest:
    """The properties that all clips of a cache share.

    Args:
        format: version of this layout.
        model: what the configuration called the model, for messages.
        family: of backbones: "Wan".
        vae: digest of the VAE's weights and configuration: latents of another one mean nothing to it.
        text: digest of the text encoders' and tokenizers' files.
        settings: every other setting that changes what is stored, as JSON (fps, buckets, fit, cut, dtype ...).
        fps: frames a second of the clips.
        complete: whether the preparation came to its end.
        statistics: counts, hours, latents' mean and deviation and the like, for people.
    """

    format: int
    model: str
    family: str
    vae: str
    text: str
    settings: dict[str, Any]
    fps: float
    complete: bool = False
    statistics: dict[str, Any] | None = None

    def save(self, folder: Path) -> None:
        """Write FOLDER/manifest.json."""
        write_json(folder / MANIFEST, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> CacheManifest:
        """Read FOLDER/manifest.json.

        Raises:
            UserError: it is not there, damaged, or of a version of this format that is not read here.
        """
        path = folder / MANIFEST
        try:
            manifest = TypeAdapter(cls).validate_python(read_json(path))
        except FileNotFoundError:
            raise UserError("no prepared clips here", where=str(folder), fix="make them: rats-video prepare") from None
        except (OSError, ValueError, ValidationError) as error:
            raise UserError(f"cannot read it: {first_line(error)}", where=str(path), fix="prepare again") from error
        if manifest.format != FORMAT:
            raise UserError(
                f"is of format {manifest.format}, this version reads {FORMAT}", where=str(path), fix="prepare again"
            )
        return manifest


def save_shard(path: Path, latents: Tensor | None, condition: Condition, first: Tensor | None = None) -> None:
    """Write clips of one bucket: `[N, C, F, H, W]` and the N prompts they were encoded with; None for prompts alone.

    `first` are their first frames, `[N, 3, height, width]` uint8.
    """
    videos = {name: part.contiguous() for name, part in zip(VIDEO, (latents, first), strict=True) if part is not None}
    named = {"embeds": condition.embeds, "mask": condition.mask, "pooled": condition.pooled}
    prompts = {name: part.cpu().contiguous() for name, part in named.items() if part is not None}
    with replacing(path, "shard") as aside:
        save_file({**videos, **prompts}, aside)


class ClipCache:
    """Prepared clips, read from anywhere in any order; shards are opened when first needed.

    Args:
        folder: of the cache.

    Raises:
        UserError: it is no cache, is damaged, or was not finished.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = CacheManifest.load(folder)
        if not self.manifest.complete:
            raise UserError(
                "its preparation did not come to its end", where=str(folder), fix="run the same prepare again"
            )
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(self._open)

    @cached_property
    def records(self) -> tuple[ClipRecord, ...]:
        """All clips, in the order of clips.jsonl."""
        return read_lines(self.folder / CLIPS, ClipRecord, fix="prepare again")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that training on the clips depends on: the same for a copy of the cache."""
        manifest = self.manifest
        common = (manifest.family, manifest.vae, manifest.text, json.dumps(manifest.settings, sort_keys=True))
        digest = hashlib.sha256(repr(common).encode())
        for record in self.records:
            digest.update(repr((record.key, record.size, record.caption, record.split)).encode())
        return digest.hexdigest()

    @property
    def trains_on_all(self) -> bool:
        """True if it was prepared with `heldout: 0`: nobody wants a part of it kept for validation."""
        return self.manifest.settings.get("heldout") == 0

    def of_split(self, split: Split) -> tuple[ClipRecord, ...]:
        """The clips to train on, or those to validate on."""
        return tuple(record for record in self.records if record.split == split)

    def spec(self, record: ClipRecord) -> ClipSpec:
        """The clip's size."""
        return ClipSpec(record.num_frames, record.height, record.width, self.manifest.fps)

    def read(self, records: Sequence[ClipRecord]) -> tuple[Tensor, Condition]:
        """Latents `[B, C, F, H, W]` in float32, and the text, of B clips of one size.

        Raises:
            UserError: a shard is missing or damaged, or holds prompts without videos.
        """
        if any(not record.num_frames for record in records):
            raise UserError("holds prompts without videos", where=str(self.folder), fix="prepare a folder of videos")
        rows = [self._row(record) for record in records]
        return torch.cat([latents for latents, _ in rows]).float(), Condition.cat([text for _, text in rows])

    def first_frames(self, records: Sequence[ClipRecord]) -> list[Tensor]:
        """The clips' first frames, each `[3, height, width]` uint8.

        Raises:
            UserError: a shard is missing or damaged, or was written before they were stored.
        """
        found = []
        for record in records:
            name = f"{SHARDS}/{record.shard}"
            file = self._shard(name)
            if VIDEO[1] not in file.keys():  # noqa: SIM118
                raise UserError(
                    "was prepared without first frames", where=str(self.folder),
                    fix="prepare again, into another folder, or set prompts.first_frame=false",
                )  # fmt: skip
            found.append(self._read(name, file, VIDEO[1], record.row)[0])
        return found

    def text(self, record: ClipRecord) -> Condition:
        """The text condition of one clip, B = 1; its latents are not read.

        Raises:
            UserError: a shard is missing or damaged.
        """
        name = f"{SHARDS}/{record.shard}"
        return self._text(name, self._shard(name), record.row)

    @cached_property
    def empty_prompt(self) -> Condition:
        """The text condition of "", B = 1."""
        return self._text(EMPTY, self._shard(EMPTY), 0)

    def _row(self, record: ClipRecord) -> tuple[Tensor, Condition]:
        name = f"{SHARDS}/{record.shard}"
        return self._read(name, self._shard(name), "latents", record.row), self.text(record)

    def _text(self, name: str, file: Any, row: int) -> Condition:
        parts = {part: self._read(name, file, part, row) for part in file.keys() if part not in VIDEO}  # noqa: SIM118
        try:
            return Condition.of_text({part: rows.float() if part != "mask" else rows for part, rows in parts.items()})
        except TypeError as error:
            raise self._damaged(name, first_line(error)) from error

    def _read(self, name: str, file: Any, part: str, row: int) -> Tensor:
        """Row `[1, ...]` of a tensor; no other is read from the disk."""
        try:
            rows: Tensor = file.get_slice(part)[row : row + 1]
        except SafetensorError as error:
            raise self._damaged(name, first_line(error)) from error
        if len(rows) != 1:  # a slice beyond the end is no error, but empty
            raise self._damaged(name, f"it has no row {row}")
        return rows

    def _open(self, name: str) -> Any:
        path = self.folder / name
        try:
            check_plain_file(path)
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise self._damaged(name, first_line(error)) from error

    def _damaged(self, name: str, reason: str) -> UserError:
        fix = "delete it and run the same prepare again"
        return UserError(f"cannot read it: {reason}", where=str(self.folder / name), fix=fix)


def read_lines(path: Path, kind: type[T], *, fix: str) -> tuple[T, ...]:
    """The dataclasses that `write_lines` wrote.

    Raises:
        UserError: it cannot be read or is damaged; `fix` says what to do.
    """
    reader = TypeAdapter(kind)
    try:
        # Not splitlines: a caption may hold what Unicode calls a line's end.
        return tuple(reader.validate_json(line) for line in read_text(path, MOST_INDEX).split("\n") if line)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read it: {first_line(error)}", where=str(path), fix=fix) from error


def write_lines(path: Path, items: Iterable[Any], what: str) -> None:
    """Write dataclasses as JSON lines."""
    with replacing(path, what) as aside, aside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items)


@dataclass(frozen=True)
class Skipped:
    """A source, or a span of it, that gave no clip; `reason` is one clause, equal for equal causes, to be counted."""

    name: str
    reason: str
    detail: str = ""
