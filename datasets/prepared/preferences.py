"""People's preferences between prepared clips: a JSONL file, and its split by sources."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from rats_video.config.explain import first_mistake
from rats_video.datasets.prepared.cache import MOST_INDEX, SKIPPED, ClipCache, ClipRecord, Skipped, read_lines
from rats_video.errors import UserError, first_line, warn
from rats_video.reading import read_text

ClipsByName = Mapping[str, Sequence[ClipRecord]]


class PreferenceLine(BaseModel):
    """A line of the file.

    Args:
        preferred: a source of the cache, or the key of a clip.
        rejected: likewise.
        caption: what both were to show; otherwise each has its own.
        preferred_start: seconds into the source that the clip holds; otherwise all its clips count.
        rejected_start: likewise.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    preferred: str
    rejected: str
    caption: str | None = None
    preferred_start: float | None = None
    rejected_start: float | None = None


@dataclass(frozen=True)
class Preference:
    """Two clips of one size, the first of them preferred; `caption` is what both were to show, if the file says it."""

    preferred: ClipRecord
    rejected: ClipRecord
    caption: str | None = None


def read_preferences(path: Path, cache: ClipCache) -> list[Preference]:
    """The pairs of a file, in its order.

    Where sources have several clips, the first of one is compared with the first of the other, and so on, among those
    of one size, as far as both go. Pairs with a source that the preparation skipped are left out, with a warning.

    Raises:
        UserError: the file cannot be read, or some lines are wrong; says how many and what is wrong with the first.
    """
    try:
        # Not splitlines: a caption may hold what Unicode calls a line's end.
        lines = read_text(path, MOST_INDEX).removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read it: {first_line(error)}", where=str(path)) from error
    skipped = _skipped(cache.folder / SKIPPED)
    clips: defaultdict[str, list[ClipRecord]] = defaultdict(list)
    for record in cache.records:
        clips[record.source].append(record)
        clips[record.key].append(record)
    found: list[Preference] = []
    wrong: list[str] = []
    lines_of: dict[tuple[str, str], int] = {}
    left_out = 0
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = PreferenceLine.model_validate_json(text)
            if {line.preferred, line.rejected} - clips.keys() & skipped:
                left_out += 1
            else:
                found += _new_pairs(line, number, clips, lines_of)
        except ValueError as error:
            wrong.append(f"line {number}: {_reason(error)}")
    if wrong:
        count = f"{len(wrong)} of {len(lines)} lines are wrong, the first is " if len(wrong) > 1 else ""
        raise UserError(f"{count}{wrong[0]}", where=str(path), fix="mend or delete such lines")
    if left_out:
        warn(f"{left_out} pairs left out: `prepare` skipped a source of theirs", where=str(path))
    if not found:
        raise UserError(
            "holds no pairs", where=str(path), fix='give lines like {"preferred": "a.mp4", "rejected": "b.mp4"}'
        )
    return found


def _skipped(path: Path) -> set[str]:
    if not path.is_file():
        return set()
    return {each.name for each in read_lines(path, Skipped, fix="run the same prepare again")}


def _reason(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return first_line(error)
    return first_mistake(error)


def _new_pairs(
    line: PreferenceLine, number: int, clips: ClipsByName, lines_of: dict[tuple[str, str], int]
) -> list[Preference]:
    """The pairs of a line, noted in `lines_of`; raises ValueError for what is wrong with it."""
    pairs = list(_pairs(line, clips))
    for pair in pairs:
        ends = pair.preferred.key, pair.rejected.key
        if other := lines_of.get(ends[::-1]):
            raise ValueError(f"a tie: line {other} says the opposite")
        lines_of[ends] = number
    return pairs


def _pairs(line: PreferenceLine, clips: ClipsByName) -> Iterator[Preference]:
    preferred = _by_size(line.preferred, line.preferred_start, clips)
    rejected = _by_size(line.rejected, line.rejected_start, clips)
    sizes = [size for size in preferred if size in rejected]
    if not sizes:
        raise ValueError(f"{line.preferred!r} and {line.rejected!r} have no clips of one size")
    for size in sizes:
        for good, bad in zip(preferred[size], rejected[size], strict=False):
            if (good.digest, good.start) == (bad.digest, bad.start):
                raise ValueError(f"{line.preferred!r} and {line.rejected!r} are the same clip")
            yield Preference(good, bad, line.caption)


def _by_size(name: str, start: float | None, clips: ClipsByName) -> dict[tuple[int, int, int], list[ClipRecord]]:
    if name not in clips:
        raise ValueError(f"{name!r} is neither a source nor a clip of the prepared data")
    by_size: defaultdict[tuple[int, int, int], list[ClipRecord]] = defaultdict(list)
    for record in clips[name]:
        if start is None or record.start <= start < record.end:
            by_size[record.size].append(record)
    if not by_size:
        raise ValueError(f"{name!r} has no clip at {start:g} s")
    return by_size


def split_by_source(
    links: Sequence[frozenset[str]], heldout: frozenset[str], wanted: int, seed: int
) -> list[bool | None]:
    """Chooses pairs (or single clips) to validate on, so that no source is on both sides.

    Sources that pairs link stay together: groups with a held-out source come first, then others in the order of a hash,
    until there are `wanted`. Where the links are one web, so that this would leave too few on one side, sources are
    split instead, and pairs across are left out.

    Args:
        links: the digests of each pair's sources.
        heldout: digests of sources that are never trained on.
        wanted: how many to validate on.
        seed: of the order.

    Returns:
        True to validate on, False to train on, None to leave out.
    """
    roots = _roots(links)
    sizes = Counter(roots[min(link)] for link in links)
    held = {roots[digest] for digest in heldout & roots.keys()}
    chosen, count = set(held), sum(sizes[root] for root in held)
    for root in sorted(sizes.keys() - held, key=lambda root: _order(root, seed)):
        if count < wanted and count + sizes[root] <= 2 * wanted:
            chosen.add(root)
            count += sizes[root]
    if wanted / 2 <= count <= max(len(links) / 2, wanted):
        return [roots[min(link)] in chosen for link in links]
    ranked = sorted(roots, key=lambda digest: (digest not in heldout, _order(digest, seed)))
    share = math.sqrt(wanted / max(1, len(links)))  # of the sources: both of a pair must be among them
    aside = set(ranked[: max(len(heldout & roots.keys()), math.ceil(share * len(ranked)))])
    return [True if link <= aside else None if link & aside else False for link in links]


def _roots(links: Sequence[frozenset[str]]) -> dict[str, str]:
    """For each source, one that represents all that it is linked with."""
    parents: dict[str, str] = {digest: digest for link in links for digest in link}

    def root(digest: str) -> str:
        while parents[digest] != digest:
            parents[digest] = digest = parents[parents[digest]]
        return digest

    for link in links:
        first, *others = sorted(map(root, link))
        parents.update(dict.fromkeys(others, first))
    return {digest: root(digest) for digest in parents}


def _order(digest: str, seed: int) -> str:
    return hashlib.blake2b(f"{seed}:{digest}".encode()).hexdigest()
