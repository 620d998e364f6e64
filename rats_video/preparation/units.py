"""Plan and progress: sources in units, each with a record that is written when the unit is whole.

    CACHE/units/000007.jsonl         an `Entry` a source; there once all shards of the unit are
    CACHE/units/000007.safetensors   the clips' thumbnails as JPEG bytes, by key
    CACHE/units/000007.claim         a process of this run has taken it

The division depends on the sources alone: however many processes do the units, and however often they are stopped, the
same files come out.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rats_video.datasets.prepared.cache import SHARDS, ClipRecord, Skipped, read_lines, write_lines
from rats_video.datasets.video.records import SourceVideo
from rats_video.files import tidy

UNITS = "units"
DAMAGED = "delete it and run the same prepare again"
UNIT_SOURCES = 32  # a kill costs at most these; enough clips to fill a shard, few enough for several GPUs to share


@dataclass(frozen=True)
class Fingerprint:
    """Identifies a source without reading it: tells if it is still the one that was prepared."""

    name: str
    caption: str | None
    start: float
    end: float | None
    member: tuple[int, int] | None
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class RunningStats:
    """Mean and summed squared deviations of `count` numbers; adding two gives those of all."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def __add__(self, other: RunningStats) -> RunningStats:
        count = self.count + other.count
        if not count:
            return self
        apart = other.mean - self.mean
        mean = self.mean + apart * other.count / count
        return RunningStats(count, mean, self.squares + other.squares + apart**2 * self.count * other.count / count)

    @property
    def std(self) -> float:
        """Deviation, of the numbers themselves."""
        return math.sqrt(self.squares / max(1, self.count))


@dataclass(frozen=True)
class KeptClip:
    """A clip that is in a shard, and the statistics of its latents."""

    record: ClipRecord
    moments: RunningStats


@dataclass(frozen=True)
class SourceRecord:
    """The result of one source.

    Args:
        source: which one, as it was.
        digest: SHA-256 of its bytes.
        clips: in order of time.
        skipped: why it gave none, or why some spans gave none.
        waited: seconds after which it was given up; None where it was read to its end.
    """

    source: Fingerprint
    digest: str
    clips: tuple[KeptClip, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    waited: float | None = None


@dataclass(frozen=True)
class SourceBatch:
    """Sources, as they were when this was planned, that one process prepares in one go."""

    number: int
    sources: tuple[tuple[Fingerprint, SourceVideo], ...]


def fingerprint(source: SourceVideo) -> Fingerprint:
    """The source as it is now; a prompt or a shape, which has no file of its own, has size and time 0."""
    size = mtime = 0
    with contextlib.suppress(OSError):  # reading it will say why
        if source.has_file:
            stat = source.path.stat()
            size, mtime = stat.st_size, stat.st_mtime_ns
    return Fingerprint(source.name, source.caption, source.start, source.end, source.member, size, mtime)


def plan_units(
    sources: Mapping[Fingerprint, SourceVideo], units: Mapping[int, Sequence[SourceRecord]], timeout_seconds: float
) -> tuple[SourceBatch, ...]:
    """Sources that are not done, in their order, under the lowest numbers that are free.

    A source that was given up is tried again only where it may take longer now.
    """
    done = {
        entry.source
        for entries in units.values()
        for entry in entries
        if entry.waited is None or entry.waited >= timeout_seconds
    }
    left = [(mark, source) for mark, source in sources.items() if mark not in done]
    free = (number for number in itertools.count() if number not in units)
    starts = range(0, len(left), UNIT_SOURCES)
    return tuple(SourceBatch(number, tuple(left[start : start + UNIT_SOURCES])) for start, number in zip(starts, free))  # noqa: B905


def record_path(folder: Path, number: int) -> Path:
    """A unit's record."""
    return folder / UNITS / f"{number:06d}.jsonl"


def thumbs_path(folder: Path, number: int) -> Path:
    """A unit's thumbnails."""
    return record_path(folder, number).with_suffix(".safetensors")


def claim_units(folder: Path, units: Iterable[SourceBatch]) -> Iterator[tuple[SourceBatch, bool]]:
    """Each unit in turn with whether it is ours: several processes that walk through them share them as they come."""
    for unit in units:
        path = record_path(folder, unit.number).with_suffix(".claim")
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            yield unit, False
        else:
            yield unit, True


def read_units(folder: Path) -> dict[int, tuple[SourceRecord, ...]]:
    """The entries of all units that are done, by number, while nobody works on others: those are given back.

    A unit that lacks a shard is not done, and is forgotten.

    Raises:
        UserError: a record is damaged.
    """
    (folder / UNITS).mkdir(exist_ok=True)
    for below in (folder, folder / UNITS, folder / SHARDS):
        tidy(below)
    for claim in (folder / UNITS).glob("*.claim"):
        claim.unlink()
    shards = {path.name for path in (folder / SHARDS).glob("*")}
    units = {
        int(path.stem): read_lines(path, SourceRecord, fix=DAMAGED) for path in sorted((folder / UNITS).glob("*.jsonl"))
    }
    for number in [number for number, entries in units.items() if not _shards(entries) <= shards]:
        record_path(folder, number).unlink()
        del units[number]
    return units


def write_record(folder: Path, number: int, entries: Iterable[SourceRecord]) -> None:
    """Write a unit's record, the last of its files: the unit is done."""
    write_lines(record_path(folder, number), entries, "unit's record")


def latest(units: Mapping[int, Sequence[SourceRecord]], sources: Iterable[Fingerprint]) -> list[SourceRecord]:
    """The entry of each source, in the order of the sources; of two, the one that did not give up, or later."""
    found: dict[Fingerprint, SourceRecord] = {}
    for entry in itertools.chain.from_iterable(units.values()):
        before = found.get(entry.source)
        if before is None or _patience(entry) > _patience(before):
            found[entry.source] = entry
    return [found[mark] for mark in sources if mark in found]


def _patience(entry: SourceRecord) -> float:
    return float("inf") if entry.waited is None else entry.waited


def prune(folder: Path, units: Mapping[int, Sequence[SourceRecord]], kept: Iterable[SourceRecord]) -> None:
    """Forget all entries but `kept`, then delete the shards that nothing refers to any more."""
    living = {id(entry) for entry in kept}
    named: set[str] = set()
    for number, entries in units.items():
        still = tuple(entry for entry in entries if id(entry) in living)
        named |= _shards(still)
        if not still:
            record_path(folder, number).unlink()
        elif len(still) < len(entries):
            write_record(folder, number, still)
    for path in (folder / SHARDS).glob("*.safetensors"):
        if path.name not in named:
            path.unlink()
    for path in (folder / UNITS).glob("*.safetensors"):
        if not path.with_suffix(".jsonl").exists():
            path.unlink()


def _shards(entries: Iterable[SourceRecord]) -> set[str]:
    return {clip.record.shard for entry in entries for clip in entry.clips}
