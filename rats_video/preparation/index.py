"""A cache's index, statistics and manifest, all made from the units' entries."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from rats_video.datasets.prepared.cache import (
    CLIPS,
    CONTACT,
    EMPTY,
    SKIPPED,
    CacheManifest,
    ClipRecord,
    Skipped,
    write_lines,
)
from rats_video.errors import UserError
from rats_video.preparation.contact import write_contact
from rats_video.preparation.units import KeptClip, RunningStats, SourceRecord
from rats_video.progress import format_seconds

EXAMPLES = 2  # of each reason, in the summary
DUPLICATE = "duplicate of another source"


@dataclass(frozen=True)
class CacheIndex:
    """The clips of a cache and the reasons for those that are not there, in the order of sources and time."""

    clips: tuple[KeptClip, ...]
    skipped: tuple[Skipped, ...]
    num_sources: int

    @property
    def records(self) -> list[ClipRecord]:
        """The lines of clips.jsonl."""
        return [clip.record for clip in self.clips]

    @property
    def reasons(self) -> dict[str, list[Skipped]]:
        """Skipped sources and spans by reason, the most frequent first."""
        found = defaultdict(list)
        for each in self.skipped:
            found[each.reason].append(each)
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def build_index(entries: Sequence[SourceRecord], unfit: Sequence[Skipped] = ()) -> CacheIndex:
    """Join the sources' entries; of clips with the same content the first is kept.

    Args:
        entries: in the order of the sources.
        unfit: what was no use as a source.
    """
    clips: list[KeptClip] = []
    skipped = list(unfit)
    first: dict[str, str] = {}  # who brought a clip
    for entry in entries:
        new = [clip for clip in entry.clips if clip.record.key not in first]
        skipped += entry.skipped
        if len(new) < len(entry.clips):
            there = next(first[clip.record.key] for clip in entry.clips if clip.record.key in first)
            skipped.append(Skipped(entry.source.name, DUPLICATE, f"same as {there}"))
        first |= {clip.record.key: entry.source.name for clip in new}
        clips += new
    return CacheIndex(tuple(clips), tuple(skipped), len(entries) + len(unfit))


def describe_index(index: CacheIndex) -> dict[str, Any]:
    """Statistics for people, and a digest of the index itself."""
    records = index.records
    told = hashlib.sha256()
    for line in (*map(asdict, records), *map(asdict, index.skipped)):
        told.update(json.dumps(line).encode())
    latents = reduce(add, (clip.moments for clip in index.clips), RunningStats())
    captions = {record.caption for record in records}
    lengths = sorted(len(caption.split()) for caption in captions) or [0]
    return {
        "sources": index.num_sources,
        "clips": len(records),
        "hours": round(seconds_of(records) / 3600, 6),
        "splits": dict(sorted(Counter(record.split for record in records).items())),
        "sizes": dict(Counter(size_name(record) for record in records).most_common()),
        "skipped": {reason: len(found) for reason, found in index.reasons.items()},
        "captions": {
            "distinct": len(captions),
            "words": {"fewest": lengths[0], "median": statistics.median(lengths), "most": lengths[-1]},
        },
        "latents": {"mean": round(latents.mean, 6), "deviation": round(latents.std, 6)},
        "index": told.hexdigest(),
    }


def write_index(folder: Path, manifest: CacheManifest, index: CacheIndex) -> bool:
    """Write all that tells of the shards, the manifest last; returns whether it was not there before."""
    whole = replace(manifest, complete=bool(index.clips), statistics=describe_index(index))
    files = [folder / name for name in (CLIPS, SKIPPED, CONTACT, EMPTY)]
    if all(path.is_file() for path in files) and CacheManifest.load(folder) == whole:
        return False
    write_lines(folder / CLIPS, index.records, "index")
    write_lines(folder / SKIPPED, index.skipped, "list of what was skipped")
    write_contact(folder, index.records, index.reasons, headline(index))
    whole.save(folder)
    return True


def check_same(before: CacheManifest, now: CacheManifest, folder: Path) -> None:
    """Refuse to put clips made in one way beside those made in another.

    Args:
        before: what the clips that are there have in common.
        now: what those to be made would have.
        folder: the cache.

    Raises:
        UserError: names what differs.
    """
    names = dict.fromkeys((*before.settings, *now.settings))
    pairs = [(name, before.settings.get(name), now.settings.get(name)) for name in names]
    changes = [f"{name} is {json.dumps(old)} there, {json.dumps(new)} now" for name, old, new in pairs if old != new]
    models = [("VAE", before.vae, now.vae), ("text encoder", before.text, now.text)]
    changes += [f"another {name}" for name, old, new in models if old != new]
    if changes:
        raise UserError(
            f"holds clips made otherwise: {'; '.join(changes)}", where=str(folder),
            fix="give another --output, or --overwrite to make all anew",
        )  # fmt: skip


def headline(index: CacheIndex) -> str:
    """`kept 12 clips from 5 of 7 sources (1:05 in all)`."""
    records = index.records
    kept = len({record.source for record in records})
    what = "prompts" if records and not any(record.num_frames for record in records) else "clips"
    length = f" ({format_seconds(seconds_of(records))} in all)" if what == "clips" else ""
    return f"kept {len(records)} {what} from {kept} of {index.num_sources} sources{length}"


def summary(index: CacheIndex, heldout: float) -> list[str]:
    """The lines to show at the end: counts by size, reasons with examples, and what a share held out has left empty."""
    sizes = Counter(size_name(record) for record in index.records)
    lines = [headline(index), *(f"  {count} of {size}" for size, count in sizes.most_common() if size)]
    for reason, found in index.reasons.items():
        names = list(dict.fromkeys(each.name for each in found))
        more = ["..."] if len(names) > EXAMPLES else []
        why = f": {found[0].detail}" if found[0].detail else ""
        lines.append(f"  skipped {len(found)}: {reason} ({', '.join(names[:EXAMPLES] + more)}){why}")
    splits = {record.split for record in index.records}
    if "heldout" not in splits:
        fix = "prepare more videos, or with another heldout share or seed; --set heldout=0 trains on all"
        lines.append(f"  none is held out for validation{': ' + fix if heldout else ', as heldout=0 says'}")
    if "train" not in splits:
        lines.append("  none is left to train on: prepare more videos, or with a smaller heldout share")
    return lines


def size_name(record: ClipRecord) -> str:
    """`17x64x64`: frames, height and width; empty for a prompt without a video."""
    return "x".join(map(str, record.size)) if record.num_frames else ""


def seconds_of(records: Iterable[ClipRecord]) -> float:
    """Length of all clips together."""
    return sum(record.end - record.start for record in records)
