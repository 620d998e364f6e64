"""Reads the sources of `prepare` in worker processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from rats_video.datasets.prepared.cache import Skipped
from rats_video.datasets.video.clips import ReadChunk, ReadPlan, pieces, plan_source, read_piece
from rats_video.datasets.video.isolated import TOO_LONG, IsolatedPool
from rats_video.datasets.video.isolated_worker import Failure
from rats_video.datasets.video.records import ReadSource, SourceVideo
from rats_video.datasets.video.settings import PrepareConfig
from rats_video.preparation.encode import SourceResult

NO_IMAGES = "an image, and this model takes no clip of one frame"


def read_sources(sources: Iterable[SourceVideo], cfg: PrepareConfig, *, with_images: bool) -> Iterator[SourceResult]:
    """The clips of each source, in order: half of the workers choose the spans, the others read them piece by piece."""
    readers, seconds = max(1, cfg.workers // 2), cfg.timeout_seconds
    planners = max(1, cfg.workers - readers)
    with (
        IsolatedPool(partial(plan_source, cfg=cfg), workers=planners, timeout_seconds=seconds) as plan,
        IsolatedPool(partial(read_piece, cfg=cfg), workers=readers, timeout_seconds=seconds) as read,
    ):
        plans = ((source, plan_of(source, found, with_images=with_images)) for source, found in plan.imap(sources))
        parts = (part for source, found in plans for part in pieces(source, found))
        for piece, result in read.imap(parts):
            given = result if isinstance(result, ReadSource) else without_clips(piece, result)
            is_late = any(each.reason == TOO_LONG for each in given.skipped)
            yield SourceResult(given, seconds if is_late else None, piece.is_last)


def without_clips(piece: ReadChunk, failure: Failure) -> ReadSource:
    """The result of a piece that could not be read, with the reason; the plan's own reason comes first."""
    reasons = piece.plan.skipped
    if piece.plan.spans or not reasons:
        reasons += (Skipped(piece.source.name, failure.reason, failure.detail),)
    return ReadSource(piece.source, piece.plan.digest, skipped=reasons)


def plan_of(source: SourceVideo, result: ReadPlan | Failure, *, with_images: bool) -> ReadPlan:
    """The plan of a source, or one without spans and with the reason."""
    if source.kind == "image" and not with_images:
        return ReadPlan(skipped=(Skipped(source.name, NO_IMAGES),))
    if isinstance(result, ReadPlan):
        return result
    return ReadPlan(skipped=(Skipped(source.name, result.reason, result.detail),))
