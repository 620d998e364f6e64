"""`rats-video report`."""

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: `rats-video report runs/demo runs/tiny-imitation --output report.html`"


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of `distill`, `run` or `compare`.")],
    *,
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="HTML file to write.")] = Path("report.html"),
    max_clips: Annotated[
        int,
        typer.Option("--max-clips", min=0, metavar="N", help="Prompts to show clips of; each makes the file larger."),
    ] = 24,
) -> None:
    """Put runs side by side in one HTML file that can be mailed: curves, tables, and clips to play together.

    The file holds everything and asks no network for anything. What a run lacks is said with the command that makes it.
    """
    from rats_video.commands.report import run_report

    typer.echo("\n".join(run_report(folders=runs, output=output, max_clips=max_clips)))
