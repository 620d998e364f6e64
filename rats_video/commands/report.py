"""`report`: runs as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rats_video.errors import UserError
from rats_video.files import replacing
from rats_video.reporting.gallery import make_gallery
from rats_video.reporting.page import make_page
from rats_video.reporting.sources import read_sources


def run_report(*, folders: Sequence[Path], output: Path, max_clips: int) -> list[str]:
    """Write the report of runs and comparisons of methods; returns the lines to show.

    Raises:
        UserError: a folder is neither or leads out of itself, or the file cannot be written.
    """
    if output.suffix.lower() not in {".html", ".htm"}:  # a slip must not replace a run's own file
        raise UserError("a report's name ends in .html", where=f"--output {output}")
    runs, methods = read_sources(folders)
    gallery = make_gallery(runs, [arm for each in methods for arm in each.arms], max_clips)
    page = make_page(runs, methods, gallery).encode()
    with replacing(output, "report") as partial:
        partial.write_bytes(page)
    lacks = [
        f"{run.name}: {what}; {command}" if command else f"{run.name}: {what}"
        for run in runs
        for what, command in run.lacks
    ]
    shown = f"{len(gallery.cards)} prompts, {len(gallery.clips)} clips"
    return [*lacks, f"{output} ({len(page) / 1e6:.1f} MB: {shown})"]
